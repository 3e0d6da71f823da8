"""The coordinate-wise LSTM optimizer (Andrychowicz et al., NeurIPS 2016).

Notation: N coordinates (all the parameters, flattened), H hidden units, F features.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metalstm.base import Array, PyTree, RuleTraits, UpdateRule
from metalstm.checks import check_at_least, check_choice, check_positive
from metalstm.records import recorded
from metalstm.rules.features import log_sign
from metalstm.rules.flat import coordinate_dtype, flatten, leaf_sizes, unflatten
from metalstm.rules.lstm_cell import init_lstm, lstm_step
from metalstm.runtime.products import precise_matmul

__all__ = ["L2LState", "l2l"]


_DECAYS = (0.5, 0.9, 0.99)  # of the averages of the gradient
_SQUARE_DECAY = 0.98  # of the average of its square
_EPS = 1e-16  # below |g| = 1e-8 a gradient counts as small


class Moments(NamedTuple):
    """Running averages of a gradient, for ``features="moments"``."""

    step: Array  # int32, updates done
    mean: Array  # [3, N], with the decays 0.5, 0.9, 0.99
    square: Array  # [N]


class L2LState(NamedTuple):
    hidden: tuple[Array, ...]  # each layer's output, [H, N]
    cell: tuple[Array, ...]  # each layer's cell, [H, N]
    moments: Moments | tuple[()]  # () without them


@recorded("rule")
def l2l(
    *,
    hidden_size: int = 20,
    num_layers: int = 2,
    output_scale: float = 0.1,
    features: Literal["log_sign", "raw", "moments"] = "log_sign",
    p: float = 10.0,
    shortcut: float | None = None,
    relative: bool = False,
) -> UpdateRule:
    r"""Update every coordinate by one shared LSTM that reads its gradient.

    .. math::
        h_t &= \mathrm{LSTM}(\phi(\nabla_t), h_{t-1}) \\
        \theta_t &= \theta_{t-1} + a (w \cdot h_t + b)

    (section 2.1 and appendix A), with a = ``output_scale`` and all states zero at
    first. It reads neither the loss nor the parameters, so it works wherever an optax
    optimizer does. The defaults are the published rule. It moves a parameter whose
    gradient is zero too: mask what should stay (`optax.masked`). Parameters are joined
    to one vector, which on a mesh with explicit axes raises a ShardingTypeError.

    ``features="moments"`` lets the LSTM read what Adam reads: the gradient and its
    averages (decays 0.5, 0.9, 0.99), each over the root u of the average square (after
    RNNProp, Lv et al., 2017), next to `log_sign`. Two options go with it:

    .. math:: \theta_t = \theta_{t-1} + a \, u_t^{\rho} (w \cdot h_t + b + s \cdot x_t)

    with x_t the four averages over u and s learned (``shortcut``), rho = 1 with
    ``relative``. A fresh rule is then Adam of about the rate a * shortcut, or heavy
    ball of a * shortcut (rho = 1), and the LSTM learns what to do better.

    With them no derivative flows through `log_sign` (in second-order mode it would be
    multiplied by up to e^p).

    Args:
      hidden_size: H, units of each layer.
      num_layers: LSTM layers, each reading the one below.
      output_scale: a.
      features: what the first layer sees: ``"log_sign"`` for phi = `log_sign`,
        ``"raw"`` for the gradient itself (the paper's quadratics, with a = 1),
        ``"moments"`` as above.
      p: of `log_sign`; the paper has 10, its authors' code 5.
      shortcut: where -s starts for the average of decay 0.9; the other three start at
        0. None: no shortcut. Needs ``features="moments"``.
      relative: measure updates in units of u, so that they shrink with the gradient.
        Needs ``features="moments"``.

    Raises:
      ValueError: an argument outside these choices.
    """
    check_at_least("hidden_size", hidden_size, 1)
    if not 1 <= num_layers <= 16:
        raise ValueError(f"num_layers={num_layers}: choose 1 to 16")
    check_choice("features", features, ("log_sign", "raw", "moments"))
    check_positive("p", p)
    if features != "moments" and (relative or shortcut is not None):
        raise ValueError(
            f"shortcut={shortcut}, relative={relative} need features='moments', not "
            f"{features!r}"
        )
    num_features = {"log_sign": 2, "raw": 1, "moments": 6}[features]
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
        # far from the shortcut's size at first, so that the start is what it says
        width = hidden_size**0.5 * (1.0 if shortcut is None else 10.0)
        rule["output"] = {"kernel": kernel / width, "bias": jnp.float32(0)}
        if shortcut is not None:
            rule["shortcut"] = {
                "kernel": jnp.zeros(4, jnp.float32).at[2].set(-shortcut)
            }
        return rule

    def bind(rule: PyTree) -> optax.GradientTransformationExtraArgs:
        def init_fn(params):
            shape = (hidden_size, sum(leaf_sizes(params)))
            dtype = coordinate_dtype(params)
            zeros = lambda: tuple(jnp.zeros(shape, dtype) for _ in names)  # noqa: E731
            if features != "moments":
                return L2LState(zeros(), zeros(), ())
            mean = jnp.zeros((len(_DECAYS), shape[1]), dtype)
            square = jnp.zeros(shape[1:], dtype)
            return L2LState(zeros(), zeros(), Moments(jnp.int32(0), mean, square))

        def update_fn(updates, state, params=None, **extra):
            del extra
            g = flatten(updates)
            weights = jax.tree.map(lambda w: jnp.asarray(w, g.dtype), rule)
            moments, averages = state.moments, g[None]
            unit: Array | float = 1.0
            if features == "moments":
                moments, averages, unit = _average(g, state.moments)
            x = averages
            if features == "log_sign":
                x = jnp.stack(log_sign(g, p))
            elif features == "moments":
                x = jnp.vstack([x, lax.stop_gradient(jnp.stack(log_sign(g, p)))])
            hidden, cell = [], []
            for k, name in enumerate(names):
                layer = weights[name]
                x, c = lstm_step(
                    layer["kernel"], layer["bias"], x, state.hidden[k], state.cell[k]
                )
                hidden.append(x)
                cell.append(c)
            output = weights["output"]
            delta = precise_matmul(output["kernel"], x) + output["bias"]
            if shortcut is not None:
                kernel = weights["shortcut"]["kernel"]
                delta = delta + precise_matmul(kernel, averages)
            delta = output_scale * (unit if relative else 1.0) * delta
            new = L2LState(tuple(hidden), tuple(cell), moments)
            return unflatten(delta, updates, params), new

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    return UpdateRule(init, bind, traits)


def _average(g: Array, old: Moments) -> tuple[Moments, Array, Array]:
    """The new averages; [g, its averages] / u, [4, N]; and u, [N]."""
    decays = jnp.asarray(_DECAYS, g.dtype)[:, None]
    step = old.step + 1
    mean = decays * old.mean + (1 - decays) * g[None]
    square = _SQUARE_DECAY * old.square + (1 - _SQUARE_DECAY) * g**2
    # each is divided by the weights it has so far, as in Adam
    count = step.astype(g.dtype)
    unit = jnp.sqrt(square / (1 - _SQUARE_DECAY**count) + _EPS)
    averages = jnp.vstack([g[None], mean / (1 - decays**count)]) / unit[None]
    return Moments(step, mean, square), averages, unit
