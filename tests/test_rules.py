"""Every rule through one contract, and what each promises by itself."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from metalstm import rules
from metalstm.base import UpdateRule
from metalstm.rules.flat import flatten

PARAMS = {
    "layer": {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.zeros(3)},
    "scale": jnp.float32(0.5),  # a scalar leaf
    "half": jnp.linspace(-2, 2, 4, dtype=jnp.bfloat16),
}
GRADS = jax.tree.map(lambda p: (jnp.cos(3 * p) + 0.1).astype(p.dtype), PARAMS)
LOSS = jnp.float32(1.3)

# Adam's own square root has no derivative at g = 0
SMOOTH_ADAM = functools.partial(optax.adam, eps_root=1e-8)
RULES: dict[str, UpdateRule] = {
    "gates": rules.lstm_gates(hidden_size=2),
    "gates_paper": rules.lstm_gates(variant="paper"),
    "gates_ablated": rules.lstm_gates(
        hidden_size=2, loss_input=False, theta_input=False, carry_input=False
    ),
    "gates_f_one": rules.lstm_gates(hidden_size=0, forget="one"),
    "gates_per_step": rules.lstm_gates(
        hidden_size=0, bias_per="tensor_and_step", num_bias_steps=2
    ),
    "l2l": rules.l2l(hidden_size=2),
    "l2l_raw": rules.l2l(hidden_size=3, num_layers=1, features="raw", output_scale=1.0),
    "l2l_moments": rules.l2l(hidden_size=2, features="moments", shortcut=0.2),
    "memory": rules.gradient_memory(hidden_size=2),
    "moment_gates": rules.moment_gates(hidden_size=2),
    "moment_lstm": rules.moment_lstm(hidden_size=2),
    "moment_network": rules.moment_network(hidden_size=2),
    "moment_orthogonal": rules.moment_gates(hidden_size=2, orthogonal=True),
    "two_layer": rules.two_layer(memory={"hidden_size": 2}),
    "by_group": rules.by_group(
        {"matrix": rules.l2l(hidden_size=2), "vector": rules.gradient_memory()},
        rules.matrix_or_vector,
    ),
    "sgd_rule": rules.learned_sgd(0.1),
    "sgd_tensor": rules.learned_sgd(0.1, per="tensor", num_steps=2),
    "sgd_parameter": rules.learned_sgd((0.05, 0.2), per="parameter"),
    "scale": rules.chain(rules.learned_scale(0.3), optax.sgd(1.0)),
    "tunable": rules.tunable(SMOOTH_ADAM, learning_rate=0.1, b1=0.8),
    "as_rule": rules.as_rule(optax.sgd(0.1, momentum=0.9)),
    "chain": rules.chain(optax.clip_by_global_norm(1.0), rules.learned_sgd(0.1)),
}
PER_TENSOR = {"gates_per_step", "sgd_tensor", "sgd_parameter"}
BLIND = {"by_group", "gates_ablated", "l2l", "l2l_raw", "l2l_moments", "memory"}
BLIND |= {"moment_gates", "moment_lstm", "moment_network", "moment_orthogonal"}
BLIND |= {"sgd_rule", "sgd_tensor", "sgd_parameter"}


class Bound(NamedTuple):
    weights: object
    tx: optax.GradientTransformationExtraArgs
    state: object


@functools.cache
def bound(name: str) -> Bound:
    weights = RULES[name].init(jax.random.key(0), PARAMS)
    tx = RULES[name].bind(weights)
    return Bound(weights, tx, tx.init(PARAMS))


@functools.cache
def compiled(name: str):
    """(weights, grads, state, params) -> updates and state: one program a rule."""
    return tiny.quick_jit(functools.partial(apply_rule, name))


def apply_rule(name, weights, grads, state, params):
    return RULES[name].bind(weights).update(grads, state, params, value=LOSS)


def shapes(tree):
    return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), tree)


def negative(tree):
    return jax.tree.map(lambda leaf: -leaf, tree)


@pytest.fixture(params=RULES)
def name(request) -> str:
    return request.param


def test_state_is_a_scan_carry_of_float32_and_updates_look_like_gradients(name):
    rule = bound(name)
    updates, state = compiled(name)(rule.weights, GRADS, rule.state, PARAMS)
    assert shapes(updates) == shapes(GRADS)
    assert shapes(state) == shapes(rule.state)
    if name not in ("tunable", "as_rule"):  # optax keeps moments in the leaf's type
        assert not any(
            leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(rule.state)
        )
    for leaf in jax.tree.leaves(updates):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))
        assert np.any(np.asarray(leaf, np.float32) != 0)


def test_parameters_and_state_share_no_array_so_that_both_can_be_donated(name):
    tx = rules.with_fallback(rules.with_progress(bound(name).tx, 9))
    tx = rules.with_float_copy(tx)
    leaves = [x for x in jax.tree.leaves((PARAMS, tx.init(PARAMS))) if x.size]
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)


def test_one_program_serves_every_step_and_every_rule_parameter(name):
    rule, update = bound(name), compiled(name)
    update.clear_cache()
    weights, state = rule.weights, rule.state
    for _ in range(3):
        _, state = update(weights, GRADS, state, PARAMS)
        weights = jax.tree.map(lambda leaf: leaf * 1.1, weights)
    assert update._cache_size() == 1


OWN = ("gates", "l2l", "memory", "two_layer")
OWN += ("moment_gates", "moment_lstm", "moment_network")


@pytest.mark.parametrize("name", OWN)
def test_types_are_the_parameters_where_gradients_are_less_precise(name):
    def types(of_params, of_grads, in_state=False):
        params = {"w": jnp.ones((2, 3), of_params), "b": jnp.ones(2)}
        tx = RULES[name].bind(RULES[name].init(jax.random.key(0), params))
        grads = jax.tree.map(lambda p: p.astype(of_grads), params)
        update = lambda *args: tx.update(*args, value=jnp.ones(()))  # noqa: E731
        state = tx.init(params)
        updates, after = jax.eval_shape(update, grads, state, params)
        if in_state:  # it must be a scan's carry
            assert shapes(after) == shapes(state)
        return {leaf.dtype.name for leaf in jax.tree.leaves(updates)}

    assert types("float32", "bfloat16", in_state=True) == {"float32"}
    assert types("float32", "float16", in_state=True) == {"float32"}
    with jax.enable_x64(True):
        moments = name.startswith("moment_")
        assert types("float64", "float32", in_state=moments) == {"float64"}


def test_jit_is_eager(name):
    rule = bound(name)
    eager = rule.tx.update(GRADS, rule.state, PARAMS, value=LOSS)
    jitted = compiled(name)(rule.weights, GRADS, rule.state, PARAMS)
    as_float = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    tiny.assert_close(as_float(jitted), as_float(eager), rtol=1e-2, atol=1e-6)
    full = lambda tree: {k: v for k, v in tree.items() if k != "half"}  # noqa: E731
    tiny.assert_close(full(jitted[0]), full(eager[0]), rtol=1e-5, atol=1e-7)


def test_vmap_over_tasks_is_a_loop(name):
    """Shared rule parameters; each task its own gradient, parameters and state."""
    rule = bound(name)
    stack = lambda a, b: jax.tree.map(lambda *x: jnp.stack(x), a, b)  # noqa: E731
    update = functools.partial(compiled(name), rule.weights)
    other = negative(GRADS), rule.state, jax.tree.map(lambda p: p / 2, PARAMS)
    mapped = jax.vmap(update)(*map(stack, (GRADS, rule.state, PARAMS), other))
    looped = stack(update(GRADS, rule.state, PARAMS), update(*other))
    as_float = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    tiny.assert_close(as_float(mapped), as_float(looped), rtol=1e-2, atol=1e-6)


def test_unknown_keywords_are_swallowed(name):
    rule = bound(name)
    plain = rule.tx.update(GRADS, rule.state, PARAMS, value=LOSS)
    extra = rule.tx.update(
        GRADS, rule.state, PARAMS, value=LOSS, grad=GRADS, value_fn=None, hessian=1
    )
    tiny.assert_equal(extra, plain)


def test_chains_with_clipping_decay_and_schedules(name):
    """In optax's own chain, which hands `value` on to the rule."""
    rule = bound(name)
    chained = optax.chain(
        optax.clip_by_global_norm(0.5),
        rule.tx,
        optax.add_decayed_weights(0.1),
        optax.scale_by_schedule(lambda count: 1.0 / (1 + count)),
    )
    updates, state = chained.update(
        GRADS, chained.init(PARAMS), PARAMS, value=LOSS, unknown=0
    )
    clipped, _ = optax.clip_by_global_norm(0.5).update(GRADS, optax.EmptyState())
    inner, _ = rule.tx.update(clipped, rule.state, PARAMS, value=LOSS)
    expected = jax.tree.map(lambda u, p: u + 0.1 * p, inner, PARAMS)
    tiny.assert_close(updates["layer"], expected["layer"])
    again, _ = chained.update(GRADS, state, PARAMS, value=LOSS)
    assert shapes(again) == shapes(updates)


