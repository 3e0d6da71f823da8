"""The gates of an update rule: what they are in each layer, and what they vary with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from metalstm.base import PyTree
from metalstm.plots.style import COLOURS, add_note, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GateVariation", "gate_distributions", "gate_variation", "layer_groups"]

Layers = Sequence[tuple[str, np.ndarray]]
_TINY = 2.0**-25  # half of what float32 tells from 1
_NOTHING = 0.01  # a share of variance below which "nothing" is said
_PERCENTILES = (5, 25, 50, 75, 95)


def layer_groups(params: PyTree) -> list[tuple[str, np.ndarray]]:
    """Name each layer and the coordinates it owns in the flattened parameters.

    A layer is all leaves with the same path but for the last key (kernel and bias).
    """
    groups: dict[str, list[np.ndarray]] = {}
    offset = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        parts = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        name = "/".join(parts[:-1] or parts) or "parameters"
        groups.setdefault(name, []).append(np.arange(offset, offset + np.size(leaf)))
        offset += np.size(leaf)
    return [(name, np.concatenate(indices)) for name, indices in groups.items()]


class GateVariation(NamedTuple):
    """The spread of a gate's logarithm, and the shares of its variance (sum 1)."""

    std: float  # of the natural logarithm, over all that follows
    layers: float
    parameters: float  # of one layer
    steps: float  # at one parameter
    tasks: float  # at one parameter and step; NaN where there is one task

    def __str__(self) -> str:
        """What the gate varies with, the largest share first."""
        if self.std == 0:
            return "is constant"
        shares = dict(zip(self._fields[1:], self[1:], strict=True))
        shown = [name for name in shares if shares[name] >= _NOTHING]
        shown.sort(key=lambda name: -shares[name])
        said = ", ".join(f"{name} ({100 * shares[name]:.0f} %)" for name in shown)
        if self.tasks < _NOTHING:
            said += f"; nothing varies over tasks ({100 * self.tasks:.1g} %)"
        return f"varies with {said}"


def gate_variation(gate: np.ndarray, layers: Layers) -> GateVariation:
    r"""Split the variance of a gate's logarithm into four parts, one inside another.

    With :math:`x` = log gate, s an update step, n a parameter, l(n) its layer and a bar
    for a mean,

    .. math:: \mathrm{Var}(x) = \mathrm{Var}\, \bar x_l
        + \mathrm{E}_l \mathrm{Var}_{n \in l}\, \bar x_n
        + \mathrm{E}_n \mathrm{Var}_s\, \bar x_{sn}
        + \mathrm{E}_{sn} \mathrm{Var}_t\, x_{tsn}

    that is, between layers, between parameters of a layer, between steps of a
    parameter, and between tasks. Every parameter counts once.

    Args:
      gate: i, or 1 - f, in (0, 1): [tasks, T, N].
      layers: as `layer_groups` returns them.

    Returns:
      Shares of 0, and a spread of 0, where the gate is one constant.

    Raises:
      ValueError: a gate of another rank, empty or not finite; layers that do not have
        each of its parameters once.
    """
    gate = np.asarray(gate)
    _check_gate(gate, layers)
    x = np.log(np.maximum(np.asarray(gate, np.float64), _TINY))
    over_tasks = x.mean(0)
    over_steps = over_tasks.mean(0)
    of_layers = np.zeros_like(over_steps)
    for _, indices in layers:
        of_layers[indices] = over_steps[indices].mean()
    total = float(x.var())
    if total < 1e-12:  # of rounding
        return GateVariation(0.0, 0.0, 0.0, 0.0, 0.0)
    parts = (
        of_layers.var(),
        np.square(over_steps - of_layers).mean(),
        over_tasks.var(0).mean(),
        x.var(0).mean() if len(x) > 1 else np.nan,
    )
    return GateVariation(float(np.sqrt(total)), *(float(v / total) for v in parts))


def _check_gate(gate: np.ndarray, layers: Layers) -> None:
    if gate.ndim != 3 or not gate.size or not np.isfinite(gate).all():
        raise ValueError(
            f"the gate has the shape {gate.shape} and {np.isnan(gate).sum()} NaN: give "
            "finite numbers [tasks, T, N]"
        )
    owned = np.sort(np.concatenate([np.zeros(0, int), *(own for _, own in layers)]))
    if not np.array_equal(owned, np.arange(gate.shape[-1])):
        raise ValueError(
            f"layers have {len(owned)} parameters and the gate {gate.shape[-1]}: give "
            "layer_groups of the parameters that the gate is of"
        )


