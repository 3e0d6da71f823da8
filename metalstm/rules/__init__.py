"""Update rules: functions from meta-parameters to an optax transform."""

from metalstm.rules.classic import (
    as_rule,
    chain,
    learned_scale,
    learned_sgd,
    tunable,
)
from metalstm.rules.fallback import FallbackState, with_fallback
from metalstm.rules.features import FEATURES_VERSION, log_sign
from metalstm.rules.gates import GatesState, find_gates, gate_update, lstm_gates
from metalstm.rules.groups import by_group, conv_or_dense, matrix_or_vector, only
from metalstm.rules.io import SavedRule, load_rule, save_rule
from metalstm.rules.l2l_lstm import L2LState, l2l
from metalstm.rules.memory import MemoryState, gradient_memory, two_layer
from metalstm.rules.moments import MomentsState
from metalstm.rules.numpy_export import export_numpy
from metalstm.rules.precision import FloatCopyState, with_float_copy
from metalstm.rules.progress import ProgressState, with_progress
from metalstm.rules.spec import build_rule
from metalstm.rules.tensor_rules import moment_gates, moment_lstm, moment_network

__all__ = [
    "FEATURES_VERSION",
    "FallbackState",
    "FloatCopyState",
    "GatesState",
    "L2LState",
    "MemoryState",
    "MomentsState",
    "ProgressState",
    "SavedRule",
    "as_rule",
    "build_rule",
    "by_group",
    "chain",
    "conv_or_dense",
    "export_numpy",
    "find_gates",
    "gate_update",
    "gradient_memory",
    "l2l",
    "learned_scale",
    "learned_sgd",
    "load_rule",
    "log_sign",
    "lstm_gates",
    "matrix_or_vector",
    "moment_gates",
    "moment_lstm",
    "moment_network",
    "only",
    "save_rule",
    "tunable",
    "two_layer",
    "with_fallback",
    "with_float_copy",
    "with_progress",
]
