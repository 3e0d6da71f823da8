"""Every algorithm through one contract, and the closed forms of each."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import algorithms, rules
from metalstm.algorithms.common import make_algorithm
from metalstm.algorithms.gradient import adaptation
from metalstm.base import (
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
)
from metalstm.inner import first_order, second_order
from metalstm.nn import relation_net, tied_head
from metalstm.tasks import map_tasks, mean_over_tasks

NET = tiny.norm_net()
GATES = rules.lstm_gates(hidden_size=2, input_bias=(-1.0, 0.0))
STEPS = {"num_steps": 2}
FEATURES = tiny.norm_net(5)
SGD = rules.as_rule(optax.sgd(0.3))
EPISODE = tiny.episode(queries=2)


class Case(NamedTuple):
    algorithm: MetaAlgorithm
    inductive: bool = True
    learns_rule: bool = False
    task: Any = None  # of meta-training, where it is no episode


CASES = {
    "meta_lstm_default": Case(algorithms.meta_lstm(NET, **STEPS), learns_rule=True),
    "meta_lstm": Case(
        algorithms.published_meta_lstm(NET, GATES, **STEPS, gradient_scale=1.0),
        learns_rule=True,
    ),
    "meta_lstm_second_order": Case(
        algorithms.published_meta_lstm(
            NET,
            GATES,
            **STEPS,
            differentiation=second_order(),
            train_query_norm="support",
        ),
        learns_rule=True,
    ),
    "meta_lstm_frozen": Case(
        algorithms.published_meta_lstm(
            NET, GATES, **STEPS, query_norm="frozen", train_query_norm="frozen"
        ),
        learns_rule=True,
    ),
    "maml": Case(algorithms.maml(NET, 0.3, **STEPS)),
    "maml_support+1": Case(algorithms.maml(NET, 0.3, **STEPS, query_norm="support+1")),
    "maml_transductive": Case(
        algorithms.maml(NET, 0.3, **STEPS, query_norm="transductive"), inductive=False
    ),
    "maml_frozen": Case(algorithms.maml(NET, 0.3, **STEPS, query_norm="frozen")),
    "fomaml": Case(algorithms.fomaml(NET, 0.3, **STEPS)),
    "anil": Case(algorithms.anil(NET, 0.3, **STEPS, head="Dense_1")),
    "reptile": Case(algorithms.reptile(NET, 0.1, **STEPS, num_test_steps=3)),
    "implicit_maml": Case(algorithms.implicit_maml(NET, 0.3, **STEPS, cg_steps=2)),
    "gradient_agreement": Case(
        algorithms.gradient_agreement(algorithms.fomaml(NET, 0.3, **STEPS))
    ),
    "hallucination": Case(algorithms.hallucination(FEATURES, num_generated=2)),
    "mann": Case(
        algorithms.mann(
            FEATURES, 3, hidden_size=4, num_slots=5, slot_size=3, num_reads=2
        )
    ),
    "meta_sgd": Case(algorithms.meta_sgd(NET, **STEPS), learns_rule=True),
    "tied_head": Case(
        algorithms.maml(
            tied_head(tiny.norm_net(4)), 0.3, num_steps=3, train_way=tiny.WAY
        )
    ),
    "prototypical": Case(algorithms.prototypical(NET)),
    "prototypical_cosine": Case(algorithms.prototypical(NET, distance="cosine")),
    "matching": Case(algorithms.matching(NET)),
    "matching_fce": Case(algorithms.matching(NET, context_steps=2)),
    "relation": Case(
        algorithms.relation(
            NET, relation_net(filters=8, initializer="flax"), train_way=tiny.WAY
        )
    ),
    "siamese": Case(algorithms.siamese(NET)),
    "siamese_triplet": Case(algorithms.siamese(NET, loss="triplet", margin=1.0)),
    "pretrained_features": Case(
        algorithms.pretrained_features(FEATURES, tiny.WAY), task=EPISODE.query
    ),
    "margin_classifier": Case(
        algorithms.margin_classifier(FEATURES, tiny.WAY, loss="arcface"),
        task=EPISODE.query,
    ),
    "fine_tuning_head": Case(
        algorithms.fine_tuning(FEATURES, 3, SGD, tune="head", num_steps=2),
        task=EPISODE.query,
    ),
    "fine_tuning_all": Case(
        algorithms.fine_tuning(FEATURES, 3, SGD, tune="all", num_steps=2),
        task=EPISODE.query,
    ),
    "nearest_neighbour": Case(algorithms.nearest_neighbour()),
    "nearest_centroid": Case(algorithms.nearest_centroid()),
    "ridge": Case(algorithms.ridge()),
    "logistic_regression": Case(algorithms.logistic_regression()),
    "from_scratch": Case(
        algorithms.from_scratch(NET, rules.as_rule(optax.sgd(0.3)), **STEPS)
    ),
}
COMPARING = (
    "prototypical",
    "prototypical_cosine",
    "matching",
    "matching_fce",
    "relation",
    "siamese",
    "margin_classifier",
)
EQUIVARIANT = (
    "nearest_neighbour",
    "nearest_centroid",
    "ridge",
    "logistic_regression",
    "tied_head",
    "hallucination",
    "pretrained_features",
    "fine_tuning_head",
    "fine_tuning_all",
)
TRAINED = [name for name, case in CASES.items() if case.algorithm.trainable]
KEY = jax.random.key(7)


@functools.cache
def meta_params(name: str):
    params = CASES[name].algorithm.init(jax.random.key(0), EPISODE)
    if not isinstance(params, MetaParams) or not params.learner.stats:
        return params
    # averages that are not the initial 0 and 1, so that using them shows
    stats = jax.tree.map(lambda leaf: leaf + 0.3, params.learner.stats)
    return params._replace(learner=params.learner._replace(stats=stats))


def predict(name: str):
    def fn(params, support, query_x):
        return CASES[name].algorithm.predict(
            params, KEY, support, query_x, num_classes=tiny.WAY
        )

    return fn


@functools.cache
def compiled_predict(name: str):
    return tiny.quick_jit(predict(name))


@functools.cache
def gradient(name: str):
    algorithm = CASES[name].algorithm

    def one_task(params, key, episode):
        carry = algorithm.init_carry(key, params, episode)
        batch = jax.tree.map(lambda leaf: leaf[None], (key, episode))
        grads, _, metrics = algorithm.meta_gradient(params, carry, *batch)
        return metrics, grads

    return tiny.quick_jit(one_task)


@pytest.mark.parametrize("name", TRAINED)
def test_meta_loss_is_finite_and_the_gradient_is_only_where_it_learns(name):
    params = meta_params(name)
    task = EPISODE if CASES[name].task is None else CASES[name].task
    metrics, grads = gradient(name)(params, KEY, task)
    assert np.isfinite(metrics["loss"])
    assert 0 <= metrics["accuracy"] <= 1
    learner = grads.learner if isinstance(grads, MetaParams) else grads
    for path, leaf in jax.tree_util.tree_leaves_with_path(learner.params):
        assert np.all(np.isfinite(leaf))
        assert np.any(leaf != 0) or _in_front_of_the_norm(path), path
    for leaf in jax.tree.leaves(learner.stats):
        np.testing.assert_array_equal(leaf, 0)
    if isinstance(grads, MetaParams):
        assert bool(jax.tree.leaves(grads.rule)) == CASES[name].learns_rule
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads.rule):
            assert np.all(np.isfinite(leaf))
            assert np.any(leaf != 0) or _in_front_of_the_norm(path), path


def _in_front_of_the_norm(path) -> bool:
    """A bias there moves nothing, so its gradient may be zero."""
    name = jax.tree_util.keystr(path)
    return "Dense_0" in name and "bias" in name


@pytest.mark.parametrize("name", CASES)
def test_one_query_depends_on_the_others_only_where_it_is_transductive(name):
    query = EPISODE.query.x
    others = query.at[1:].add(2.0).at[1:].multiply(3.0)
    fn = compiled_predict(name)
    before = fn(meta_params(name), EPISODE.support, query)
    after = fn(meta_params(name), EPISODE.support, others)
    assert before.shape == (6, tiny.WAY)
    if CASES[name].inductive:
        np.testing.assert_allclose(after[0], before[0], rtol=1e-5, atol=1e-6)
    else:
        assert np.max(np.abs(after[0] - before[0])) > 1e-2
    assert np.max(np.abs(after[1:] - before[1:])) > 1e-2
    moved = fn(meta_params(name), _shifted(EPISODE.support), query)
    assert np.max(np.abs(moved - before)) > 1e-4  # and all depend on the support set


def _shifted(support: Batch) -> Batch:
    return Batch(support.x.at[0].add(1.0), support.y)


def test_what_a_module_carries_beside_its_parameters_is_not_learned():
    net = tiny.tanh_net()

    def apply(state, x, *, norm, key=None):
        outputs, after = net.apply(state, x * state.other["scale"], norm=norm, key=key)
        return outputs, after

    learner = Learner(
        lambda key, x: net.init(key, x)._replace(other={"scale": jnp.float32(2)}), apply
    )
    algorithm = algorithms.fomaml(learner, 0.1, num_steps=1)
    params = algorithm.init(KEY, EPISODE)
    fn = tiny.quick_jit(jax.grad(lambda p: algorithm.loss(p, KEY, EPISODE)[0]))
    grads = fn(params).learner
    assert grads.other["scale"] == 0
    assert np.any(grads.params["w1"] != 0)


def test_each_query_norm_gives_its_own_scores():
    names = ["maml", "maml_support+1", "maml_transductive", "maml_frozen"]
    params = meta_params("maml")
    scores = [compiled_predict(n)(params, *_support_and_query()) for n in names]
    for i, first in enumerate(scores):
        for second in scores[:i]:
            assert np.max(np.abs(first - second)) > 1e-3
    norms = [CASES[n].algorithm.query_norm for n in names]
    assert norms == ["support", "support+1", "transductive", "frozen"]


def _support_and_query():
    return EPISODE.support, EPISODE.query.x


@pytest.mark.parametrize("name", ["maml", "nearest_neighbour", *COMPARING])
def test_vmap_over_tasks_is_a_loop_and_jit_is_eager(name):
    fn, params = compiled_predict(name), meta_params(name)
    first, second = tiny.episode(0), tiny.episode(1)
    looped = [fn(params, e.support, e.query.x) for e in (first, second)]
    both = tiny.episodes(2)
    mapped = tiny.quick_jit(jax.vmap(functools.partial(predict(name), params)))
    mapped = mapped(both.support, both.query.x)
    np.testing.assert_allclose(mapped, jnp.stack(looped), rtol=1e-4, atol=1e-5)
    if name != "maml":  # whose eager run is a compiled scan too
        eager = predict(name)(params, first.support, first.query.x)
        np.testing.assert_allclose(looped[0], eager, rtol=1e-4, atol=1e-5)


def test_ways_of_mapping_over_tasks_agree():
    both = tiny.episodes(3)
    fn = lambda episode: (episode.support.x.sum(), episode.query.y * 2)  # noqa: E731
    vmapped = map_tasks(fn, both)
    for how in ("scan", "unroll"):
        tiny.assert_close(map_tasks(fn, both, how=how), vmapped)


@pytest.mark.parametrize("how", [None, "vmap", "scan", "unroll"])
def test_mean_over_tasks_is_the_mean_of_what_each_has(how):
    both = tiny.episodes(3)

    def fn(episode):
        x, y = episode.support
        return x.astype(jnp.bfloat16), y * 2, y.max() > 0, {"total": x.sum()}

    ours = mean_over_tasks(fn, both, how=how)
    theirs = jax.tree.map(lambda leaf: leaf.mean(0), map_tasks(fn, both, how="vmap"))
    assert jax.tree.map(jnp.result_type, ours) == jax.tree.map(jnp.result_type, theirs)
    tiny.assert_close(ours, theirs)
    labels = lambda episode: (episode.support.x.sum(), episode.support.y)  # noqa: E731
    mean, per_task = mean_over_tasks(labels, both, how=how, has_per_task=True)
    np.testing.assert_allclose(mean, both.support.x.sum() / 3, rtol=1e-5)
    tiny.assert_equal(per_task, both.support.y)


# -- label permutations ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*COMPARING, *EQUIVARIANT])
def test_permuting_the_labels_permutes_the_scores(name):
    """A class's number means nothing, to a head whose classes share their start too."""
    permutation = jnp.array([2, 0, 1])
    params = meta_params(name)
    support, query = _support_and_query()
    before = compiled_predict(name)(params, support, query)
    renamed = Batch(support.x, permutation[support.y])
    after = compiled_predict(name)(params, renamed, query)
    np.testing.assert_allclose(after[:, permutation], before, rtol=1e-4, atol=1e-5)