def gate_distributions(
    forget: np.ndarray,
    input: np.ndarray,  # noqa: A002 (the gate's name)
    layers: Layers,
    *,
    max_layers: int = 16,
) -> Figure:
    """Draw each gate's distribution over parameters, by layer and update step.

    Boxes stand for the middle 50% (dark) and 90% (pale) of a layer's parameters over
    all tasks, a bar for the median; the steps of a layer are next to one another. The
    dashed line is what gradient descent with one step size would be. Each panel's title
    has the shares of `gate_variation`, and says so where tasks have none.

    Args:
      forget: f, [tasks, T, N]. Where most of it is above 0.9, 1 - f is drawn on a log
        scale: the share of a parameter that an update forgets.
      input: i, likewise, on a log scale.
      layers: as `layer_groups` returns them; the first ``max_layers`` are drawn, and
        all count in the title.

    Raises:
      ValueError: as `gate_variation`.
    """
    forget, input = np.asarray(forget), np.asarray(input)  # noqa: A001
    for gate in (forget, input):
        _check_gate(gate, layers)
    drawn, num_steps = list(layers)[:max_layers], forget.shape[1]
    width = np.clip(1.2 + 0.16 * len(drawn) * (num_steps + 1), 7.0, 14.0)
    figure = new_figure((float(width), 5.6))
    top, bottom = figure.subplots(2, 1, sharex=True)
    _draw(top, input, drawn, COLOURS[1])
    one = np.exp(np.log(np.maximum(input, _TINY)).mean())
    label = "gradient descent: one step size for all"
    top.axhline(one, color="0.35", linestyle="--", linewidth=1, label=label)
    _log_scale(top)
    top.set_ylabel("input gate i")
    forgotten = np.maximum(1 - forget.astype(np.float64), _TINY)
    if np.median(forget) > 0.9 and forgotten.max() > _TINY:
        _draw(bottom, forgotten, drawn, COLOURS[0])
        bottom.plot(
            [], [], " ", label="gradient descent: nothing is forgotten, 1 - f = 0"
        )
        _log_scale(bottom)
        bottom.set_ylabel("1 - f, forgotten")
    else:
        _draw(bottom, forget, drawn, COLOURS[0])
        bottom.axhline(1, color="0.35", linestyle="--", label="gradient descent: f = 1")
        bottom.set_ylabel("forget gate f")
    for axes, name, gate in ((top, "i", input), (bottom, "1 - f", forgotten)):
        title = f"{name} {gate_variation(gate, layers)}"
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.legend(fontsize=7, loc="upper left", handlelength=1.6)
    _layer_axis(bottom, [name for name, _ in drawn], num_steps)
    omitted = len(layers) - len(drawn)
    left = f"; {omitted} more layers are not drawn" if omitted else ""
    add_note(
        figure,
        f"boxes: the middle 50 % and 90 % of a layer's parameters over {len(input)} "
        f"tasks, bar: the median{left}\n"
        "per cent: shares of the variance of the gate's logarithm",
    )
    return figure


def _log_scale(axes: Any) -> None:
    """A log scale in plain numbers, with room for a legend above the boxes."""
    low, high = np.log(np.maximum(axes.dataLim.intervaly, _TINY))
    room = max(high - low, 0.5)
    axes.set_yscale("log")
    axes.set_ylim(np.exp(low - 0.06 * room), np.exp(high + 0.25 * room))
    for ticks in ("major", "minor"):
        getattr(axes.yaxis, f"set_{ticks}_formatter")("{x:g}")
    if room > 3:  # decades suffice
        axes.yaxis.set_minor_formatter("")
    axes.tick_params(axis="y", which="both", labelsize=8)


def _draw(axes: Any, values: np.ndarray, layers: Layers, colour: str) -> None:
    """Two boxes and a bar for each layer and step."""
    num_steps = values.shape[1]
    for position, (_, indices) in enumerate(layers):
        chosen = np.moveaxis(values[:, :, indices], 1, 0).reshape(num_steps, -1)
        low, lower, middle, upper, high = np.percentile(chosen, _PERCENTILES, axis=1)
        x = position * (num_steps + 1) + np.arange(num_steps)
        for (bottom, top), alpha in (((low, high), 0.25), ((lower, upper), 0.55)):
            axes.bar(
                x, top - bottom, 0.86, bottom=bottom, color=colour, alpha=alpha, lw=0
            )
        axes.hlines(middle, x - 0.43, x + 0.43, color="black", linewidth=1.4)
    for position in range(1, len(layers)):
        edge = position * (num_steps + 1) - 1
        axes.axvline(edge, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlim(-1, len(layers) * (num_steps + 1) - 1)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _layer_axis(axes: Any, names: Sequence[str], num_steps: int) -> None:
    """Name layers by their last parts, where these tell them apart."""
    last = [name.rsplit("/", 1)[-1] for name in names]
    if len(set(last)) == len(names):
        names = last
    centres = np.arange(len(names)) * (num_steps + 1) + (num_steps - 1) / 2
    many = len(names) > 12
    axes.set_xticks(centres, names, rotation=45 if many else 0, fontsize=8)
    axes.tick_params(axis="x", length=0)
    inside = f"; inside, update 1 to {num_steps} from left to right"
    axes.set_xlabel("layer" + (inside if num_steps > 1 else ""), fontsize=9)
