"""Figures of a run. Each function returns a matplotlib Figure for `save_figure`.

`save_figure` writes a PNG and a PDF. A method has the same colour and marker in every
figure (`method_styles`), in colours that colour-blind readers can distinguish.

Matplotlib is imported inside the functions, and pyplot never: no global state, no
display, nothing to close.
"""

from metalstm.plots.accuracies import accuracy_bars, accuracy_sweep, roc_curves
from metalstm.plots.confidence import confidence_panels
from metalstm.plots.episodes import episode_picture
from metalstm.plots.gates import (
    GateVariation,
    gate_distributions,
    gate_variation,
    layer_groups,
)
from metalstm.plots.optimizers import (
    Losses,
    Sweep,
    escape_curves,
    loss_panels,
    rate_sweeps,
)
from metalstm.plots.regression import (
    FittedTask,
    function_fits,
    seed_spread,
    target_errors,
)
from metalstm.plots.settings import setting_panels
from metalstm.plots.style import method_styles, save_figure
from metalstm.plots.training import Curve, learning_curves, meta_training_curves

__all__ = [
    "Curve",
    "FittedTask",
    "GateVariation",
    "Losses",
    "Sweep",
    "accuracy_bars",
    "accuracy_sweep",
    "confidence_panels",
    "episode_picture",
    "escape_curves",
    "function_fits",
    "gate_distributions",
    "gate_variation",
    "layer_groups",
    "learning_curves",
    "loss_panels",
    "meta_training_curves",
    "method_styles",
    "rate_sweeps",
    "roc_curves",
    "save_figure",
    "seed_spread",
    "setting_panels",
    "target_errors",
]