# -- closed forms ----------------------------------------------------------------------


class Slope(NamedTuple):
    """Regression of y on x by one weight: the support loss is a parabola."""

    support: tuple[float, float]  # x, y
    query: tuple[float, float]

    def episode(self) -> Episode:
        def batch(x, y):
            return Batch(jnp.array([[x]]), jnp.array([[y]]))

        return Episode(batch(*self.support), batch(*self.query))


def slope_learner() -> Learner:
    def apply(state, x, *, norm, key=None):
        del norm, key
        return state.params * x, state

    return Learner(lambda key, x: LearnerState(jnp.float32(0), {}, {}), apply)


TASK = Slope((2.0, 3.0), (1.5, -1.0))
W, RATE = 0.7, 0.05


def slope_gradient(algorithm, rule=()):
    params = MetaParams(LearnerState(jnp.float32(W), {}, {}), rule)
    loss = lambda p: algorithm.loss(p, KEY, TASK.episode())[0]  # noqa: E731
    return tiny.quick_jit(jax.grad(loss))(params)


@pytest.mark.smoke
def test_maml_on_a_parabola_in_closed_form():
    """w_K = s + (1 - 2 a x^2)^K (w - s); the query's gradient times that power."""
    (x, y), (u, v) = TASK
    shrink = 1 - 2 * RATE * x**2
    adapted = y / x + shrink**3 * (W - y / x)
    at_query = 2 * u * (u * adapted - v)
    maml = algorithms.maml(slope_learner(), RATE, num_steps=3)
    gradient = slope_gradient(maml).learner.params
    np.testing.assert_allclose(gradient, at_query * shrink**3, rtol=1e-5)
    fomaml = algorithms.fomaml(slope_learner(), RATE, num_steps=3)
    gradient = slope_gradient(fomaml).learner.params
    np.testing.assert_allclose(gradient, at_query, rtol=1e-5)


