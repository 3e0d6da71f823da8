"""The Meta-LSTM's update rule (Ravi & Larochelle, ICLR 2017), one cell a coordinate.

Notation: N coordinates (all the learner's parameters, flattened), H hidden units.
Coordinates are the last axis everywhere: they fill the vector lanes, H does not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.records import recorded
from metalstm.rules.features import log_sign
from metalstm.rules.flat import coordinate_dtype, flatten, leaf_sizes, unflatten
from metalstm.rules.lstm_cell import lstm_step, tanh_sigmoid
from metalstm.runtime.products import precise_matmul

__all__ = ["GatesState", "find_gates", "gate_update", "lstm_gates"]


def gate_update(theta: Array, grad: Array, f: Array, i: Array) -> Array:
    r"""Let a forget gate f and an input gate i move a parameter.

    .. math:: \theta_t = f_t \theta_{t-1} + i_t (-\nabla_t)

    (Ravi & Larochelle, 2017, equation 2: an LSTM's cell, whose candidate is the
    negative gradient). f = 1 with a constant i is gradient descent.

    Args:
      theta, grad, f, i: of shapes that broadcast; f and i in (0, 1).

    >>> gate_update(2.0, grad=0.5, f=0.75, i=0.5)
    1.25
    """
    return theta + _gate_delta(theta, grad, 1 - f, i)


def _gate_delta(theta: Array, grad: Array, forgotten: Array | None, i: Array) -> Array:
    """`gate_update` - theta, with ``forgotten`` = 1 - f; None where f is 1."""
    delta = -i * grad
    return delta if forgotten is None else delta - forgotten * theta


class GatesState(NamedTuple):
    step: Array  # int32 scalar
    hidden: Array  # [H, N] the first LSTM's output
    cell: Array  # [H, N] its cell
    forget: Array  # [N] the forget gate's logit after the last update
    input: Array  # [N] the input gate's


@recorded("rule")
def lstm_gates(
    *,
    hidden_size: int | None = None,
    variant: Literal["code", "paper"] = "code",
    forget: Literal["gate", "one"] = "gate",
    input: Literal["gate", "constant"] = "gate",  # noqa: A002 (the field's name)
    loss_input: bool = True,
    theta_input: bool = True,
    carry_input: bool = True,
    feature_gradient: Literal["stopped", "full"] = "stopped",
    p: float = 10.0,
    forget_bias: tuple[float, float] = (4.0, 5.0),
    input_bias: tuple[float, float] = (-5.0, -4.0),
    input_bias_of: Mapping[str, tuple[float, float]] | None = None,
    bias_per: Literal["rule", "tensor", "tensor_and_step"] = "rule",
    num_bias_steps: int = 1,
    init_scale: float = 0.01,
) -> UpdateRule:
    r"""Gates that mix the old parameter with the gradient, as an LSTM's cell does.

    .. math::
        h_t &= \mathrm{LSTM}(\phi(L_t), \phi(\nabla_t), h_{t-1}) \\
        f_t &= \sigma(W_F [h_t, \theta_{t-1}, f_{t-1}] + b_F) \\
        i_t &= \sigma(W_I [h_t, \theta_{t-1}, i_{t-1}] + b_I) \\
        \theta_t &= f_t \theta_{t-1} - i_t \nabla_t

    (equations 2 and 3 and section 3.2), with :math:`\phi` = `log_sign`. All states,
    the gates' logits among them, start at zero.

    Args:
      hidden_size: H; 0 for no first LSTM: the gates then read the features themselves.
        None: 20 for ``variant="code"`` (the authors' code), 0 for ``"paper"``.
      variant: what the gates read of their previous step: ``"code"`` the logit, as in
        the authors' code, ``"paper"`` the value, as in equation 3 (the paper does not
        say what f_0 and i_0 are; a zero logit makes both 0.5).
      forget: ``"one"`` fixes f at 1 (an ablation; with a constant i this is SGD).
      input: ``"constant"`` makes i a learned constant (an ablation).
      loss_input: whether the LSTM sees the loss.
      theta_input: whether the gates see theta.
      carry_input: whether the gates see their previous value.
      feature_gradient: in second-order mode, whether the derivative flows through the
        features too. ``"full"`` multiplies it by up to e^p = 22,026.
      p: of `log_sign`.
      forget_bias: b_F is drawn uniformly from this range.
      input_bias: b_I likewise. The published ranges, with i near 0.01, start slowly
        whatever the algorithm: `algorithms.meta_lstm` without a rule does not.
      input_bias_of: other ranges for tensors whose path has this part, such as
        ``{"head": (-1, -1)}``; needs a bias for each tensor.
      bias_per: one bias for all coordinates (published), one for each of the learner's
        tensors, or one for each tensor and step. The latter two tie the rule to the
        learner's structure.
      num_bias_steps: with ``"tensor_and_step"``, how many steps have separate
        biases; later steps use the last.
      init_scale: weights and the LSTM's bias are drawn from U(-scale, scale).

    Returns:
      A rule whose bound form needs ``params`` and ``value=`` (the loss; not with
      ``loss_input=False``).

    Raises:
      ValueError: an argument outside the choices above.
    """
    if hidden_size is None:
        hidden_size = 20 if variant == "code" else 0
    check_at_least("hidden_size", hidden_size, 0)
    check_choice("variant", variant, ("code", "paper"))
    check_choice("forget", forget, ("gate", "one"))
    check_choice("input", input, ("gate", "constant"))
    check_choice("feature_gradient", feature_gradient, ("stopped", "full"))
    check_choice("bias_per", bias_per, ("rule", "tensor", "tensor_and_step"))
    check_at_least("num_bias_steps", num_bias_steps, 1)
    check_positive("p", p)
    per_tensor = bias_per != "rule"
    if input_bias_of and not per_tensor:
        raise ValueError(
            f"input_bias_of={dict(input_bias_of)} needs a bias for each tensor: choose "
            "bias_per='tensor' or 'tensor_and_step'"
        )
    options = _Options(
        hidden_size=hidden_size,
        reads_value=variant == "paper",
        learns_forget=forget == "gate",
        learns_input=input == "gate",
        loss_input=loss_input,
        theta_input=theta_input,
        carry_input=carry_input,
        stops_features=feature_gradient == "stopped",
        p=p,
        forget_bias=forget_bias,
        input_bias=input_bias,
        input_bias_of=dict(input_bias_of or {}),
        per_tensor=per_tensor,
        bias_steps=num_bias_steps if bias_per == "tensor_and_step" else 1,
        init_scale=init_scale,
    )

    def bind(rule_params: PyTree) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(
            functools.partial(_init_state, options, rule_params),
            functools.partial(_update, options, rule_params),
        )

    traits = RuleTraits(
        coordinatewise=not per_tensor,
        smooth=True,
        reads_loss=loss_input and options.has_gates,
    )
    return UpdateRule(functools.partial(_init, options), bind, traits)


class _Options(NamedTuple):
    """What `lstm_gates` was given."""

    hidden_size: int
    reads_value: bool  # of a gate at the step before; else its logit
    learns_forget: bool
    learns_input: bool
    loss_input: bool
    theta_input: bool
    carry_input: bool
    stops_features: bool
    p: float
    forget_bias: tuple[float, float]
    input_bias: tuple[float, float]
    input_bias_of: dict[str, tuple[float, float]]
    per_tensor: bool
    bias_steps: int
    init_scale: float

    @property
    def has_gates(self) -> bool:
        return self.learns_forget or self.learns_input

    @property
    def has_lstm(self) -> bool:
        return self.hidden_size > 0 and self.has_gates


def _init(options: _Options, key: Array, params: PyTree) -> dict[str, Any]:
    scale, hidden_size = options.init_scale, options.hidden_size
    num_features = hidden_size or (4 if options.loss_input else 2)

    def uniform(name: int, shape, low=-scale, high=scale):
        return jax.random.uniform(
            jax.random.fold_in(key, name), shape, jnp.float32, low, high
        )

    def gate(name: int, bias_range):
        biases: tuple[int, ...] = ()
        if options.per_tensor:
            biases = (options.bias_steps, len(leaf_sizes(params)))
        weights = {"bias": uniform(name, biases, *bias_range)}
        weights["features"] = uniform(name + 1, (num_features,))
        if options.theta_input:
            weights["theta"] = uniform(name + 2, ())
        if options.carry_input:
            weights["carry"] = uniform(name + 3, ())
        return weights

    rule: dict[str, Any] = {}
    if options.learns_forget:
        rule["forget"] = gate(0, options.forget_bias)
    rule["input"] = gate(10, options.input_bias)
    for part, bias_range in options.input_bias_of.items():
        other = gate(10, bias_range)["bias"]
        chosen = jnp.array(_paths_with(part, params))
        rule["input"]["bias"] = jnp.where(chosen, other, rule["input"]["bias"])
    if not options.learns_input:
        rule["input"] = {"bias": rule["input"]["bias"]}
    if options.has_lstm:
        rule["lstm"] = {
            "kernel": uniform(20, (4 * hidden_size, 2 + hidden_size)),
            "bias": uniform(21, (4 * hidden_size,)),
        }
        if options.loss_input:
            rule["lstm"]["loss_kernel"] = uniform(22, (4 * hidden_size, 2))
    return rule


def _init_state(options: _Options, rule: PyTree, params: PyTree) -> GatesState:
    del rule
    total = sum(leaf_sizes(params))
    dtype = coordinate_dtype(params)
    shape = (options.hidden_size if options.has_lstm else 0, total)
    hidden, cell = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    # without a gate f = 1 exactly, and so is sigmoid(40) in float32
    forget = jnp.full((total,), 0.0 if options.learns_forget else 40.0, dtype)
    return GatesState(jnp.int32(0), hidden, cell, forget, jnp.zeros((total,), dtype))


def _update(
    options: _Options,
    rule: PyTree,
    updates: PyTree,
    state: GatesState,
    params: PyTree | None = None,
    *,
    value: Array | None = None,
    **extra: Any,
) -> tuple[PyTree, GatesState]:
    del extra
    if params is None:
        raise ValueError(
            "lstm_gates needs the parameters: tx.update(grads, state, params)"
        )
    reads_features = options.has_lstm or not options.hidden_size
    if options.loss_input and value is None and reads_features:
        raise ValueError(
            "lstm_gates needs the loss: tx.update(grads, state, params, value=loss), "
            "or build it with loss_input=False"
        )
    g, theta = flatten(updates), flatten(params)
    seen, loss = g, value if options.loss_input else None
    if options.stops_features:
        seen, loss = lax.stop_gradient((seen, loss))
    features, hidden, cell = _features(rule, state, seen, loss, options.p)

    def logit(gate: PyTree, before: Array) -> Array:
        bias = gate["bias"]
        if options.per_tensor:
            row = bias[jnp.minimum(state.step, options.bias_steps - 1)]
            bias = _per_coordinate(row, leaf_sizes(params))
        if "features" not in gate:
            return jnp.broadcast_to(bias, theta.shape)
        out = precise_matmul(gate["features"], features) + bias
        if options.theta_input:
            out = out + gate["theta"] * theta
        if options.carry_input:
            before = tanh_sigmoid(before) if options.reads_value else before
            out = out + gate["carry"] * before
        return out

    input_logit = logit(rule["input"], state.input)
    forget_logit, forgotten = state.forget, None
    if options.learns_forget:
        forget_logit = logit(rule["forget"], state.forget)
        # 1 - f = sigmoid(-logit) keeps its digits where f is near 1
        forgotten = jax.nn.sigmoid(-forget_logit)
    delta = _gate_delta(theta, g, forgotten, jax.nn.sigmoid(input_logit))
    new = GatesState(state.step + 1, hidden, cell, forget_logit, input_logit)
    return unflatten(delta, updates, params), new


def find_gates(rule_state: PyTree) -> dict[str, Array]:
    """The gates' values at the last update, from a (chained) rule's state.

    Returns:
      ``{"forget": [N], "input": [N]}``, or ``{}`` when no `lstm_gates` is in the chain.
    """
    states = jax.tree.leaves(rule_state, is_leaf=lambda x: isinstance(x, GatesState))
    for state in states:
        if isinstance(state, GatesState):
            return {
                "forget": jax.nn.sigmoid(state.forget),
                "input": jax.nn.sigmoid(state.input),
            }
    return {}


def _features(rule, state: GatesState, g: Array, loss: Array | None, p: float):
    """[F, N] features, and the LSTM's new state ([H, N] each)."""
    gradient = jnp.stack(log_sign(g, p))  # [2, N]
    if "lstm" not in rule:
        features = gradient
        if loss is not None:
            shared = jnp.stack(log_sign(jnp.asarray(loss), p)).astype(g.dtype)
            loss_rows = jnp.broadcast_to(shared[:, None], gradient.shape)
            features = jnp.concatenate([loss_rows, gradient])
        return features, state.hidden, state.cell
    lstm = rule["lstm"]
    bias = lstm["bias"]
    if loss is not None:  # the same for all coordinates, so part of the bias
        shared = jnp.stack(log_sign(jnp.asarray(loss), p)).astype(g.dtype)
        bias = bias + precise_matmul(lstm["loss_kernel"], shared)
    hidden, cell = lstm_step(lstm["kernel"], bias, gradient, state.hidden, state.cell)
    return hidden, hidden, cell


def _per_coordinate(row: Array, sizes: list[int]) -> Array:
    # broadcasts, not a gather: a gather's derivative is a slow scatter on CPU
    return jnp.concatenate(
        [jnp.broadcast_to(row[k], (n,)) for k, n in enumerate(sizes)]
    )


def _paths_with(part: str, params: PyTree) -> list[bool]:
    """For each tensor, whether its path in the tree has ``part``."""
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    chosen = [part in jax.tree_util.keystr(path) for path in paths]
    if not any(chosen):
        names = ", ".join(jax.tree_util.keystr(path) for path in paths)
        raise ValueError(f"input_bias_of names {part!r}, but the tensors are {names}")
    return chosen
