"""Transfer baselines: batches to pre-train on, comparing features, fine-tuning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import tiny
from test_algorithms import EPISODE, FEATURES, KEY, compiled_predict, meta_params

from metalstm import algorithms, data, rules
from metalstm.algorithms.transfer.engine import centroid_loss
from metalstm.base import Batch, Learner, LearnerState, MetaParams

SUPPORT, QUERY = EPISODE
labels = np.asarray(SUPPORT.y)
SGD = rules.as_rule(optax.sgd(0.3))


def body() -> Learner:
    """tanh(x w1 + b1): with a linear head it is `reference.TanhNet`."""

    def apply(state, x, *, norm, key=None):
        del norm, key
        return jnp.tanh(x @ state.params["w1"] + state.params["b1"]), state

    def init(key, x):
        w1 = 0.5 * jax.random.normal(key, (x.shape[-1], 2))
        return LearnerState({"w1": w1, "b1": jnp.zeros(2)}, {}, {})

    return Learner(init, apply)


def predict(algorithm, params):
    fn = lambda p: algorithm.predict(  # noqa: E731
        p, KEY, SUPPORT, QUERY.x, num_classes=tiny.WAY
    )
    return np.asarray(tiny.quick_jit(fn)(params))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# -- the batches -----------------------------------------------------------------------


def pool() -> data.ClassPool:
    """3 classes of 2 images; the upper left pixel is 100 + 10 class + image."""
    images = np.zeros((3, 2, 4, 4, 1), np.uint8)
    images[:, :, 0, 0, 0] = 10 * np.arange(3)[:, None] + np.arange(2) + 100
    return data.make_pool(images)


@pytest.mark.parametrize("rotations", [False, True])
def test_a_batch_has_the_classes_of_the_pool_as_labels(rotations):
    turns = 4 if rotations else 1
    episodes = data.EpisodeSpec(way=3, shot=1, queries=1, rotations=rotations)
    spec = data.ClassificationSpec(60, 3 * turns, episodes)
    x, y = tiny.quick_jit(spec.sample)(KEY, pool())
    assert set(np.asarray(y)) == set(range(3 * turns))
    corners = 255 * np.asarray(x)[:, [0, 0, 3, 3], [0, 3, 3, 0], 0]
    corners = np.rint(corners).astype(int)
    assert set(corners.max(1) % 10) == {0, 1}  # both images of a class
    np.testing.assert_array_equal((corners.max(1) - 100) // 10, np.asarray(y) // turns)
    upright = corners.argmax(1) == 0
    np.testing.assert_array_equal(upright, np.asarray(y) % turns == 0)


def test_another_number_of_classes_than_the_pool_has_is_refused():
    spec = data.ClassificationSpec(4, 5, data.EpisodeSpec(way=3, shot=1, queries=1))
    with pytest.raises(ValueError, match=r"num_classes=5 but the pool has 3 classes"):
        spec.sample(KEY, pool())


def test_a_batch_is_as_large_as_an_episode_unless_told():
    spec = data.EpisodeSpec(way=5, shot=1, queries=15)
    for size, expected in ((None, 80), (32, 32)):
        baseline = algorithms.pretrained_features(FEATURES, 7, batch_size=size)
        sampler = baseline.train_sampler(spec)
        assert sampler == data.ClassificationSpec(expected, 7, spec)


@pytest.mark.parametrize("per_class", [1, 2, 3])
def test_a_batch_has_so_many_images_of_each_of_its_classes(per_class):
    """Distinct ones, where a class has as many (here two)."""
    episodes = data.EpisodeSpec(way=3, shot=1, queries=1)
    spec = data.ClassificationSpec(2 * per_class, 3, episodes, per_class=per_class)
    seen = set()
    for seed in range(20):
        x, y = tiny.quick_jit(spec.sample)(jax.random.key(seed), pool())
        classes, counts = np.unique(y, return_counts=True)
        assert counts.tolist() == 2 * [per_class]
        pixels = np.rint(255 * np.asarray(x)[:, 0, 0, 0]).astype(int) - 100
        np.testing.assert_array_equal(pixels // 10, y)
        assert len(set(pixels)) == 2 * per_class or per_class == 3
        seen |= set(classes.tolist())
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("num_images", "per_class", "message"),
    [
        (6, 4, "num_images=6: choose a multiple of per_class=4"),
        (8, 2, "needs 4 classes, and there are 3"),
        (8, 0, "per_class=0: choose 1 or more or None"),
    ],
)
def test_batches_that_cannot_be_are_refused(num_images, per_class, message):
    episodes = data.EpisodeSpec(way=3, shot=1, queries=1)
    with pytest.raises(ValueError, match=message):
        data.ClassificationSpec(num_images, 3, episodes, per_class)


# -- pre-training ----------------------------------------------------------------------


@pytest.mark.parametrize("classifier", ["linear", "cosine"])
def test_pretraining_is_the_cross_entropy_of_one_head_over_all_classes(classifier):
    baseline = algorithms.pretrained_features(body(), 4, classifier=classifier)
    batch = Batch(SUPPORT.x, SUPPORT.y + 1)
    params = baseline.init(KEY, batch)
    state = params.learner.params
    features = np.tanh(np.asarray(SUPPORT.x) @ state["body"]["w1"])
    head = jax.tree.map(np.asarray, state["head"])
    if classifier == "linear":
        scores = features @ head["kernel"] + head["bias"]
    else:
        scores = 10 * unit(features) @ unit(head["kernel"].T).T
    log_norm = np.log(np.exp(scores).sum(1))
    expected = np.mean(log_norm - scores[np.arange(6), labels + 1])
    loss, aux = tiny.quick_jit(baseline.loss)(params, KEY, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    np.testing.assert_allclose(
        aux.metrics["accuracy"], np.mean(scores.argmax(1) == labels + 1)
    )


# -- comparing features ----------------------------------------------------------------


@pytest.mark.parametrize("compare", ["neighbour", "centroid", "cosine"])
def test_features_are_compared_as_asked(compare):
    params = meta_params("pretrained_features")
    baseline = algorithms.pretrained_features(FEATURES, 3, compare=compare)
    state = params.learner._replace(params=params.learner.params["body"])
    embed = lambda x: np.asarray(FEATURES.apply(state, x, norm="stored")[0])  # noqa: E731
    support, query = embed(SUPPORT.x), embed(QUERY.x)
    means = np.stack([support[labels == c].mean(0) for c in range(tiny.WAY)])
    if compare == "cosine":
        expected = unit(query) @ unit(means).T
    elif compare == "centroid":
        expected = -np.sum((query[:, None] - means) ** 2, -1)
    else:
        distances = np.sum((query[:, None] - support) ** 2, -1)
        own = [distances[:, labels == c].min(1) for c in range(tiny.WAY)]
        expected = -np.stack(own, 1)
    np.testing.assert_allclose(
        predict(baseline, params), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("compare", ["ridge", "logistic"])
def test_heads_on_pretrained_features_are_those_of_frozen_ones(compare):
    params = meta_params("pretrained_features")
    baseline = algorithms.pretrained_features(FEATURES, 3, compare=compare)
    state = params.learner._replace(params=params.learner.params["body"])
    embed = lambda x: FEATURES.apply(state, x, norm="stored")[0]  # noqa: E731
    frozen = {
        "ridge": algorithms.ridge(),
        "logistic": algorithms.logistic_regression(),
    }
    support = SUPPORT._replace(x=embed(SUPPORT.x))
    expected = frozen[compare].predict((), KEY, support, embed(QUERY.x), num_classes=3)
    np.testing.assert_allclose(
        predict(baseline, params), expected, rtol=1e-4, atol=1e-5
    )


# -- fine-tuning -----------------------------------------------------------------------


def test_fine_tuning_takes_a_transform_for_a_rule():
    ours, rule = (
        algorithms.fine_tuning(body(), 4, r, tune="all", num_steps=2)
        for r in (optax.sgd(0.3), SGD)
    )
    params = ours.init(jax.random.key(3), EPISODE)
    same = rule.init(jax.random.key(3), EPISODE)
    np.testing.assert_array_equal(predict(ours, params), predict(rule, same))


@pytest.mark.parametrize("tune", ["head", "all"])
def test_fine_tuning_is_gradient_descent_from_a_head_of_zeros(tune):
    """In float64: all of `reference.TanhNet`, or its w2 and b2 alone."""
    algorithm = algorithms.fine_tuning(body(), 4, SGD, tune=tune, num_steps=5)
    params = algorithm.init(jax.random.key(3), EPISODE)
    net = reference.TanhNet(tiny.FEATURES, 2, tiny.WAY)
    start = np.asarray(params.learner.params["body"]["w1"], np.float64)
    theta = np.zeros(net.size)
    net.unpack(theta)["w1"][:] = start
    objective = net.objective(np.asarray(SUPPORT.x, np.float64), labels)
    moves = np.ones(net.size)
    if tune == "head":
        net.unpack(moves)["w1"][:] = 0
        net.unpack(moves)["b1"][:] = 0
    for _ in range(5):
        theta = theta - 0.3 * moves * objective(theta)[1]
    p = net.unpack(theta)
    scores = np.tanh(np.asarray(QUERY.x) @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    np.testing.assert_allclose(predict(algorithm, params), scores, rtol=1e-4, atol=1e-5)


def test_rate_and_steps_are_parameters_of_the_rule():
    """SGD with momentum 0.9 that stands still from num_steps on."""
    algorithm = algorithms.fine_tuning(body(), 4, tune="head", num_steps=4)
    params = algorithm.init(jax.random.key(3), EPISODE)
    assert params.rule == {"learning_rate": np.float32(0.01), "num_steps": 4.0}
    tuned = {"learning_rate": jnp.float32(0.2), "num_steps": jnp.float32(2)}
    momentum = rules.as_rule(optax.sgd(0.2, momentum=0.9))
    short = algorithms.fine_tuning(body(), 4, momentum, tune="head", num_steps=2)
    np.testing.assert_allclose(
        predict(algorithm, params._replace(rule=tuned)),
        predict(short, MetaParams(params.learner, ())),
        rtol=1e-5,
    )


def test_gradients_after_the_last_update_are_not_computed():
    """One branch runs, also for a batch of episodes: it is no select."""
    algorithm = algorithms.fine_tuning(body(), 4, tune="all", num_steps=4)
    params = algorithm.init(KEY, EPISODE)

    def predict(support, query_x):
        return algorithm.predict(params, KEY, support, query_x, num_classes=3)

    batch = jax.tree.map(lambda leaf: leaf[None], EPISODE)
    program = jax.make_jaxpr(jax.vmap(predict))(batch.support, batch.query.x)
    (scan,) = (e for e in program.eqns if e.primitive.name == "scan")
    inside = [e.primitive.name for e in scan.params["jaxpr"].eqns]
    assert "cond" in inside
    assert "conv_general_dilated" not in inside
    assert "dot_general" not in inside


def test_a_cosine_head_starts_at_the_classes_means():
    still = rules.as_rule(optax.sgd(0.0))
    algorithm = algorithms.fine_tuning(
        body(), 4, still, tune="head", classifier="cosine", num_steps=1
    )
    params = algorithm.init(jax.random.key(3), EPISODE)
    embed = lambda x: np.tanh(np.asarray(x) @ params.learner.params["body"]["w1"])  # noqa: E731
    support, query = unit(embed(SUPPORT.x)), unit(embed(QUERY.x))
    means = np.stack([support[labels == c].mean(0) for c in range(tiny.WAY)])
    expected = 10 * query @ unit(means).T
    np.testing.assert_allclose(predict(algorithm, params), expected, rtol=1e-3)


def test_any_way_will_do_at_test():
    five = tiny.episode(way=5)
    for name in ("pretrained_features", "fine_tuning_head", "fine_tuning_all"):
        assert compiled_predict(name)(meta_params(name), SUPPORT, QUERY.x).shape == (
            6,
            tiny.WAY,
        )
    baseline = algorithms.fine_tuning(FEATURES, 3, SGD, tune="all", num_steps=1)
    scores = jax.eval_shape(
        lambda p: baseline.predict(p, KEY, five.support, five.query.x, num_classes=5),
        meta_params("fine_tuning_all"),
    )
    assert scores.shape == (10, 5)


def test_what_baselines_refuse():
    with pytest.raises(
        ValueError, match=r"compare='mean': choose one of neighbour, centr"
    ):
        algorithms.pretrained_features(FEATURES, 3, compare="mean")
    with pytest.raises(
        ValueError, match=r"classifier='svm': choose one of linear, cosine"
    ):
        algorithms.pretrained_features(FEATURES, 3, classifier="svm")
    with pytest.raises(ValueError, match=r"num_classes=1: choose 2 or more"):
        algorithms.pretrained_features(FEATURES, 1)
    with pytest.raises(ValueError, match=r"tune='body': choose one of head, all"):
        algorithms.fine_tuning(FEATURES, 3, tune="body")
    maps = Learner(body().init, lambda s, x, **_: (x[:, :, None], s))
    with pytest.raises(ValueError, match=r"pre-training needs features \[N, d\]"):
        algorithms.pretrained_features(maps, 3).init(KEY, EPISODE)


def test_the_centroid_loss_compares_each_image_with_the_others():
    """Against numpy in float64; an image alone in its class does not count."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(7, 4)), np.array([2, 0, 2, 0, 0, 3, 2])
    u, losses = unit(features), []
    for i in range(7):
        scores = {
            c: u[i] @ unit(u[(labels == c) & (np.arange(7) != i)].sum(0))
            for c in (0, 2, 3)
            if ((labels == c) & (np.arange(7) != i)).any()
        }
        if labels[i] in scores:
            total = np.log(sum(np.exp(10 * s) for s in scores.values()))
            losses.append(total - 10 * scores[labels[i]])
    assert len(losses) == 6
    found, gradient = jax.value_and_grad(centroid_loss)(
        jnp.asarray(features, jnp.float32), jnp.asarray(labels), 5
    )
    np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_pretraining_adds_the_centroid_loss():
    batch = Batch(SUPPORT.x, SUPPORT.y + 1)
    plain, both = (
        algorithms.pretrained_features(
            body(), 4, per_class=2, batch_size=6, centroid_weight=weight
        )
        for weight in (0.0, 0.5)
    )
    params = plain.init(KEY, batch)
    features = jnp.tanh(SUPPORT.x @ params.learner.params["body"]["w1"])
    added = both.loss(params, KEY, batch)[0] - plain.loss(params, KEY, batch)[0]
    expected = 0.5 * centroid_loss(features, batch.y, 4)
    np.testing.assert_allclose(added, expected, rtol=1e-4)
    sampler = both.train_sampler(data.EpisodeSpec(3, 1, 1))
    assert (sampler.num_images, sampler.per_class) == (6, 2)
    with pytest.raises(ValueError, match="choose per_class=2 or more"):
        algorithms.pretrained_features(body(), 4, centroid_weight=0.5)
