"""Rules that train models: problems, meta-training, loss curves."""

from metalstm.learned_optimizers import curves, problems
from metalstm.learned_optimizers.comparison import Comparison, compare_optimizers
from metalstm.learned_optimizers.curves import (
    Summary,
    Sweep,
    capped_logs,
    curve_difference,
    loss_curves,
    make_loss_curves,
    summary,
    sweep,
)
from metalstm.learned_optimizers.problems import Draw, ProblemFamily, ProblemSampler
from metalstm.learned_optimizers.scaling import with_random_scaling
from metalstm.learned_optimizers.training import InnerRuns, learned_optimizer
from metalstm.learned_optimizers.whole_runs import PairedRuns, make_paired_runs

__all__ = [
    "Comparison",
    "Draw",
    "InnerRuns",
    "PairedRuns",
    "ProblemFamily",
    "ProblemSampler",
    "Summary",
    "Sweep",
    "capped_logs",
    "compare_optimizers",
    "curve_difference",
    "curves",
    "learned_optimizer",
    "loss_curves",
    "make_loss_curves",
    "make_paired_runs",
    "problems",
    "summary",
    "sweep",
    "with_random_scaling",
]