@pytest.mark.parametrize("how", ["masked", "multi_transform"])
def test_masked_leaves_are_left_alone(name, how):
    """`masked` leaves the other leaves' gradients, `multi_transform` zeroes them."""
    chosen = {"layer": {"w": True, "b": False}, "scale": True, "half": False}
    if name in PER_TENSOR:  # one weight a tensor that it sees
        part = {"layer": {"w": PARAMS["layer"]["w"]}, "scale": PARAMS["scale"]}
        weights = RULES[name].init(jax.random.key(0), part)
    else:
        weights = bound(name).weights
    tx = RULES[name].bind(weights)
    if how == "masked":
        outer = optax.with_extra_args_support(optax.masked(tx, chosen))
    else:
        labels = jax.tree.map(lambda use: "rule" if use else "frozen", chosen)
        outer = optax.multi_transform(
            {"rule": tx, "frozen": optax.set_to_zero()}, labels
        )
    updates, state = outer.update(GRADS, outer.init(PARAMS), PARAMS, value=LOSS)
    left = GRADS if how == "masked" else jax.tree.map(jnp.zeros_like, GRADS)
    tiny.assert_equal(updates["layer"]["b"], left["layer"]["b"])
    assert np.all(np.asarray(updates["layer"]["w"] != GRADS["layer"]["w"]))
    outer.update(GRADS, state, PARAMS, value=LOSS)