def test_meta_sgd_on_a_parabola_in_closed_form():
    (x, y), (u, v) = TASK
    inner_gradient = 2 * x * (x * W - y)
    at_query = 2 * u * (u * (W - RATE * inner_gradient) - v)
    gradient = slope_gradient(algorithms.meta_sgd(slope_learner()), jnp.float32(RATE))
    np.testing.assert_allclose(gradient.rule, -inner_gradient * at_query, rtol=1e-5)
    expected = at_query * (1 - 2 * RATE * x**2)
    np.testing.assert_allclose(gradient.learner.params, expected, rtol=1e-5)


@pytest.mark.smoke
def test_first_order_maml_is_the_query_gradient_at_the_adapted_parameters():
    algorithm, params = CASES["fomaml"].algorithm, meta_params("fomaml")
    inner, _ = algorithm.adapt(params, KEY, EPISODE.support)

    def query_loss(adapted):
        state = LearnerState(adapted, inner.stats, {})
        outputs, _ = NET.apply(state, EPISODE.query.x, norm="batch")
        return optax.softmax_cross_entropy_with_integer_labels(
            outputs, EPISODE.query.y
        ).mean()

    _, grads = gradient("fomaml")(params, KEY, EPISODE)
    expected = tiny.quick_jit(jax.grad(query_loss))(inner.params)
    tiny.assert_close(grads.learner.params, expected, rtol=1e-4, atol=1e-6)


