"""The fallback, and the export to plain Python."""

from __future__ import annotations

import importlib.util
import operator
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import metalstm
from metalstm import rules
from metalstm.learned_optimizers import (
    ProblemFamily,
    ProblemSampler,
    learned_optimizer,
)

PARAMS = {"w": jnp.linspace(-1, 2, 12).reshape(4, 3), "b": jnp.array([0.3, -0.1, 0.2])}
SPEC = {"rule": "moment_gates", "hidden_size": 3}


def loss_fn(params, batch=None):
    inputs = jnp.linspace(-1, 1, 20).reshape(5, 4) if batch is None else batch
    return jnp.square(inputs @ params["w"] + params["b"] - inputs[:, :1]).mean()


def random_weights(seed: int = 0):
    rule = rules.build_rule(SPEC)
    weights = rule.init(jax.random.key(seed), PARAMS)
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.3 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves)]  # noqa: B905
    return jax.tree.unflatten(treedef, [w + e for w, e in zip(leaves, noise)])  # noqa: B905


# -- fallback --------------------------------------------------------------------------


def train(tx, num_steps: int, loss=loss_fn):
    params, state, losses = PARAMS, tx.init(PARAMS), []

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state, value

    for _ in range(num_steps):
        params, state, value = step(params, state)
        losses.append(float(value))
    return params, state, losses


def test_a_rule_that_makes_the_loss_rise_gives_way_to_adamw():
    wrong = optax.sgd(-0.1)  # uphill
    _, state, losses = train(rules.with_fallback(wrong, optax.adamw(0.1)), 60)
    assert max(losses) < 100
    assert losses[-1] < losses[0]
    assert state.trust < 0.1
    _, _, alone = train(optax.with_extra_args_support(wrong), 120)
    assert not alone[-1] < 1e6


def test_a_rule_whose_loss_falls_is_left_alone():
    right = optax.sgd(0.3, momentum=0.9)
    params, state, _ = train(rules.with_fallback(right), 60)
    wanted, _, _ = train(optax.with_extra_args_support(right), 60)
    tiny.assert_close(params, wanted, rtol=1e-6)
    assert state.trust == 1


def trust_over(values):
    tx = rules.with_fallback(optax.sgd(0.1))

    def step(state, value):
        _, state = tx.update(PARAMS, state, PARAMS, value=value)
        return state, state.trust

    return jax.lax.scan(step, tx.init(PARAMS), values)[1]


def test_noise_alone_costs_no_trust():
    """400 losses of one distribution: four of its standard deviations are rare."""
    values = 1 + 0.3 * jax.random.normal(jax.random.key(0), (400,))
    assert trust_over(values)[50:].mean() > 0.95


def test_a_slow_divergence_does_not_make_itself_usual():
    """1,000 noisy losses of one level; then they double every 1,000."""
    noise = jnp.exp(0.3 * jax.random.normal(jax.random.key(0), (6_000,)))
    values = noise * 2 ** (jnp.maximum(jnp.arange(6_000) - 1_000, 0) / 1_000)
    trust = trust_over(values)
    assert trust[50:1_000].mean() > 0.95
    assert trust[-500:].max() < 0.01


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_moves_nothing_and_reaches_no_state(where):
    tx = rules.with_fallback(optax.adam(0.1))
    grads = jax.grad(loss_fn)(PARAMS)
    _, before = tx.update(grads, tx.init(PARAMS), PARAMS, value=1.0)
    bad = grads | {"b": grads["b"].at[1].set(jnp.nan)} if where == "gradient" else grads
    value = jnp.inf if where == "loss" else 1.0
    updates, after = tx.update(bad, before, PARAMS, value=value)
    tiny.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert after.trust == before.trust / 2
    tiny.assert_equal(after._replace(trust=0), before._replace(trust=0))


def test_an_update_of_the_rule_that_is_not_finite_is_the_others():
    broken = optax.stateless(lambda g, params: jax.tree.map(lambda x: x / 0, g))
    tx, other = rules.with_fallback(broken), optax.adamw(1e-3)
    grads = jax.grad(loss_fn)(PARAMS)
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, value=1.0)
    wanted, _ = other.update(grads, other.init(PARAMS), PARAMS)
    tiny.assert_close(updates, wanted, rtol=1e-6)


def test_an_update_of_the_other_that_is_not_finite_does_not_reach_the_rules():
    broken = optax.stateless(lambda g, params: jax.tree.map(lambda x: x / 0, g))
    tx, rule = rules.with_fallback(optax.sgd(0.1), broken), optax.sgd(0.1)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=1.0)
    tiny.assert_equal(updates, rule.update(PARAMS, rule.init(PARAMS))[0])


def test_the_fallback_is_one_word_and_asks_for_the_loss():
    tx = metalstm.pretrained_optimizer("l2l-mnist", fallback=True)
    with pytest.raises(ValueError, match=r"the fallback reads the loss: tx\.update\("):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match=r"value= has the shape \[3\]: give .* scalar"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=jnp.ones(3))
    _, _, losses = train(tx, 5)
    assert np.isfinite(losses).all()


# -- export ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The weights, and the module that was written of them."""
    folder = tmp_path_factory.mktemp("export")
    weights = random_weights()
    rules.save_rule(folder / "mine.npz", SPEC, weights, info={"trained_on": "nothing"})
    path = rules.export_numpy(rules.load_rule(folder / "mine.npz"), folder / "mine.py")
    assert len(path.read_text().splitlines()) < 160
    assert "jax" not in path.read_text().replace("no JAX", "")
    return weights, imported(path)