def test_the_derivative_at_zero_gradient_is_finite(name):
    """Dead ReLUs give whole tensors of g = 0; second order differentiates there."""
    rule = bound(name)
    dead = {**GRADS, "layer": jax.tree.map(jnp.zeros_like, GRADS["layer"])}

    def total(weights, grads, params):
        updates, _ = apply_rule(name, weights, grads, rule.state, params)
        return sum(u.astype(jnp.float32).sum() for u in jax.tree.leaves(updates))

    gradients = tiny.quick_jit(jax.grad(total, (0, 1, 2)))(rule.weights, dead, PARAMS)
    for leaf in jax.tree.leaves(gradients):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


def test_features_that_are_not_stopped_have_a_finite_derivative_at_zero():
    rule = rules.lstm_gates(hidden_size=0, feature_gradient="full", forget="one")
    weights = rule.init(jax.random.key(0), jnp.zeros(2))
    tx = rule.bind(weights)

    def total(g):
        return tx.update(g, tx.init(g), jnp.ones(2), value=LOSS)[0].sum()

    assert np.all(np.isfinite(tiny.quick_jit(jax.grad(total))(jnp.zeros(2))))


# -- what each rule is -----------------------------------------------------------------


def test_log_sign_is_the_papers_feature_with_a_finite_derivative_everywhere():
    x = jnp.array([0.0, 1e-30, -1e-5, np.exp(-10) * 1.01, 1.0, -20.0])
    magnitude, sign = rules.log_sign(x)
    seam = np.exp(10.0)
    np.testing.assert_allclose(
        magnitude, [-1, -1, -1, -0.999005, 0, np.log(20) / 10], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(sign, [0, 0, -1e-5 * seam, 1, 1, -1], 1e-5, 1e-20)
    jacobian = jax.jacfwd(lambda v: jnp.stack(rules.log_sign(v)))
    slopes = tiny.quick_jit(jax.vmap(jacobian))(x)
    assert np.all(np.isfinite(slopes))
    np.testing.assert_allclose(slopes[0], [0, seam], rtol=1e-5)
    np.testing.assert_allclose(
        rules.log_sign(jnp.float32(0.1), p=5)[0], np.log(0.1) / 5
    )


def test_no_gates_is_sgd_to_the_last_bit_or_nearly():
    """f = 1 and a constant i reproduce `optax.sgd` over twenty steps."""
    rule = rules.lstm_gates(forget="one", input="constant")
    weights = rule.init(jax.random.key(0), jnp.zeros(64))
    assert jax.tree.structure(weights) == jax.tree.structure({"input": {"bias": 0}})
    rate = 0.3
    weights = {"input": {"bias": jnp.float32(np.log(rate / (1 - rate)))}}
    target = jnp.linspace(-3, 3, 64)

    def descend(tx):
        def step(carry, _):
            theta, state = carry
            loss, g = jax.value_and_grad(lambda t: jnp.sum(jnp.cosh(t - target) / 9))(
                theta
            )
            updates, state = tx.update(g, state, theta, value=loss)
            return (optax.apply_updates(theta, updates), state), None

        start = jnp.ones(64)
        return jax.lax.scan(step, (start, tx.init(start)), length=20)[0][0]

    ours = descend(rule.bind(weights))
    theirs = descend(optax.with_extra_args_support(optax.sgd(rate)))
    np.testing.assert_array_almost_equal_nulp(np.asarray(ours), np.asarray(theirs), 8)
    assert np.max(np.abs(theirs - 1)) > 0.5


def test_the_gates_update_is_the_equation():
    """theta_t = f theta_{t-1} + i (-g), with the gates' own f and i."""
    rule = bound("gates")
    updates, state = compiled("gates")(rule.weights, GRADS, rule.state, PARAMS)
    gates = rules.find_gates(state)
    theta, g = (flatten(tree) for tree in (PARAMS, GRADS))
    moved = rules.gate_update(theta, g, gates["forget"], gates["input"])
    expected = gates["forget"] * theta - gates["input"] * g
    np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6)
    # half-precision leaves round
    np.testing.assert_allclose(flatten(updates), moved - theta, rtol=2e-2, atol=1e-3)


