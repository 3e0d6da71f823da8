"""The gates for ordinary training: their equations, safety, and where they run."""

from __future__ import annotations

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference_optimizers as reference
import tiny

from metalstm import pretrained_optimizer, rules

RULE = rules.moment_gates(hidden_size=3)
PARAMS = {
    "kernel": jnp.linspace(-1, 2, 12).reshape(4, 3),
    "bias": jnp.array([0.3, -0.1, 0.2]),
}


def random_weights(seed: int = 0):
    """None of them zero, the gates neither open nor shut."""
    weights = RULE.init(jax.random.key(seed), PARAMS)
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noise = [0.3 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves)]  # noqa: B905
    return jax.tree.unflatten(treedef, [w + e for w, e in zip(leaves, noise)])  # noqa: B905


def gradients(step: int, scale: float = 1.0):
    return jax.tree.map(lambda p: scale * jnp.sin(3 * p + step), PARAMS)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_the_update_is_the_equations_of_the_docstring(num_steps):
    """Against numpy float64, tensor by tensor, over three updates."""
    weights = random_weights()
    tx = rules.with_progress(RULE.bind(weights), num_steps)
    params, state = PARAMS, tx.init(PARAMS)
    numbers = jax.tree.map(lambda w: np.asarray(w, np.float64), weights)
    pair = lambda layer: (layer["kernel"], layer["bias"])  # noqa: E731
    wanted_rule = reference.MomentGates(
        pair(numbers["hidden"]), pair(numbers["output"]), numbers["step"]["kernel"]
    )
    wanted = {name: np.asarray(p, np.float64) for name, p in PARAMS.items()}
    moments = {
        name: reference.Moments(0, (0 * p, 0 * p, 0 * p), 0 * p)
        for name, p in wanted.items()
    }
    update = tiny.quick_jit(tx.update)
    for step in range(3):
        grads = gradients(step)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name in wanted:
            wanted[name], moments[name] = reference.moment_gates_step(
                wanted_rule,
                wanted[name],
                np.asarray(grads[name], np.float64),
                moments[name],
                None if num_steps is None else step / num_steps,
                num_steps,
            )
        tiny.assert_close(params, wanted, rtol=2e-5, atol=1e-6)
    assert tiny.max_difference(params, PARAMS) > 1e-3


def test_the_networks_update_is_the_equation():
    """One update of one tensor against numpy float64: all averages are g then."""
    rule = rules.moment_network(hidden_size=3)
    params = {"w": PARAMS["kernel"]}
    weights = rule.init(jax.random.key(2), params)
    weights["step"]["kernel"] = jnp.linspace(-0.3, 0.3, 16)
    grads = jnp.sin(3 * params["w"])
    tx = rule.bind(weights)
    updates, _ = tx.update({"w": grads}, tx.init(params), params)
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
    g, theta = (np.asarray(x, np.float64) for x in (grads, params["w"]))
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    relative = g / rms(g)
    y = np.stack(
        [*[relative] * 4, *[np.sign(g)] * 4, theta / rms(theta), np.log(abs(relative))]
    )
    hidden = y
    for name in ("hidden", "second"):
        bias = w[name]["bias"][:, None, None]
        hidden = np.maximum(np.tensordot(w[name]["kernel"], hidden, 1) + bias, 0)
    out = 0.1 * np.tensordot(w["output"]["kernel"], hidden, 1)
    direction = out[0] + np.tensordot(w["shortcut"]["kernel"], y, 1)
    move = direction * np.exp(out[1])
    angle = np.mean(g * theta) / rms(g) / rms(theta)
    size = np.log(rms(theta) + 1e-3) / 3 + 1
    shape = [np.log(12) / 3 - 2, np.log(4) / 3 - 1, 1]
    time = [-2, 0, 0, np.log(1.01) / 3, 0]
    z = np.array([0, 0, 0, 0, 1, 1, angle, size, *shape, *time])
    step = np.exp(w["step"]["bias"] + w["step"]["kernel"] @ z)
    np.testing.assert_allclose(updates["w"], -step * move / rms(move), rtol=2e-5)


def test_a_fresh_rule_is_adam_with_tensors_of_one_length():
    """The gates undo u: i m is proportional to m / u while i is far from 1."""
    weights = RULE.init(jax.random.key(0), PARAMS)
    weights["output"]["bias"] = weights["output"]["bias"].at[11].set(-12.0)
    tx = RULE.bind(weights)
    adam = optax.scale_by_adam(b2=0.99, nesterov=False)
    grads = gradients(0)
    ours, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    theirs, _ = adam.update(grads, adam.init(PARAMS))
    for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        cosine = -jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)
        assert cosine > 0.9999