def imported(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twenty_updates(weights, num_steps):
    """The library's parameters after each update, and the gradients it had."""
    tx = rules.with_progress(rules.build_rule(SPEC).bind(weights), num_steps)
    params, state, trail = PARAMS, tx.init(PARAMS), []
    update = tiny.quick_jit(tx.update)
    for _ in range(20):
        grads = jax.grad(loss_fn)(params)
        updates, state = update(grads, state, params)
        trail.append((params, grads, updates))
        params = optax.apply_updates(params, updates)
    return trail


class Tensor:
    """What torch's tensors and numpy's arrays have in common."""

    __module__ = "tensors"

    def __init__(self, array):
        self.array = np.asarray(array)
        self.shape, self.ndim = self.array.shape, self.array.ndim
        self.dtype = self.array.dtype

    def sum(self):
        return self.array.sum()

    def __array__(self, dtype=None, copy=None):
        return self.array


def _on_arrays(fn):
    bare = lambda x: x.array if isinstance(x, Tensor) else x  # noqa: E731
    return lambda *args: Tensor(fn(*map(bare, args)))


for _name in "abs add mul neg radd rmul rsub sub truediv".split():
    setattr(Tensor, f"__{_name}__", _on_arrays(lambda *xs, n=_name: _operator(n)(*xs)))


def _operator(name):
    if name.startswith("r"):
        return lambda a, b: getattr(operator, name[1:])(b, a)
    return getattr(operator, name)


@pytest.mark.parametrize("make", [np.asarray, Tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize("num_steps", [None, 20])
def test_the_exported_file_makes_the_same_updates(
    exported, make, num_steps, monkeypatch
):
    functions = {n: _on_arrays(getattr(np, n)) for n in ("clip", "log", "sqrt", "tanh")}
    monkeypatch.setitem(sys.modules, "tensors", types.SimpleNamespace(**functions))
    weights, module = exported
    lists = lambda tree: [make(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)]  # noqa: E731
    state = module.init(lists(PARAMS))
    for step, (params, grads, wanted) in enumerate(twenty_updates(weights, num_steps)):
        progress = None if num_steps is None else step / num_steps
        updates, state = module.update(
            lists(grads), state, lists(params), progress, num_steps
        )
        for a, b in zip(updates, jax.tree.leaves(wanted), strict=True):
            scale = np.abs(b).max()
            np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=1e-5 * scale)


def test_the_exported_file_ignores_gradients_that_are_not_finite(exported):
    _, module = exported
    params = [np.ones(3, np.float32)]
    state = module.init(params)
    updates, after = module.update([np.array([1.0, np.nan, 0.0])], state, params)
    assert after is state
    np.testing.assert_array_equal(updates[0], 0)


def test_the_exported_file_holds_its_progress_past_the_end(exported):
    _, module = exported
    ones = [np.ones(3, np.float32)]
    at_end, past = (
        module.update(ones, module.init(ones), ones, done, 20)[0] for done in (1.0, 1.5)
    )
    np.testing.assert_array_equal(at_end, past)


def test_the_exported_file_computes_half_precision_in_float32(exported):
    """Of 6,000 tens the sum of squares is no float16, of thousandths no square."""
    _, module = exported
    wide = np.linspace(1, 2, 6_000, dtype=np.float32).reshape(300, 20)
    for scale in (1e-3, 10):
        half = [np.asarray(wide, np.float16)], [np.asarray(scale * wide, np.float16)]
        full = [x[0].astype(np.float32) for x in half]
        (found,), _ = module.update(half[1], module.init(half[0]), half[0])
        (wanted,), _ = module.update(full[1:], module.init(full[:1]), full[:1])
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "text", ['my """best""" data', "C:\\Users\\N{x}", '"""\nraise SystemExit\n"""', "é"]
)
def test_what_an_exported_file_says_of_itself_is_no_code(tmp_path, text):
    path = rules.save_rule(
        tmp_path / "mine.npz", SPEC, random_weights(), info={"trained_on": text}
    )
    path = rules.export_numpy(rules.load_rule(path), tmp_path / "mine.py")
    module = imported(path)
    assert text == module.TRAINED_ON


def test_only_moment_gates_are_exported(tmp_path):
    for spec in ({"rule": "moment_lstm"}, SPEC | {"orthogonal": True}):
        saved = rules.SavedRule(None, {}, spec, {})
        with pytest.raises(ValueError, match=r"spec=\{.*\}: only moment_gates can be"):
            rules.export_numpy(saved, tmp_path / "x.py")


@pytest.mark.parametrize("estimator", ["backprop", "pes"])
@pytest.mark.parametrize("task_mapping", [None, "vmap"])
def test_a_problem_without_one_finite_loss_is_told_in_every_layout(
    estimator, task_mapping
):
    family = ProblemFamily(
        sample=lambda key, data: (),
        init=lambda key, task: jnp.ones(3),
        batch=lambda key, data, size=None: jax.random.normal(key, (4,)),
        loss=lambda params, task, batch: jnp.nan * params.sum(),
    )
    algorithm = learned_optimizer(
        family,
        rules.l2l(hidden_size=4),
        num_tasks=2,
        unroll_steps=3,
        horizon=6,
        estimator=estimator,
        task_mapping=task_mapping,
    )
    sampler, pool, optimizer = ProblemSampler(family, 4), jnp.zeros(1), optax.adam(1e-3)
    episode = sampler.sample(jax.random.key(0), pool)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    train = metalstm.make_train_loop(algorithm, optimizer, sampler, num_tasks=2)
    _, metrics = train(state, pool)
    assert np.isnan(metrics["loss"]).all()