def test_a_forget_gate_near_one_keeps_its_digits():
    """1 - f = 2e-9 is below float32's resolution at 1; theta still shrinks by it."""
    rule = rules.lstm_gates(hidden_size=0, input="constant")
    weights = rule.init(jax.random.key(0), jnp.zeros(1))
    weights = jax.tree.map(jnp.zeros_like, weights)
    weights["forget"]["bias"] = jnp.float32(20.0)
    tx = rule.bind(weights)
    theta = jnp.array([3.0])
    updates, _ = tx.update(jnp.zeros(1), tx.init(theta), theta, value=LOSS)
    np.testing.assert_allclose(updates, -3 / (1 + np.exp(20.0)), rtol=1e-5)


def test_an_input_gate_near_zero_keeps_its_digits():
    """A rule may learn steps far below the published 0.01."""
    for logit in (-5.0, -12.0, -20.0):
        rule = rules.lstm_gates(forget="one", input="constant")
        tx = rule.bind({"input": {"bias": jnp.float32(logit)}})
        updates, _ = tx.update(
            jnp.ones(1), tx.init(jnp.ones(1)), jnp.ones(1), value=1.0
        )
        np.testing.assert_allclose(-updates, 1 / (1 + np.exp(-logit)), rtol=1e-5)


def test_ablations_read_only_what_they_say():
    def update(rule, loss=1.0, theta=1.0, steps=2):
        params = jnp.full(3, theta)
        weights = rule.init(jax.random.key(0), params)
        weights = jax.tree.map(lambda leaf: leaf * 30, weights)
        weights["input"]["bias"] = jnp.float32(0)
        tx = rule.bind(weights)
        state = tx.init(params)
        for k in range(steps):
            g = jnp.array([0.1, -2.0, 0.5]) * (1 + k)
            updates, state = tx.update(g, state, params, value=loss)
        return np.asarray(updates)

    make = functools.partial(rules.lstm_gates, hidden_size=2, forget="one")
    reads_all, no_loss, no_theta = (
        make(),
        make(loss_input=False),
        make(theta_input=False),
    )
    assert np.any(update(reads_all, loss=9.0) != update(reads_all))
    assert np.any(update(reads_all, theta=5.0) != update(reads_all))
    np.testing.assert_array_equal(update(no_loss, loss=9.0), update(no_loss))
    np.testing.assert_array_equal(update(no_theta, theta=5.0), update(no_theta))
    weights = make(carry_input=False).init(jax.random.key(0), jnp.zeros(3))
    assert "carry" not in weights["input"]
    assert "carry" in make().init(jax.random.key(0), jnp.zeros(3))["input"]