def test_nearest_neighbour_is_the_closest_support_image():
    support, query = _support_and_query()
    scores = compiled_predict("nearest_neighbour")((), support, query)
    distances = np.sum((np.asarray(query)[:, None] - np.asarray(support.x)) ** 2, -1)
    nearest = np.asarray(support.y)[distances.argmin(1)]
    np.testing.assert_array_equal(scores.argmax(1), nearest)
    np.testing.assert_allclose(scores.max(1), -distances.min(1), rtol=1e-3, atol=1e-5)


# -- the switches of learned_init ------------------------------------------------------


def test_the_gradient_is_scaled_by_what_is_asked_for():
    def scale(value, batch_size=None):
        state = meta_params("maml").learner
        return adaptation.gradient_scale(value, NET, state, EPISODE.support, batch_size)

    assert scale("1/batch") == 1 / 6
    assert scale("1/batch", batch_size=2) == 1 / 2
    assert scale("way") == 3
    assert scale(0.25) == 0.25


def test_minibatches_cover_the_support_set_once_an_epoch_in_new_orders():
    support = Batch(jnp.arange(6), jnp.arange(6) % 3)
    batches = adaptation._minibatches(KEY, support, 2, 7)
    assert batches.x.shape == batches.y.shape == (7, 2)
    epochs = np.asarray(batches.x[:6]).reshape(2, 6)
    for epoch in epochs:
        assert sorted(epoch) == list(range(6))
    assert list(epochs[0]) != list(epochs[1])
    np.testing.assert_array_equal(batches.y, batches.x % 3)
    assert adaptation._minibatches(KEY, support, None, 7) is None
    other = adaptation._minibatches(jax.random.key(8), support, 2, 7)
    assert np.any(other.x != batches.x)


