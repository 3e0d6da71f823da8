"""Meta-learners: functions from a support set to a predictor."""

from metalstm.algorithms.common import make_algorithm, query_loss, task_loss
from metalstm.algorithms.gradient.agreement import gradient_agreement
from metalstm.algorithms.gradient.displacement import reptile
from metalstm.algorithms.gradient.engine import learned_init
from metalstm.algorithms.gradient.proximal import implicit_maml
from metalstm.algorithms.gradient.published import (
    anil,
    fomaml,
    from_scratch,
    maml,
    meta_lstm,
    meta_sgd,
    published_meta_lstm,
)
from metalstm.algorithms.memory_augmented.external_memory import mann
from metalstm.algorithms.metric.comparisons import (
    matching,
    prototypical,
    relation,
)
from metalstm.algorithms.metric.engine import embedding_state
from metalstm.algorithms.metric.feature_heads import (
    base_mean,
    logistic_regression,
    nearest_centroid,
    nearest_neighbour,
    ridge,
)
from metalstm.algorithms.metric.hallucinating import hallucination
from metalstm.algorithms.metric.pair_losses import siamese
from metalstm.algorithms.transfer.baselines import fine_tuning, pretrained_features
from metalstm.algorithms.transfer.margins import margin_classifier

__all__ = [
    "anil",
    "base_mean",
    "embedding_state",
    "fine_tuning",
    "fomaml",
    "from_scratch",
    "gradient_agreement",
    "hallucination",
    "implicit_maml",
    "learned_init",
    "logistic_regression",
    "make_algorithm",
    "maml",
    "mann",
    "margin_classifier",
    "matching",
    "meta_lstm",
    "meta_sgd",
    "nearest_centroid",
    "nearest_neighbour",
    "pretrained_features",
    "prototypical",
    "published_meta_lstm",
    "query_loss",
    "relation",
    "reptile",
    "ridge",
    "siamese",
    "task_loss",
]