def test_four_floats_a_parameter():
    state = RULE.bind(random_weights()).init(PARAMS)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + 4 * 15


def test_the_scale_of_the_loss_changes_nothing():
    tx = RULE.bind(random_weights())
    update = tiny.quick_jit(tx.update)
    results = []
    for scale in (1e-6, 1.0, 1e6):
        state = tx.init(PARAMS)
        for step in range(2):
            updates, state = update(gradients(step, scale), state, PARAMS)
        results.append(updates)
    tiny.assert_close(results[0], results[1], rtol=1e-3)
    tiny.assert_close(results[2], results[1], rtol=1e-3)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    """1e30 neither: its square is infinite."""
    tx = RULE.bind(random_weights())
    update = tiny.quick_jit(tx.update)
    _, state = update(gradients(0), tx.init(PARAMS), PARAMS)
    broken = gradients(1)
    broken["bias"] = broken["bias"].at[1].set(bad)
    updates, after = update(broken, state, PARAMS)
    tiny.assert_equal(after, state)
    tiny.assert_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    updates, _ = update(gradients(1), after, PARAMS)
    assert np.isfinite(tiny.max_difference(updates, PARAMS))


def test_updates_are_bounded_whatever_the_rule_and_the_gradient():
    """One spike among ten thousand coordinates, and weights far outside training's."""
    weights = jax.tree.map(lambda w: 50 * w, random_weights())
    tx = RULE.bind(weights)
    params = {"w": jnp.ones(10_000)}
    for grads in (jnp.zeros(10_000).at[3].set(1e8), jnp.full(10_000, 1e-20)):
        updates, _ = tx.update({"w": grads}, tx.init(params), params)
        assert np.abs(updates["w"]).max() <= np.exp(-1) * (10 + 1) + 1e-6


def test_zero_gradients_move_nothing_but_by_decay():
    tx = RULE.bind(RULE.init(jax.random.key(0), PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    for update, p in zip(*map(jax.tree.leaves, (updates, PARAMS)), strict=True):
        assert np.all(np.abs(update) <= 1e-4 * np.abs(p))


def test_bfloat16_parameters_have_a_float32_state():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = rules.with_float_copy(RULE.bind(random_weights()))
    updates, state = tx.update(half, tx.init(half), half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    plain = RULE.bind(random_weights())
    updates, _ = plain.update(half, plain.init(half), half)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16"}


def test_multi_steps_average_gradients_and_count_updates():
    weights = random_weights()
    single = rules.with_progress(RULE.bind(weights), 3)
    multi = optax.MultiSteps(rules.with_progress(RULE.bind(weights), 3), 2)
    state, wanted_state = multi.init(PARAMS), single.init(PARAMS)
    for step in range(2):
        a, b = gradients(2 * step), gradients(2 * step + 1)
        nothing, state = multi.update(a, state, PARAMS)
        assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))
        updates, state = multi.update(b, state, PARAMS)
        mean = jax.tree.map(lambda x, y: (x + y) / 2, a, b)
        wanted, wanted_state = single.update(mean, wanted_state, PARAMS)
        tiny.assert_close(updates, wanted, rtol=1e-4)
    assert state.inner_opt_state.step == 2


def test_a_rate_and_decay_of_ones_own_go_around_it():
    """By optax alone; the rate may change from call to call without compiling."""
    weights = random_weights()

    @optax.inject_hyperparams
    def make(rate, decay):
        rule = RULE.bind(weights)
        return optax.chain(rule, optax.add_decayed_weights(-decay), optax.scale(rate))

    tx = make(rate=0.5, decay=0.01)
    plain = RULE.bind(weights)
    state = tx.init(PARAMS)
    alone, _ = plain.update(gradients(0), plain.init(PARAMS), PARAMS)
    for rate in (0.5, 2.0):
        state.hyperparams["rate"] = jnp.float32(rate)
        updates, _ = tx.update(gradients(0), state, PARAMS)
        decayed = jax.tree.map(lambda u, p: u - 0.01 * p, alone, PARAMS)
        wanted = optax.tree.scale(rate, decayed)
        tiny.assert_close(updates, wanted, rtol=1e-5)


def test_progress_is_the_share_of_updates_done():
    seen = []

    def update(updates, state, params=None, *, progress, **extra):
        seen.append(float(progress))
        return updates, state

    probe = optax.GradientTransformationExtraArgs(lambda params: (), update)
    for num_steps in (4, None):
        tx = rules.with_progress(probe, num_steps)
        state = tx.init(PARAMS)
        for _ in range(5):
            _, state = tx.update(PARAMS, state, PARAMS)
    assert seen == [0, 0.25, 0.5, 0.75, 1.0] + [-1.0] * 5
    with pytest.raises(ValueError, match=r"num_steps=0: choose 1 or more or None"):
        rules.with_progress(probe, 0)


def test_the_rule_of_the_package_trains_without_a_rate():
    """Ill-conditioned least squares, 200 updates: to 0.1% of the first loss."""
    x = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.logspace(-1, 0, 8)
    y = x @ jax.random.normal(jax.random.key(1), (8,))

    def loss(w):
        return jnp.mean((x @ w - y) ** 2)

    @functools.partial(jax.jit, static_argnums=0)
    def trained(tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), ()

        start = jnp.zeros(8)
        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=200)
        return loss(w)

    ours = trained(pretrained_optimizer("gates-v1", num_steps=200))
    assert ours < 1e-3 * loss(jnp.zeros(8))
    assert ours < trained(optax.adam(1e-2))