def test_drawn_initialisation_follows_the_key_and_leaves_nothing_to_learn():
    algorithm = algorithms.published_meta_lstm(
        tiny.tanh_net(), GATES, num_steps=1, learn_init=False
    )
    params = algorithm.init(jax.random.key(0), EPISODE)
    assert not jax.tree.leaves(params.learner)
    drawn = tiny.quick_jit(
        jax.vmap(
            lambda seed: algorithm.adapt(params, jax.random.key(seed), EPISODE.support)
        )
    )(jnp.array([0, 0, 1]))[0].params
    first, again, other = (
        jax.tree.map(lambda leaf, k=k: leaf[k], drawn) for k in range(3)
    )
    tiny.assert_equal(first, again)
    assert tiny.max_difference(first, other) > 0.1
    # so the rule serves a learner of another size
    wide = algorithms.published_meta_lstm(
        tiny.tanh_net(hidden=9), GATES, num_steps=1, learn_init=False
    )
    inner, trace = jax.eval_shape(wide.adapt, params, KEY, EPISODE.support)
    assert inner.params["w1"].shape == (tiny.FEATURES, 9)
    assert trace.observed["forget"].shape == (1, 9 * (1 + tiny.FEATURES + 3) + 3)


def test_more_steps_at_test_than_in_training():
    algorithm = algorithms.maml(tiny.tanh_net(), num_steps=1, num_test_steps=3)
    params = algorithm.init(jax.random.key(0), EPISODE)
    _, trace = algorithm.adapt(params, KEY, EPISODE.support)
    assert trace.losses.shape == (3,)
    assert trace.losses[2] < trace.losses[0]


def test_moving_statistics_are_those_of_the_passes():
    """Flax's momentum 0.8 over two passes at theta_0 and theta_1, from init."""
    algorithm, params = CASES["meta_lstm"].algorithm, meta_params("meta_lstm")
    inner, _ = algorithm.adapt(params, KEY, EPISODE.support)
    one_step = algorithms.published_meta_lstm(
        NET, GATES, num_steps=1, gradient_scale=1.0
    )
    theta_1 = one_step.adapt(params, KEY, EPISODE.support)[0].params
    stats = NET.init(KEY, EPISODE.support.x).stats
    for theta in (params.learner.params, theta_1):
        own = NET.apply(
            LearnerState(theta, stats, {}), EPISODE.support.x, norm="gather"
        )[1].stats
        stats = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, stats, own)
    tiny.assert_close(inner.stats, stats, rtol=1e-4)


def test_train_samplers_change_the_spec_they_are_given():
    @dataclasses.dataclass(frozen=True)
    class Spec:
        way: int = 5
        queries: int = 15

    unchanged = algorithms.maml(NET).train_sampler(Spec())
    assert unchanged == Spec()
    proto = algorithms.prototypical(NET, train_way=20, train_queries=5)
    assert proto.train_sampler(Spec()) == Spec(20, 5)
    fewer = algorithms.maml(NET, train_queries=5)
    assert fewer.train_sampler(Spec()) == Spec(5, 5)


