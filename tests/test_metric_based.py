"""Methods that compare embeddings, against the papers in numpy."""

from __future__ import annotations

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_metric as reference
import tiny
from flax import linen as nn
from reference import Lstm

from experiments.few_shot import methods
from experiments.few_shot.command_line import parse
from metalstm import algorithms, specs
from metalstm.base import Batch, Episode, Learner, LearnerState
from metalstm.nn import conv4, relation_net
from metalstm.predictor import example_episode

KEY = jax.random.key(5)
# noise, so that no loss is near zero
EPISODE = jax.tree.map(
    lambda leaf: jax.random.normal(KEY, leaf.shape) if leaf.ndim > 1 else leaf,
    tiny.episode(3, queries=3),
)
# nothing to learn in front of the comparison, so that numpy sees the same embeddings
IDENTITY = Learner(
    lambda key, x: LearnerState({}, {}, {}),
    lambda state, x, *, norm, key=None: (x, state),
)


class Task(NamedTuple):
    """The episode in float64."""

    support: np.ndarray
    labels: np.ndarray
    query: np.ndarray
    targets: np.ndarray


(SUPPORT, QUERY) = EPISODE
TASK = Task(
    np.asarray(SUPPORT.x, np.float64),
    np.asarray(SUPPORT.y),
    np.asarray(QUERY.x, np.float64),
    np.asarray(QUERY.y),
)


def scores(algorithm, params) -> np.ndarray:
    return np.asarray(
        algorithm.predict(params, KEY, SUPPORT, QUERY.x, num_classes=tiny.WAY)
    )


def loss(algorithm, params) -> float:
    return float(algorithm.loss(params, KEY, EPISODE)[0])


def cross_entropy(scores: np.ndarray) -> float:
    log_norm = np.log(np.exp(scores).sum(1))
    return float(np.mean(log_norm - scores[np.arange(len(scores)), TASK.targets]))


@pytest.mark.parametrize(
    ("options", "distance", "scale"),
    [
        ({}, "euclidean", 1.0),
        ({"scale": 0.5}, "euclidean", 0.5),
        ({"distance": "cosine"}, "cosine", 10.0),
        ({"distance": "cosine", "scale": 3.0}, "cosine", 3.0),
    ],
)
def test_prototypical_scores_are_similarities_to_class_means(options, distance, scale):
    algorithm = algorithms.prototypical(IDENTITY, **options)
    params = algorithm.init(KEY, EPISODE)
    expected = reference.prototypical(
        TASK.support, TASK.labels, TASK.query, tiny.WAY, distance, scale
    )
    np.testing.assert_allclose(scores(algorithm, params), expected, rtol=1e-5)
    expected = cross_entropy(expected)
    np.testing.assert_allclose(loss(algorithm, params), expected, rtol=1e-5)
    with_way = algorithms.prototypical(IDENTITY, train_way=tiny.WAY, **options)
    np.testing.assert_allclose(loss(with_way, params), expected, rtol=1e-5)


def test_a_scale_is_learned_only_where_it_is_asked_for():
    learned = {"distance": "cosine"}, {"scale": "learned"}
    for options in learned:
        algorithm = algorithms.prototypical(IDENTITY, **options)
        params = algorithm.init(KEY, EPISODE)
        slope = jax.grad(lambda p, a=algorithm: a.loss(p, KEY, EPISODE)[0])
        gradient = tiny.quick_jit(slope)(params)
        assert gradient.params["comparison"]["log_scale"] != 0
    for options in ({}, {"distance": "cosine", "scale": 10.0}):
        params = algorithms.prototypical(IDENTITY, **options).init(KEY, EPISODE)
        assert not jax.tree.leaves(params)


@pytest.mark.parametrize(
    ("options", "distance", "scale"),
    [
        ({}, "cosine", 10.0),
        ({"scale": 1.0}, "cosine", 1.0),
        ({"distance": "euclidean"}, "euclidean", 1.0),
    ],
)
def test_matching_scores_are_the_log_of_the_attention_a_class_gets(
    options, distance, scale
):
    algorithm = algorithms.matching(IDENTITY, **options)
    params = algorithm.init(KEY, EPISODE)
    expected = np.log(reference.matching(*TASK[:3], tiny.WAY, distance, scale))
    np.testing.assert_allclose(
        scores(algorithm, params), expected, rtol=1e-5, atol=1e-5
    )
    expected = cross_entropy(expected)
    np.testing.assert_allclose(loss(algorithm, params), expected, rtol=1e-5)


def context_cells(params) -> dict[str, Lstm]:
    """The three LSTMs, their kernels cut into what reads inputs and what reads h."""
    cells = {}
    for name, cell in params.params["comparison"]["context"].items():
        kernel = np.asarray(cell["kernel"], np.float64)
        size = kernel.shape[0] // 4
        inputs, recurrent = kernel[:, :-size], kernel[:, -size:]
        cells[name] = Lstm(inputs, recurrent, np.asarray(cell["bias"], np.float64))
    return cells