def test_a_bias_for_each_tensor_and_step():
    params = {"a": jnp.ones(2), "b": jnp.ones((1, 3))}
    rule = rules.lstm_gates(
        hidden_size=0,
        forget="one",
        input="constant",
        bias_per="tensor_and_step",
        num_bias_steps=2,
    )
    assert not rule.traits.coordinatewise
    weights = rule.init(jax.random.key(0), params)
    assert weights["input"]["bias"].shape == (2, 2)
    logits = np.array([[0.0, -1.0], [-2.0, -3.0]])
    tx = rule.bind({"input": {"bias": jnp.asarray(logits, jnp.float32)}})
    state = tx.init(params)
    for step in range(3):  # the third update uses the last row again
        updates, state = tx.update(params, state, params, value=LOSS)
        rates = 1 / (1 + np.exp(-logits[min(step, 1)]))
        np.testing.assert_allclose(updates["a"], np.full(2, -rates[0]), rtol=1e-6)
        np.testing.assert_allclose(updates["b"], np.full((1, 3), -rates[1]), rtol=1e-6)
    per_tensor = rules.lstm_gates(bias_per="tensor", num_bias_steps=5)
    assert per_tensor.init(jax.random.key(0), params)["input"]["bias"].shape == (1, 2)


def test_gates_are_found_in_a_chain():
    rule = bound("gates")
    chained = optax.chain(optax.clip_by_global_norm(1.0), rule.tx)
    _, state = chained.update(GRADS, chained.init(PARAMS), PARAMS, value=LOSS)
    gates = rules.find_gates(state)
    assert gates["forget"].shape == gates["input"].shape == (14,)
    assert 0.9 < gates["forget"].min() < gates["forget"].max() < 1  # U(4, 5)
    assert 0 < gates["input"].min() < gates["input"].max() < 0.03
    assert rules.find_gates(optax.adam(1.0).init(PARAMS)) == {}
    one = bound("gates_f_one")
    np.testing.assert_array_equal(rules.find_gates(one.state)["forget"], 1)


def test_learned_rates_by_rule_tensor_parameter_and_step():
    params = {"a": jnp.ones(2), "b": jnp.ones(())}

    def updates(rates, count=0, **options):
        tx = rules.learned_sgd(**options).bind(rates)
        state = tx.init(params)
        for _ in range(count + 1):
            out, state = tx.update(jax.tree.map(lambda p: 2 * p, params), state)
        return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), out)

    assert updates(jnp.float32(0.5)) == {"a": [-1, -1], "b": -1}
    rates = {"a": jnp.float32(0.5), "b": jnp.float32(1)}
    assert updates(rates, per="tensor") == {"a": [-1, -1], "b": -2}
    rates = {"a": jnp.array([0.5, 1]), "b": jnp.float32(1.5)}
    assert updates(rates, per="parameter") == {"a": [-1, -2], "b": -3}
    rates = jnp.array([0.5, 1.0])
    options = {"num_steps": 2}
    assert [updates(rates, k, **options)["b"] for k in range(3)] == [-1, -2, -2]


@pytest.mark.parametrize("per", ["rule", "tensor", "parameter"])
def test_learned_rates_start_in_their_range(per):
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(())}
    leaves = {"rule": [()], "tensor": [(), ()], "parameter": [(2, 3), ()]}[per]
    rates = rules.learned_sgd((0.1, 0.2), per=per, num_steps=4).init(
        jax.random.key(0), params
    )
    assert [leaf.shape for leaf in jax.tree.leaves(rates)] == [(4, *s) for s in leaves]
    assert all(np.all((leaf >= 0.1) & (leaf < 0.2)) for leaf in jax.tree.leaves(rates))
    fixed = rules.learned_sgd(0.3, per=per).init(jax.random.key(0), params)
    assert all(np.all(leaf == np.float32(0.3)) for leaf in jax.tree.leaves(fixed))


def test_tunable_rules_are_their_optax_transform():
    rule = RULES["tunable"]
    assert rule.init(jax.random.key(0), PARAMS) == {"learning_rate": 0.1, "b1": 0.8}
    ours = rule.bind({"learning_rate": 0.2, "b1": 0.5})
    theirs = SMOOTH_ADAM(0.2, b1=0.5)
    state = theirs.init(PARAMS)
    updates, _ = ours.update(GRADS, state, PARAMS)
    tiny.assert_equal(updates, theirs.update(GRADS, state, PARAMS)[0])


