"""Meta-learners: functions from a support set to a predictor."""

from metalstm.algorithms.gradient_based import (
    fomaml,
    from_scratch,
    learned_init,
    maml,
    meta_lstm,
    meta_sgd,
)
from metalstm.algorithms.metric_based import nearest_neighbour, prototypical

__all__ = [
    "fomaml",
    "from_scratch",
    "learned_init",
    "maml",
    "meta_lstm",
    "meta_sgd",
    "nearest_neighbour",
    "prototypical",
]