@pytest.mark.parametrize("steps", [1, 3])
def test_full_context_embeddings_are_the_papers(steps):
    algorithm = algorithms.matching(IDENTITY, context_steps=steps, scale=2.0)
    params = algorithm.init(KEY, EPISODE)
    cells = context_cells(params)
    support = reference.support_in_context(
        TASK.support, cells["forward"], cells["backward"]
    )
    query = reference.query_in_context(TASK.query, support, cells["attention"], steps)
    expected = np.log(
        reference.matching(support, TASK.labels, query, tiny.WAY, "cosine", 2.0)
    )
    np.testing.assert_allclose(
        scores(algorithm, params), expected, rtol=1e-5, atol=1e-5
    )


def test_full_context_embeddings_read_the_order_of_the_support_set():
    backwards = Batch(SUPPORT.x[::-1], SUPPORT.y[::-1])
    for steps, differs in ((None, False), (2, True)):
        algorithm = algorithms.matching(IDENTITY, context_steps=steps)
        params = algorithm.init(KEY, EPISODE)
        other = algorithm.predict(params, KEY, backwards, QUERY.x, num_classes=3)
        difference = np.max(np.abs(np.asarray(other) - scores(algorithm, params)))
        assert (difference > 1e-2) == differs


def test_relation_networks_score_pairs_of_a_class_and_a_query():
    net = relation_net(filters=5, hidden=3)
    squared = algorithms.relation(IDENTITY, net, train_way=tiny.WAY)
    params = squared.init(KEY, EPISODE)
    weights = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64), params.params["comparison"]
    )

    def by_hand(pair: np.ndarray) -> float:
        for name in ("pair", "hidden", "output"):
            pair = np.maximum(pair, 0) if name != "pair" else pair
            pair = pair @ weights[name]["kernel"] + weights[name]["bias"]
        return float(pair[0])

    expected = reference.relation(*TASK[:3], tiny.WAY, by_hand)
    np.testing.assert_allclose(scores(squared, params), expected, rtol=1e-5, atol=1e-6)
    by_equation = reference.relation_loss(expected, TASK.targets)
    np.testing.assert_allclose(loss(squared, params), by_equation, rtol=1e-5)
    softmax = algorithms.relation(
        IDENTITY, net, train_way=tiny.WAY, loss="cross_entropy"
    )
    np.testing.assert_allclose(
        loss(softmax, params), cross_entropy(expected), rtol=1e-5
    )


def test_relation_networks_on_maps_are_the_published_ones():
    embedding = conv4(None, 64, num_halvings=2, feature_maps=True)
    algorithm = algorithms.relation(embedding, relation_net(), train_way=5)
    images = Batch(jnp.zeros((5, 28, 28, 1)), jnp.arange(5))

    def run():
        params = algorithm.init(KEY, Episode(images, images))
        out = algorithm.predict(params, KEY, images, images.x, num_classes=5)
        return params, out

    params, out = jax.eval_shape(run)
    assert out.shape == (5, 5)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    first, other = 9 * 64 + 3 * 64, 9 * 64 * 64 + 3 * 64
    assert count(params.params["embedding"]) == first + 3 * other
    # 7 x 7 maps become 3 x 3, then one pixel of 64 features
    pair = 9 * 128 * 64 + 3 * 64
    assert count(params.params["comparison"]) == pair + other + 64 * 8 + 8 + 8 + 1
    assert set(params.stats["comparison"]) == {"norm1", "norm2"}


@pytest.mark.parametrize("downsized", [2, 4])
def test_a_relation_net_on_maps_is_convolutions_of_concatenated_pairs(downsized):
    net = relation_net(filters=3, hidden=2)
    keys = jax.random.split(KEY)
    classes = jax.random.normal(keys[0], (2, downsized, downsized, 4))
    queries = jax.random.normal(keys[1], (3, downsized, downsized, 4))
    state = net.init(KEY, (classes, queries))

    def by_flax(params, classes, queries):
        pairs = [jnp.concatenate([c, q], -1) for q in queries for c in classes]
        x = jnp.stack(pairs)
        for layer, norm in (("pair", "norm1"), ("conv", "norm2")):
            x = nn.Conv(3, (3, 3)).apply({"params": params[layer]}, x)
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
            x = (x - mean) / jnp.sqrt(var + 1e-3)
            x = x * params[norm]["scale"] + params[norm]["bias"]
            x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2)) if x.shape[1] > 1 else x
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return x @ params["output"]["kernel"] + params["output"]["bias"]

    expected = tiny.quick_jit(by_flax)(state.params, classes, queries)
    run = lambda state: net.apply(state, (classes, queries), norm="batch")[0]  # noqa: E731
    found = tiny.quick_jit(run)(state)
    np.testing.assert_allclose(found, expected.reshape(3, 2), rtol=1e-4, atol=1e-5)