# -- what is refused -------------------------------------------------------------------


def test_another_way_than_the_heads_is_refused_and_metric_methods_take_it():
    five = tiny.episode(way=5)
    for name in ("maml", "meta_lstm", "from_scratch"):
        with pytest.raises(ValueError, match=r"5 classes but the learner's head has 3"):
            jax.eval_shape(
                lambda p, n=name: CASES[n].algorithm.predict(
                    p, KEY, five.support, five.query.x, num_classes=5
                ),
                meta_params(name),
            )
    for name in (*COMPARING, "nearest_neighbour"):
        scores = jax.eval_shape(
            lambda p, n=name: CASES[n].algorithm.predict(
                p, KEY, five.support, five.query.x, num_classes=5
            ),
            meta_params(name),
        )
        assert scores.shape == (10, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_norm": "batch"}, r"query_norm='batch': choose one of support, supp"),
        ({"train_query_norm": ""}, r"train_query_norm='': choose one of support"),
        ({"support_stats": "mean"}, r"support_stats='mean': choose one of final"),
        ({"gradient_scale": "2/batch"}, r"gradient_scale='2/batch': choose a number"),
        ({"train_way": 7}, r"train_way=7 needs a learner whose head fits any number"),
    ],
)
def test_wrong_options_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        algorithms.maml(NET, **options)


def test_a_head_for_any_number_of_classes_must_be_told_how_many():
    algorithm = algorithms.maml(tied_head(tiny.norm_net(4)))
    params = meta_params("tied_head")
    for use in (
        lambda: algorithm.loss(params, KEY, EPISODE),
        lambda: algorithm.adapt(params, KEY, EPISODE.support),
    ):
        with pytest.raises(ValueError, match=r"must be told how many: train_way="):
            use()
    inner, _ = algorithm.adapt(params, KEY, EPISODE.support, num_classes=3)
    assert inner.params["head"]["bias"].shape == (3,)


def test_a_batch_size_that_does_not_divide_is_refused():
    for size in (4, 7, 0):
        with pytest.raises(
            ValueError, match=rf"batch_size={size} does not divide the 6"
        ):
            algorithms.maml(NET, batch_size=size).adapt(
                meta_params("maml"), KEY, EPISODE.support
            )


def test_second_order_through_a_rule_with_a_corner_at_zero_is_refused():
    adam = optax.adam(0.1)  # a transform is a rule

    def start(rule, how):
        learned = functools.partial(algorithms.learned_init, NET, num_steps=1)
        algorithm = learned(rule, differentiation=how)
        jax.eval_shape(algorithm.init, KEY, EPISODE)  # under a trace
        return algorithm.init(KEY, EPISODE)

    with pytest.raises(ValueError, match=r"second_order\(\), but the rule's deriv"):
        start(adam, second_order())
    with pytest.raises(ValueError, match=r"second_order\(\), but the rule's deriv"):
        start(rules.only(adam, "Dense_1"), second_order())
    start(adam, first_order())
    start(optax.adam(0.1, eps_root=1e-8), second_order())
    # which read the names of the learner's tensors
    start(rules.only(optax.sgd(0.1), "Dense_1"), second_order())
    gates = rules.lstm_gates(bias_per="tensor", input_bias_of={"Dense_1": (1.0, 1.0)})
    start(rules.chain(optax.clip(1.0), gates), second_order())


def test_an_objective_at_the_end_of_the_trajectory_takes_no_truncation():
    for how in (first_order, second_order):
        with pytest.raises(ValueError, match=r"truncate_every=2: the objective is the"):
            algorithms.maml(NET, differentiation=how(truncate_every=2))


def test_what_make_algorithm_refuses():
    with pytest.raises(ValueError, match=r"needs loss= or meta_gradient="):
        make_algorithm(init=None, predict=None)
    floor = algorithms.nearest_neighbour()
    with pytest.raises(ValueError, match=r"no meta-training loss \(trainable=False\)"):
        floor.loss((), KEY, EPISODE)
    with pytest.raises(ValueError, match=r"how='pmap': choose 'vmap', 'scan' or 'unr"):
        map_tasks(lambda x: x, jnp.ones(2), how="pmap")
