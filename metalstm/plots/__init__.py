"""Figures of a run. Each function returns a matplotlib Figure; the caller saves it.

Matplotlib is imported inside the functions, and pyplot never: no global state, no
display, nothing to close.
"""

from metalstm.plots.accuracies import accuracy_bars, accuracy_sweep, roc_curves
from metalstm.plots.confidence import confidence_panels
from metalstm.plots.episodes import episode_picture
from metalstm.plots.gates import gate_curves, layer_groups
from metalstm.plots.optimizers import (
    Losses,
    Sweep,
    escape_curves,
    loss_panels,
    rate_sweeps,
)
from metalstm.plots.regression import FittedTask, function_fits, seed_spread
from metalstm.plots.training import Curve, learning_curves, meta_training_curves

__all__ = [
    "Curve",
    "FittedTask",
    "Losses",
    "Sweep",
    "accuracy_bars",
    "accuracy_sweep",
    "confidence_panels",
    "episode_picture",
    "escape_curves",
    "function_fits",
    "gate_curves",
    "layer_groups",
    "learning_curves",
    "loss_panels",
    "meta_training_curves",
    "rate_sweeps",
    "roc_curves",
    "seed_spread",
]