def test_a_chain_is_coordinatewise_only_when_all_of_it_is():
    gates, sgd = RULES["gates"], RULES["sgd_rule"]
    assert rules.chain(gates, sgd).traits.coordinatewise
    clipped = rules.chain(optax.clip_by_global_norm(1.0), gates)
    assert not clipped.traits.coordinatewise
    assert not rules.chain(gates, RULES["sgd_parameter"]).traits.coordinatewise
    assert not RULES["as_rule"].traits.coordinatewise
    scale = rules.as_rule(optax.scale(-0.1), sgd.traits)  # as its user promises
    assert rules.chain(gates, scale).traits.coordinatewise
    weights = rules.chain(sgd, optax.scale(2.0), sgd).init(jax.random.key(0), PARAMS)
    assert [np.shape(part) for part in weights] == [(), (0,), ()]
    tx = rules.chain(sgd, optax.scale(2.0), sgd).bind((0.5, (), 0.25))
    updates, _ = tx.update(jnp.ones(1), tx.init(jnp.ones(1)))
    np.testing.assert_allclose(updates, 0.5 * 2 * 0.25)


@pytest.mark.parametrize("name", [n for n in RULES if RULES[n].traits.coordinatewise])
def test_a_coordinatewise_rule_reads_each_coordinate_alone(name):
    """What the blocked backward pass of the inner loop relies on."""
    rule = bound(name)
    index = ("layer", "w")
    other = {
        **GRADS,
        "layer": {**GRADS["layer"], "w": GRADS["layer"]["w"].at[0].set(9)},
    }
    update = functools.partial(compiled(name), rule.weights)
    before, _ = update(GRADS, rule.state, PARAMS)
    after, _ = update(other, rule.state, PARAMS)
    np.testing.assert_array_equal(
        after[index[0]][index[1]][1], before[index[0]][index[1]][1]
    )
    tiny.assert_equal(after["half"], before["half"])
    assert np.any(after["layer"]["w"][0] != before["layer"]["w"][0])


def test_rules_say_whether_they_read_the_loss():
    """What running many tasks as one relies on."""
    assert {name for name in RULES if not RULES[name].traits.reads_loss} == BLIND
    for name in BLIND:
        rule = bound(name)
        with_loss = rule.tx.update(GRADS, rule.state, PARAMS, value=9.0)
        tiny.assert_equal(rule.tx.update(GRADS, rule.state, PARAMS), with_loss)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rules.lstm_gates(hidden_size=-1), r"hidden_size=-1: choose 0"),
        (lambda: rules.lstm_gates(variant="v9"), r"variant='v9': choose one of code"),
        (lambda: rules.lstm_gates(forget="two"), r"forget='two': choose one of gate"),
        (lambda: rules.lstm_gates(input="one"), r"input='one': choose one of gate"),
        (
            lambda: rules.lstm_gates(feature_gradient="half"),
            r"feature_gradient='half': choose one of stopped, full",
        ),
        (lambda: rules.lstm_gates(bias_per="x"), r"bias_per='x': choose one of rule"),
        (lambda: rules.lstm_gates(num_bias_steps=0), r"num_bias_steps=0: choose 1"),
        (lambda: rules.learned_sgd(per="layer"), r"per='layer': choose one of rule"),
        (lambda: rules.learned_sgd(num_steps=0), r"num_steps=0: choose 1 or more"),
        (rules.chain, r"chain needs at least one rule"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_counts_and_scales_are_checked():
    for wrong in ("100", 2.5, float("inf")):
        with pytest.raises(ValueError, match=r"num_steps=.*: choose an integer, 1 or"):
            rules.with_progress(optax.sgd(1.0), wrong)
    for make in (rules.l2l, rules.lstm_gates, rules.gradient_memory):
        with pytest.raises(ValueError, match="p=0: choose a number above 0"):
            make(p=0)


def test_a_rule_that_misses_the_loss_or_the_parameters_says_what_to_pass():
    tx, state = bound("gates").tx, bound("gates").state
    with pytest.raises(ValueError, match=r"needs the loss: tx.update\(.*value=loss\)"):
        tx.update(GRADS, state, PARAMS)
    with pytest.raises(ValueError, match=r"needs the parameters: tx.update\(grads, st"):
        tx.update(GRADS, state, value=LOSS)
    blind = bound("gates_ablated")
    blind.tx.update(GRADS, blind.state, PARAMS)  # loss_input=False asks for none
