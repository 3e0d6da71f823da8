"""metalstm: learning to learn in JAX.

A learned update rule is a function from meta-parameters to an optax transform; a
meta-learner is a function from a support set to a predictor.
"""

from typing import TYPE_CHECKING

from metalstm import rules
from metalstm.base import (
    Aux,
    Batch,
    Episode,
    Learner,
    LearnerState,
    MetaAlgorithm,
    MetaParams,
    RuleTraits,
    UpdateRule,
)
from metalstm.rules import load_rule, save_rule
from metalstm.rules.pretrained import RuleCard, pretrained_optimizer

try:
    from metalstm import algorithms, data, learned_optimizers, nn
    from metalstm.algorithms.common import make_algorithm
    from metalstm.batches import MaskedBatch
    from metalstm.inner import (
        Differentiation,
        InnerState,
        Trace,
        first_order,
        second_order,
        unroll,
    )
    from metalstm.learned_optimizers import Comparison, compare_optimizers
    from metalstm.meta.confidence import (
        Confidence,
        ConfidenceReport,
        EpisodeScores,
        collect_scores,
        fit_confidence,
        measure_confidence,
    )
    from metalstm.meta.evaluation import (
        Evaluation,
        evaluate,
        make_evaluate,
        paired_difference,
    )
    from metalstm.meta.fitting import (
        FitState,
        NonFiniteLossError,
        fit,
        init_fit_state,
    )
    from metalstm.meta.mixture import (
        MixturePart,
        init_mixture_state,
        make_mixture_loop,
    )
    from metalstm.meta.prefetching import make_prefetching_train_loop
    from metalstm.meta.seeds import init_seeds, map_seeds
    from metalstm.meta.step import (
        TrainState,
        adam_clipped,
        init_train_state,
        make_train_loop,
        make_train_step,
    )
    from metalstm.nn import from_flax
    from metalstm.predictor import Classifier, Predictor
    from metalstm.pretrained import LearnerCard, pretrained_learner
    from metalstm.run_file import load_run
    from metalstm.saving import load, save
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    # jax, optax and numpy are enough for a trained optimizer

__all__ = [
    "Aux",
    "Batch",
    "Classifier",
    "Comparison",
    "Confidence",
    "ConfidenceReport",
    "Differentiation",
    "Episode",
    "EpisodeScores",
    "Evaluation",
    "FitState",
    "InnerState",
    "Learner",
    "LearnerCard",
    "LearnerState",
    "MaskedBatch",
    "MetaAlgorithm",
    "MetaParams",
    "MixturePart",
    "NonFiniteLossError",
    "Predictor",
    "RuleCard",
    "RuleTraits",
    "Trace",
    "TrainState",
    "UpdateRule",
    "adam_clipped",
    "algorithms",
    "collect_scores",
    "compare_optimizers",
    "data",
    "evaluate",
    "first_order",
    "fit",
    "fit_confidence",
    "from_flax",
    "init_fit_state",
    "init_mixture_state",
    "init_seeds",
    "init_train_state",
    "learned_optimizers",
    "load",
    "load_rule",
    "load_run",
    "make_algorithm",
    "make_evaluate",
    "make_mixture_loop",
    "make_prefetching_train_loop",
    "make_train_loop",
    "make_train_step",
    "map_seeds",
    "measure_confidence",
    "nn",
    "paired_difference",
    "pretrained_learner",
    "pretrained_optimizer",
    "rules",
    "save",
    "save_rule",
    "second_order",
    "unroll",
]
__version__ = "0.1.0"

if not TYPE_CHECKING:

    def __getattr__(name):
        if name in __all__:
            raise ImportError(f"metalstm.{name} needs flax: pip install flax")
        raise AttributeError(f"module 'metalstm' has no attribute {name!r}")
