"""Meta-learners: functions from a support set to a predictor."""

from metalstm.algorithms.gradient_based import (
    fomaml,
    from_scratch,
    learned_init,
    maml,
    meta_lstm,
    meta_sgd,
)
from metalstm.algorithms.metric_based import (
    matching,
    nearest_neighbour,
    prototypical,
)
from metalstm.algorithms.optimizer_training import InnerRuns, learned_optimizer

__all__ = [
    "InnerRuns",
    "fomaml",
    "from_scratch",
    "learned_init",
    "learned_optimizer",
    "maml",
    "matching",
    "meta_lstm",
    "meta_sgd",
    "nearest_neighbour",
    "prototypical",
]