def test_a_saved_rule_is_told_the_length_of_training_in_one_line(tmp_path):
    weights = random_weights()
    spec = {"rule": "moment_gates", "hidden_size": 3}
    rules.save_rule(tmp_path / "mine.npz", spec, weights, info={})
    told = pretrained_optimizer("mine", num_steps=7, directory=tmp_path)
    plain = pretrained_optimizer("mine", directory=tmp_path)
    wanted = rules.with_progress(RULE.bind(weights), 7)
    state = told.init(PARAMS)
    assert state.num_steps == 7
    results = [
        tx.update(gradients(0), tx.init(PARAMS), PARAMS)[0]
        for tx in (told, wanted, plain)
    ]
    tiny.assert_equal(results[0], results[1])
    assert tiny.max_difference(results[0], results[2]) > 1e-6


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match=r"hidden_size=0: choose 1 or more"):
        rules.moment_gates(hidden_size=0)
    tx = RULE.bind(random_weights())
    with pytest.raises(
        ValueError, match=r"the rule needs the parameters: tx.update\(g"
    ):
        tx.update(PARAMS, tx.init(PARAMS))


SHARDED = """
import jax, jax.numpy as jnp, optax
from jax.sharding import NamedSharding, PartitionSpec as P
from metalstm import rules
mesh = jax.make_mesh((2, 2), ("data", "model"))
place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))
w = jnp.linspace(-1, 1, 64).reshape(8, 8)
params = {"both": place(w, "data", "model"), "last": place(w, None, "model"),
          "vector": place(jnp.ones(8), "model")}
rule = getattr(rules, RULE)()
tx = rules.with_progress(rule.bind(rule.init(jax.random.key(0), params)), 9)
tx = optax.chain(tx, optax.add_decayed_weights(-1e-2), optax.scale(0.5))
state = tx.init(params)
grads = jax.tree.map(jnp.sin, params)
step = jax.jit(tx.update, donate_argnums=1)
text = step.lower(grads, state, params).compile().as_text()
assert "all-reduce" in text
for word in ("all-gather", "all-to-all", "collective-permute"):
    assert word not in text, word
host = jax.device_get
alone, _ = tx.update(host(grads), host(state), host(params))
updates, new = step(grads, state, params)
assert all(jax.tree.leaves(jax.tree.map(
    lambda a, b: bool(abs(host(a) - host(b)).max() < 1e-6), updates, alone)))
for name, p in params.items():
    for leaf in (updates[name], new[0].inner.square[name]):
        assert leaf.sharding.is_equivalent_to(p.sharding, p.ndim), name
"""


@pytest.mark.parametrize("rule", ["moment_gates", "moment_lstm"])
def test_sharded_parameters_need_no_gather(rule):
    """Over four devices the tensors' norms are reduced, and nothing else travels."""
    code = "import jax; jax.config.update('jax_num_cpu_devices', 4)\n"
    code += f"RULE = {rule!r}\n{SHARDED}"
    subprocess.run([sys.executable, "-c", code], check=True)
