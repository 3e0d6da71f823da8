"""Meta-learners: functions from a support set to a predictor."""

from metalstm.algorithms.agreement import gradient_agreement
from metalstm.algorithms.comparing import embedding_state
from metalstm.algorithms.displacement import reptile
from metalstm.algorithms.gradient_based import (
    anil,
    fomaml,
    from_scratch,
    learned_init,
    maml,
    meta_lstm,
    meta_sgd,
)
from metalstm.algorithms.imagination import hallucination
from metalstm.algorithms.margins import margin_classifier
from metalstm.algorithms.memory_augmented import mann
from metalstm.algorithms.metric_based import (
    matching,
    nearest_neighbour,
    prototypical,
    relation,
)
from metalstm.algorithms.optimizer_training import InnerRuns, learned_optimizer
from metalstm.algorithms.pair_losses import siamese
from metalstm.algorithms.proximal import implicit_maml
from metalstm.algorithms.transfer import fine_tuning, pretrained_features

__all__ = [
    "InnerRuns",
    "anil",
    "embedding_state",
    "fine_tuning",
    "fomaml",
    "from_scratch",
    "gradient_agreement",
    "hallucination",
    "implicit_maml",
    "learned_init",
    "learned_optimizer",
    "maml",
    "mann",
    "margin_classifier",
    "matching",
    "meta_lstm",
    "meta_sgd",
    "nearest_neighbour",
    "pretrained_features",
    "prototypical",
    "relation",
    "reptile",
    "siamese",
]
