"""Numbers of the first release, in float64, to 1e-9: nothing may move them.

``golden/numbers.npz`` holds inputs and initial meta-parameters, and for each case the
first meta-gradient, the meta-parameters after five meta-steps and the meta-losses.
Write it anew only where a number is to change, and say why in CHANGELOG.md:

    python tests/test_golden.py
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metalstm import (
    algorithms,
    first_order,
    learned_optimizers,
    make_train_step,
    nn,
    rules,
    second_order,
)
from metalstm.base import Batch, Episode
from metalstm.learned_optimizers import problems
from metalstm.learned_optimizers.problems import Draw
from metalstm.meta.step import init_train_state

PATH = Path(__file__).parent / "golden" / "numbers.npz"
WAY, SHOT, QUERIES, DIM = 3, 2, 2, 4
META_STEPS, TASKS = 5, 2
STEPS = {"num_steps": 2}
NET = nn.mlp(WAY, widths=(4,), activation=jnp.tanh)
FEATURES = nn.mlp(None, widths=(4,), activation=jnp.tanh)
GATES = rules.lstm_gates(hidden_size=2, input_bias=(-2.0, -1.0))
TWO_LAYER = rules.two_layer(memory={"hidden_size": 2})
FIRST, SECOND = first_order(), second_order()


def optimizer_case(**options):
    return learned_optimizers.learned_optimizer(
        problems.quadratics(2),
        rules.l2l(hidden_size=2, num_layers=1),
        num_tasks=TASKS,
        unroll_steps=3,
        horizon=6,
        **options,
    )


def case(factory, *args, **options):
    return lambda: factory(*args, **options)


_meta_lstm = functools.partial(
    case, algorithms.published_meta_lstm, NET, GATES, **STEPS
)
_maml = functools.partial(case, algorithms.maml, NET, 0.3, **STEPS)
_two_layer = functools.partial(case, algorithms.learned_init, NET, TWO_LAYER, **STEPS)
CASES = {
    "implicit_maml": case(algorithms.implicit_maml, NET, 0.3, cg_steps=2, **STEPS),
    "learned_optimizer_first": case(optimizer_case, differentiation=FIRST),
    "learned_optimizer_pes": case(optimizer_case, estimator="pes"),
    "learned_optimizer_second": case(optimizer_case, differentiation=SECOND),
    "maml_first": _maml(differentiation=FIRST),
    "maml_second": _maml(differentiation=SECOND),
    "matching": case(algorithms.matching, FEATURES),
    "meta_lstm_first": _meta_lstm(differentiation=FIRST),
    "meta_lstm_second": _meta_lstm(differentiation=SECOND),
    "meta_sgd_second": case(algorithms.meta_sgd, NET, **STEPS),
    "prototypical": case(algorithms.prototypical, FEATURES),
    "reptile": case(algorithms.reptile, NET, 0.01, **STEPS),
    "two_layer_first": _two_layer(differentiation=FIRST),
    "two_layer_second": _two_layer(differentiation=SECOND),
}


def keep_gradient() -> optax.GradientTransformation:
    """Its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )


def make_inputs() -> dict[str, np.ndarray]:
    rng = np.random.RandomState(1)
    episodes = []
    for _ in range(META_STEPS * TASKS):
        centres, one = rng.normal(size=(WAY, DIM)), []
        for n in (SHOT, QUERIES):
            y = rng.permutation(np.repeat(np.arange(WAY), n))
            x = centres[y] + 0.5 * rng.normal(size=(len(y), DIM))
            one += [x, y.astype(np.int32)]
        episodes.append(one)
    arrays = [np.stack(x) for x in zip(*episodes, strict=True)]
    arrays += [rng.normal(size=(META_STEPS * TASKS, *s)) for s in ((2, 2), (2,), (2,))]
    names = ("sx", "sy", "qx", "qy", "w", "y", "theta")
    return {
        name: array.reshape(META_STEPS, TASKS, *array.shape[1:])
        for name, array in zip(names, arrays, strict=True)
    }


def named(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in leaves}


def flat(tree, order) -> np.ndarray:
    """All leaves, in the recorded order."""
    leaves = named(tree)
    return np.concatenate([leaves[path].ravel() for path, _ in order])


def unflat(vector: np.ndarray, order, template):
    """``template`` with the recorded values."""
    parts, start = {}, 0
    for path, shape in order:
        parts[path] = vector[start : start + int(np.prod(shape))].reshape(shape)
        start += parts[path].size
    leaves = [jnp.asarray(parts[path], jnp.float64) for path in named(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def train(name: str, inputs, start=None):
    """The recorded numbers of a case, from ``start`` (vector, order)."""
    algorithm = CASES[name]()
    if name.startswith("learned_optimizer"):
        w, y, theta = (jnp.asarray(inputs[k]) for k in ("w", "y", "theta"))
        tasks = Draw({"w": w, "y": y}, {"theta": theta}, ())
    else:
        sx, sy, qx, qy = (jnp.asarray(inputs[k]) for k in ("sx", "sy", "qx", "qy"))
        tasks = Episode(Batch(sx, sy), Batch(qx, qy))
    outer = optax.sgd(0.5) if name == "reptile" else optax.adam(0.01)
    optimizer = optax.chain(keep_gradient(), outer)
    one = jax.tree.map(lambda x: x[0, 0], tasks)
    state = init_train_state(algorithm, optimizer, 4, one)
    if start is None:
        params = jax.tree.map(lambda x: x.astype(jnp.float64), state.params)
        order = [[path, list(x.shape)] for path, x in named(params).items()]
    else:
        params, order = unflat(*start, state.params), start[1]
    state = state._replace(
        params=params,
        opt_state=optimizer.init(params),
        carry=algorithm.init_carry(jax.random.key(5), params, one),
    )
    state = jax.tree.map(jnp.array, state)
    out = {"init": flat(state.params, order)}
    step, losses = make_train_step(algorithm, optimizer), []
    for k in range(META_STEPS):
        state, metrics = step(state, jax.tree.map(lambda x: x[k], tasks))  # noqa: B023
        losses.append(float(metrics["loss"]))
        if k == 0:
            out["grad"] = flat(state.opt_state[0], order)
    return out | {"final": flat(state.params, order), "loss": np.array(losses)}, order


@functools.cache
def recorded() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(PATH, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    return arrays, json.loads(arrays.pop("index").item())


@pytest.mark.parametrize("name", CASES)
def test_no_number_has_moved(name):
    arrays, orders = recorded()
    inputs = {k: arrays[f"input/{k}"] for k in make_inputs()}
    with jax.enable_x64(True):
        new, _ = train(name, inputs, (arrays[f"{name}/init"], orders[name]))
    for what, values in new.items():
        expected = arrays[f"{name}/{what}"]
        error = np.abs(values - expected).max() / np.abs(expected).max()
        assert error < 1e-9, (what, error)
    assert np.abs(new["final"] - new["init"]).max() > 1e-3


def write() -> None:
    inputs = make_inputs()
    arrays, orders = {f"input/{k}": v for k, v in inputs.items()}, {}
    with jax.enable_x64(True):
        for name in CASES:
            numbers, orders[name] = train(name, inputs)
            arrays |= {f"{name}/{what}": v for what, v in numbers.items()}
    np.savez_compressed(PATH, index=np.array(json.dumps(orders)), **arrays)


if __name__ == "__main__":
    write()
