"""Labels, targets, inputs and metrics that do not fit: refused or said, never used."""

from __future__ import annotations

import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from tiny import episode as tiny_episode
from tiny import tanh_net

import metalstm
from metalstm import algorithms, data, learned_optimizers, rules
from metalstm.algorithms.common import accuracy, task_loss
from metalstm.base import Batch, Episode
from metalstm.batches import check_batch
from metalstm.inputs import ExampleArray
from metalstm.learned_optimizers import problems

X = np.zeros((6, 4), np.float32)
LABELS = np.arange(6) % 3
ONE_HOT = np.eye(3)[LABELS]
REFUSED = {  # y, what the task is (way, None: regression), the message
    "a list": (list(LABELS), 3, "give an array"),
    "booleans": (LABELS == 1, 3, r"bool \[6\]: give integer labels"),
    "bytes": (LABELS.astype("S"), 3, "give integer labels"),
    "complex": (LABELS.astype(complex), 3, "give integer labels"),
    "flat targets": (LABELS.astype(float), None, r"y\[:, None\] of flat ones"),
    "float labels": (LABELS.astype(float), 3, r"y\.astype\(int\) of whole numbers"),
    "integer targets": (LABELS[:, None], None, r"y\.astype\(np\.float32\)\[:, None\]"),
    "integer values": (LABELS, None, "but the task is a regression: give float"),
    "labels [N, 1]": (LABELS[:, None], 3, r"y\[:, 0\] of \[N, 1\]"),
    "labels below 0": (LABELS - 1, 3, r"from -1 to 1: give labels in \[0, 3\)"),
    "labels from 1": (LABELS + 1, 3, r"labels from 1 to 3: give labels in \[0, 3\)"),
    "multi-hot": (ONE_HOT.astype(int), 3, "argmax"),
    "objects": (LABELS.astype(object), 3, "give integer labels"),
    "one-hot": (ONE_HOT, 3, r"y\.argmax\(-1\) of a one-hot coding"),
    "scalar": (np.int32(1), 3, r"int32 \[\] for 6 examples"),
    "strings": (LABELS.astype(str), 3, r"np\.unique\(labels, return_inverse=True\)"),
    "too few": (LABELS[:5], 3, r"int64 \[5\] for 6 examples of support\.x"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_predict_refuses_what_is_no_label_or_target(kind):
    y, way, message = REFUSED[kind]
    one = metalstm.make_algorithm(
        init=None, predict=lambda *args, **kw: 1, trainable=False
    )
    with pytest.raises(ValueError, match=message):
        one.predict((), None, Batch(X, y), X, num_classes=way)


def test_what_fits_is_let_through_whatever_its_integer_or_float_type():
    for dtype in (np.int8, np.uint8, np.int32, np.int64):
        check_batch(Batch(X, LABELS.astype(dtype)), "x", regression=False, way=3)
    for dtype in (jnp.bfloat16, np.float16, np.float64):
        check_batch(Batch(X, ONE_HOT.astype(dtype)), "x", regression=True)
    check_batch(Batch({"a": X, "b": X}, LABELS), "x")
    jax.jit(lambda y: check_batch(Batch(X, y), "x", way=3))(LABELS + 7)  # not known


@dataclasses.dataclass(frozen=True)
class Own:
    """A sampler of one's own."""

    kind: str
    way: int = 3
    regression: bool = False

    def sample(self, key, pool):
        y = {"right": LABELS, "from 1": LABELS + 1, "below 0": LABELS - 1}.get(
            self.kind
        )
        y = jnp.asarray(ONE_HOT if y is None else y)
        part = Batch(jax.random.normal(key, X.shape), y)
        return Episode(part, part)


def train(spec):
    algorithm, optimizer = algorithms.fomaml(tanh_net(), 0.1, num_steps=1), optax.sgd(1)
    episode = Own("right").sample(jax.random.key(0), None)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    return metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=1)(
        state, None
    )


def test_a_sampler_whose_labels_are_no_classes_stops_training_and_evaluation():
    algorithm = algorithms.fomaml(tanh_net(), 0.1, num_steps=1)
    state, metrics = train(Own("right"))
    assert metrics["finite"].all()
    for kind in ("from 1", "below 0"):
        _, metrics = train(Own(kind))
        assert not metrics["finite"].any()
        with pytest.raises(ValueError, match=r"labels are outside \[0, way\), or more"):
            metalstm.evaluate(algorithm, state.params, None, Own(kind), num_episodes=2)
    with pytest.raises(
        ValueError, match=r"query.y|support.y is .*a classification: give"
    ):
        train(Own("one-hot"))


def test_a_loss_does_not_broadcast():
    for outputs, targets in (((6, 1), (6,)), ((6, 1), (6, 2)), ((6, 3), (6, 1))):
        for measure in (task_loss, accuracy):
            with pytest.raises(ValueError, match="flat ones as y"):
                measure(jnp.zeros(outputs), jnp.zeros(targets))
    with pytest.raises(ValueError, match=r"give labels \[N\] for outputs \[N, way\]"):
        task_loss(jnp.zeros((6, 3)), jnp.zeros((6, 1), int))
    grads = jax.grad(task_loss)(jnp.zeros((2, 3)), jnp.array([0, 3]))
    assert not jnp.isfinite(grads).all()
    assert math.isinf(accuracy(jnp.zeros((2, 3)), jnp.array([0, -1])))


def test_supervised_problems_refuse_flat_targets():
    family = problems.supervised(nn.Dense(1), batch_size=8)
    pool = data.ImageData(jnp.ones((9, 3)), jnp.linspace(0, 1, 9))
    key = jax.random.key(0)
    task = family.sample(key, pool)
    with pytest.raises(ValueError, match=r"targets have the shape \(8,\) and outputs"):
        family.loss(family.init(key, task), task, family.batch(key, pool))


def test_a_regression_is_a_mean_squared_error_and_never_percent():
    spec = data.SinusoidSpec(shot=2)
    algorithm = algorithms.fomaml(tanh_net(2, 1, 1), 0.01, num_steps=1)
    params = algorithm.init(jax.random.key(0), spec.sample(jax.random.key(1), None))
    result = metalstm.evaluate(algorithm, params, None, spec, num_episodes=3)
    assert result.regression
    said = f"mean squared error {-result.mean:.4g} ± {result.ci95:.2g} (3 test episodes"
    assert str(result) == f"{said}, no batch norm)"


def test_a_gap_in_the_labels_is_no_class():
    def embed(state, x, **options):
        return x, state

    learner = tanh_net()._replace(apply=embed)
    algorithm = algorithms.prototypical(learner)
    x = jnp.array([[1.0, 1], [1, 1.1], [3, 3], [3, 3.1]])
    near_zero = jnp.array([[0.1, 0.1]] * 2 + [[3.0, 3.0]] * 2)
    losses = [
        algorithm.loss(
            algorithm.init(jax.random.key(0), Episode(Batch(x, y), Batch(x, y))),
            jax.random.key(0),
            Episode(Batch(x, y), Batch(near_zero, y)),
        )[0]
        for y in (jnp.array([0, 0, 1, 1]), jnp.array([0, 0, 3, 3]))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


class TwoParts(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)((nn.Embed(9, 4)(x["ids"]) * x["mask"][..., None]).mean(1))


METHODS = {
    "fomaml": lambda n: algorithms.fomaml(n, 0.1, num_steps=1, query_norm="support+1"),
    "minibatches": lambda n: algorithms.fomaml(n, 0.1, num_steps=2, batch_size=3),
    "nearest_neighbour": lambda n: algorithms.nearest_neighbour(),
    "prototypical": algorithms.prototypical,
}


@pytest.mark.parametrize("name", METHODS)
def test_inputs_may_have_parts_and_there_may_be_no_query(name):
    def part(key):
        ids = jax.random.randint(key, (6, 5), 0, 9)
        return Batch({"ids": ids, "mask": jnp.ones((6, 5))}, jnp.asarray(LABELS))

    algorithm = METHODS[name](metalstm.from_flax(TwoParts()))
    episode = Episode(part(jax.random.key(0)), part(jax.random.key(1)))
    params = algorithm.init(jax.random.key(2), episode)
    if algorithm.trainable:
        loss, _ = algorithm.loss(params, jax.random.key(3), episode)
        assert jnp.isfinite(loss)
    for num in (6, 0):
        query = jax.tree.map(lambda leaf: leaf[:num], episode.query.x)  # noqa: B023
        args = (params, jax.random.key(4), episode.support, query)
        assert algorithm.predict(*args, num_classes=3).shape == (num, 3)


def test_a_supervised_problem_takes_parts():
    family = problems.supervised(TwoParts(), batch_size=2)
    x = {"ids": jnp.ones((6, 5), int), "mask": jnp.ones((6, 5))}
    pool, key = data.ImageData(x, jnp.asarray(LABELS)), jax.random.key(0)
    task = family.sample(key, pool)
    assert jnp.isfinite(
        family.loss(family.init(key, task), task, family.batch(key, pool))
    )


OPTIMIZERS = {
    "polyak": lambda: optax.polyak_sgd(1.0),
    "plateau": lambda: optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "gates": lambda: rules.lstm_gates(hidden_size=1).bind(
        rules.lstm_gates(hidden_size=1).init(jax.random.key(0), {"w": jnp.zeros(2)})
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_meta_optimizer_gets_the_loss(name):
    spec, optimizer = data.SinusoidSpec(shot=2), OPTIMIZERS[name]()
    algorithm = algorithms.fomaml(tanh_net(2, 1, 1), 0.01, num_steps=1)
    episode = spec.sample(jax.random.key(0), None)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    loop = metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=1)
    _, metrics = loop(state, None)
    assert metrics["finite"].all()


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
def test_relative_losses_of_staggered_runs_start_at_one(estimator):
    family = learned_optimizers.ProblemFamily(
        lambda key, pool: jnp.float32(1),
        lambda key, task: {"x": jnp.full(2, 1000.0)},
        lambda key, pool, size=None: (),
        lambda params, task, batch: jnp.square(params["x"]).sum(),
    )
    options = {"loss_transform": "relative", "stagger": True, "estimator": estimator}
    algorithm = learned_optimizers.learned_optimizer(
        family,
        rules.learned_sgd(0.01),
        num_tasks=4,
        unroll_steps=2,
        horizon=8,
        **options,
    )
    draw = learned_optimizers.Draw(jnp.ones(4), {"x": jnp.full((4, 2), 1000.0)}, ())
    one = jax.tree.map(lambda leaf: leaf[0], draw)
    params = algorithm.init(jax.random.key(0), one)
    carry = algorithm.init_carry(jax.random.key(0), params, one)
    gradient = jax.jit(algorithm.meta_gradient)
    for step in range(4):
        keys = jax.random.split(jax.random.key(step), 4)
        _, carry, metrics = gradient(params, carry, keys, draw)
        assert 0.5 < metrics["loss"] < 1.01


def clipped(transform):
    return rules.chain(transform, rules.learned_sgd(0.1))


def test_norm_clipping_is_allowed_in_second_order_where_it_is_safe():
    options = {"num_steps": 1, "differentiation": metalstm.second_order()}

    def start(transform):
        algorithm = algorithms.learned_init(tanh_net(), clipped(transform), **options)
        algorithm.init(jax.random.key(0), tiny_episode())

    safe = (
        optax.clip_by_global_norm(1.0),
        optax.clip(1.0),
        optax.add_noise(1, 0, 0),
        optax.scale_by_trust_ratio(),
    )
    for transform in safe:
        start(transform)
    unsafe = (
        optax.scale_by_adam(),
        optax.scale_by_rms(eps=0.0),
        optax.clip_by_block_rms(1.0),  # a dead layer has the norm zero
        optax.adaptive_grad_clip(0.1),
    )
    for transform in unsafe:
        with pytest.raises(
            ValueError, match=r"clip by optax\.clip or optax\.clip_by_glo"
        ):
            start(transform)


def test_fit_reads_metrics_as_it_goes_and_notices_what_is_not_finite():
    calls = []

    def loop(state, pool):
        calls.append(1)
        bad = len(calls) == 3
        loss = jnp.array([jnp.nan if bad else 1.0])
        metrics = {"loss": loss, "finite": jnp.array([not bad])}
        return state._replace(step=state.step + 1), metrics

    start = metalstm.TrainState(jnp.int32(0), jnp.uint32(0), {}, (), ())
    state = metalstm.init_fit_state(start)
    with pytest.raises(metalstm.NonFiniteLossError, match="at step 3"):
        metalstm.fit(loop, state, None, num_steps=1000, report_every=0)
    assert len(calls) == 64


def test_a_predictor_is_pickled_by_its_folder():
    source = (metalstm.load_run, ("folder", "x"))
    predictor = metalstm.Predictor(
        "x", None, (), None, ExampleArray((1, 1, 1)), source=source
    )
    assert predictor.__reduce__() == source
    with pytest.raises(TypeError, match="a Predictor without a file cannot be pickled"):
        pickle.dumps(dataclasses.replace(predictor, source=None))


@pytest.mark.parametrize("spread", [1.0, 1e-1, 1e-2, 1e-3])
def test_distances_of_embeddings_close_together_do_not_cancel(spread):
    from metalstm.algorithms.metric.distances import squared_distances

    rng = np.random.default_rng(0)
    base = np.abs(rng.normal(size=(1, 256)))
    a, b = ((base + spread * rng.normal(size=(n, 256))).astype("f") for n in (75, 5))
    exact = np.square(a[:, None].astype(float) - b.astype(float)).sum(-1)
    np.testing.assert_allclose(squared_distances(a, b), exact, rtol=1e-5)
    assert (squared_distances(b, b) >= 0).all()


def test_a_predictor_refuses_labels_and_images_of_other_kinds():
    nearest = algorithms.nearest_neighbour()
    predict = metalstm.Predictor(
        "nearest", nearest, (), None, ExampleArray((1, 2, 1)), None
    )
    images = np.arange(8, dtype=np.uint8).reshape(4, 1, 2, 1)
    assert predict(images, ["a", "b", "a", "b"], images).tolist() == list("abab")
    assert predict(images, [1, 2, 1.0, True], images[:0]).shape == (0,)
    for labels in (
        ["a", 1, "b", 2],
        [["a", "b"]] * 4,
        [[1], [2, 3], [4], [5]],
        [None, 1, 2, 3],
        [np.nan, 1, 2, 3],
    ):
        with pytest.raises(ValueError, match="give one number or one string for each"):
            predict(images, labels, images)
    for bad in (images.astype(complex), images.astype(str), images.astype(bool)):
        with pytest.raises(
            ValueError, match=r"images are of type .*: give uint8, or fl"
        ):
            predict(bad, ["a", "b", "a", "b"], images)