def test_what_relation_networks_refuse():
    with pytest.raises(
        ValueError, match=r"loss='hinge': choose one of squared, cross_e"
    ):
        algorithms.relation(IDENTITY, IDENTITY, train_way=3, loss="hinge")
    first = Learner(IDENTITY.init, lambda state, x, *, norm: (x[0], state))
    algorithm = algorithms.relation(IDENTITY, first, train_way=3)
    params = algorithm.init(KEY, EPISODE)
    with pytest.raises(ValueError, match=r"returned shape \(3, 4\) for 3 classes"):
        algorithm.loss(params, KEY, EPISODE)
    with pytest.raises(ValueError, match=r"leaves no place for num_classes=5"):
        conv4(5, feature_maps=True)
    for name in ("norm", "initializer", "scale_init"):
        with pytest.raises(ValueError, match=rf"{name}='no': choose one of"):
            relation_net(**{name: "no"})


@pytest.mark.parametrize(
    ("name", "margin"), [("contrastive", 1.0), ("triplet", 0.2), ("triplet", 1.5)]
)
def test_siamese_losses_are_the_papers_over_the_whole_task(name, margin):
    embedded = np.concatenate([TASK.support, TASK.query])
    labels = np.concatenate([TASK.labels, TASK.targets])
    unit = embedded / np.linalg.norm(embedded, axis=1, keepdims=True)
    expected = getattr(reference, name)(unit, labels, margin)
    assert expected > 0.1
    options = {} if margin <= 1 else {"margin": margin}
    algorithm = algorithms.siamese(IDENTITY, loss=name, **options)
    params = algorithm.init(KEY, EPISODE)
    np.testing.assert_allclose(loss(algorithm, params), expected, rtol=1e-5)


def test_a_siamese_network_asks_the_nearest_embedding():
    algorithm = algorithms.siamese(IDENTITY)
    found = scores(algorithm, algorithm.init(KEY, EPISODE))
    for row, query in zip(found, TASK.query, strict=True):
        cosines = np.array([reference.cosine(query, s) for s in TASK.support])
        assert row.argmax() == TASK.labels[cosines.argmax()]
        for k in range(tiny.WAY):
            best = cosines[TASK.labels == k].max()
            np.testing.assert_allclose(row[k], -(2 - 2 * best), atol=1e-5)


def test_equal_embeddings_have_a_finite_derivative():
    equal = Batch(jnp.ones((3, 4)), jnp.array([0, 1, 0]))
    for name in ("contrastive", "triplet"):
        algorithm = algorithms.siamese(IDENTITY, loss=name)

        def value(x, algorithm=algorithm):
            params = algorithm.init(KEY, EPISODE)
            return algorithm.loss(params, KEY, Episode(Batch(x, equal.y), equal))[0]

        assert np.all(np.isfinite(tiny.quick_jit(jax.grad(value))(equal.x)))


def test_what_siamese_networks_refuse():
    with pytest.raises(
        ValueError, match=r"loss='hinge': choose one of contrastive, tripl"
    ):
        algorithms.siamese(IDENTITY, loss="hinge")
    with pytest.raises(ValueError, match=r"margin=0: choose a number above 0"):
        algorithms.siamese(IDENTITY, margin=0)


def test_what_matching_and_comparisons_refuse():
    with pytest.raises(ValueError, match=r"context_steps=0: choose 1 or more or None"):
        algorithms.matching(IDENTITY, context_steps=0)
    maps = jax.tree.map(
        lambda leaf: leaf[..., None] if leaf.ndim > 1 else leaf, EPISODE
    )
    for factory in (algorithms.matching, algorithms.prototypical):
        algorithm = factory(IDENTITY)
        params = algorithm.init(KEY, maps)
        with pytest.raises(ValueError, match=r"shape \(4, 1\), but what is compared"):
            algorithm.loss(params, KEY, maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"distance": "manhattan"},
            r"distance='manhattan': choose one of cosine, eucl",
        ),
        ({"scale": "fixed"}, r"scale='fixed': choose a number above 0, or 'learned'"),
        ({"scale": 0.0}, r"scale=0.0: choose a number above 0"),
    ],
)
def test_wrong_options_of_a_comparison_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        algorithms.prototypical(IDENTITY, **options)


def test_features_of_zero_have_a_finite_derivative():
    from metalstm.algorithms.metric.distances import unit

    gradient = jax.grad(lambda x: unit(x).sum())(jnp.zeros(3))
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    "name", [n for n, m in methods.METHODS.items() if m.family == methods.METRIC]
)
@pytest.mark.parametrize("learner", ["conv4", "mlp"])
def test_the_command_line_builds_every_method_for_any_way(name, learner):
    line = f"--algorithms {name} --way 3 --train-way 4 --learner {learner}"
    line += " --filters 2" if learner == "conv4" else ""
    spec = json.loads(json.dumps(methods.specs_of(parse(line.split()))[name]))
    algorithm = specs.build_algorithm(spec)
    assert specs.fixed_way(spec) is None
    four = example_episode((28, 28, 1), 4)
    five = example_episode((28, 28, 1), 5)

    def run():
        params = algorithm.init(KEY, four)
        value, _ = algorithm.loss(params, KEY, four)
        out = algorithm.predict(params, KEY, five.support, five.query.x, num_classes=5)
        return value, out

    value, out = jax.eval_shape(run)
    assert value.shape == ()
    assert out.shape == (5, 5)
