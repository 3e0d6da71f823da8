"""The coordinate-wise LSTM optimizer (Andrychowicz et al., NeurIPS 2016).

Letters: N coordinates (all the parameters, flattened), H hidden units, F features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metalstm.base import Array, PyTree, UpdateRule
from metalstm.rules.cell import init_lstm, lstm_step
from metalstm.rules.features import log_sign
from metalstm.rules.flat import coordinate_dtype, flatten, leaf_sizes, unflatten

__all__ = ["L2LState", "l2l"]


class L2LState(NamedTuple):
    hidden: tuple[Array, ...]  # each layer's output, [H, N]
    cell: tuple[Array, ...]  # each layer's cell, [H, N]


def l2l(
    *,
    hidden_size: int = 20,
    num_layers: int = 2,
    output_scale: float = 0.1,
    features: Literal["log_sign", "raw"] = "log_sign",
    p: float = 10.0,
) -> UpdateRule:
    r"""Update every coordinate by one shared LSTM that reads its gradient.

    .. math::
        h_t &= \mathrm{LSTM}(\phi(\nabla_t), h_{t-1}) \\
        \theta_t &= \theta_{t-1} + a (w \cdot h_t + b)

    (section 2.1 and appendix A), with a = ``output_scale`` and all states zero at
    first. It reads neither the loss nor the parameters, so it works wherever an optax
    optimizer does.

    Args:
      hidden_size: H, units of each layer.
      num_layers: LSTM layers, each reading the one below.
      output_scale: a.
      features: what the first layer sees: ``"log_sign"`` for phi = `log_sign`,
        ``"raw"`` for the gradient itself (the paper's quadratics, with a = 1).
      p: of `log_sign`; the paper has 10, its authors' code 5.

    Raises:
      ValueError: an argument outside these choices.
    """
    if hidden_size < 1:
        raise ValueError(f"hidden_size={hidden_size}: choose at least 1")
    if not 1 <= num_layers <= 16:
        raise ValueError(f"num_layers={num_layers}: choose 1 to 16")
    if features not in ("log_sign", "raw"):
        raise ValueError(f"features={features!r}: choose one of log_sign, raw")
    num_features = {"log_sign": 2, "raw": 1}[features]
    names = [f"lstm_{k}" for k in range(num_layers)]

    def init(key: Array, params: PyTree) -> PyTree:
        del params
        output_key, *keys = jax.random.split(key, num_layers + 1)
        rule: dict[str, dict[str, Array]] = {}
        for k, name in enumerate(names):
            width = hidden_size if k else num_features
            rule[name] = init_lstm(keys[k], width, hidden_size)
        kernel = jax.random.truncated_normal(
            output_key, -2.0, 2.0, (hidden_size,), jnp.float32
        )
        rule["output"] = {"kernel": kernel / hidden_size**0.5, "bias": jnp.float32(0)}
        return rule

    def bind(rule: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            shape = (hidden_size, sum(leaf_sizes(params)))
            zeros = (jnp.zeros(shape, coordinate_dtype(params)),) * num_layers
            return L2LState(zeros, zeros)

        def update_fn(updates, state, params=None, **extra):
            del params, extra
            g = flatten(updates)
            weights = jax.tree.map(lambda w: jnp.asarray(w, g.dtype), rule)
            x = jnp.stack(log_sign(g, p)) if features == "log_sign" else g[None]
            hidden, cell = [], []
            for k, name in enumerate(names):
                layer = weights[name]
                x, c = lstm_step(
                    layer["kernel"], layer["bias"], x, state.hidden[k], state.cell[k]
                )
                hidden.append(x)
                cell.append(c)
            output = weights["output"]
            delta = output_scale * (output["kernel"] @ x + output["bias"])
            return unflatten(delta, updates), L2LState(tuple(hidden), tuple(cell))

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return UpdateRule(init, bind, coordinatewise=True, smooth=True, reads_loss=False)
