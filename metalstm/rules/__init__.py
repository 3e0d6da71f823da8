"""Update rules: functions from meta-parameters to an optax transform."""

from metalstm.rules.classic import chain, from_optax, learned_sgd, tunable
from metalstm.rules.export import SavedRule, build_rule, load_rule, save_rule
from metalstm.rules.features import FEATURES_VERSION, log_sign
from metalstm.rules.gates import GatesState, find_gates, lstm_gates
from metalstm.rules.groups import by_group, conv_or_dense, matrix_or_vector, only
from metalstm.rules.l2l_lstm import L2LState, l2l
from metalstm.rules.memory import MemoryState, gradient_memory, two_layer
from metalstm.rules.precision import FloatCopyState, with_float_copy

__all__ = [
    "FEATURES_VERSION",
    "FloatCopyState",
    "GatesState",
    "L2LState",
    "MemoryState",
    "SavedRule",
    "build_rule",
    "by_group",
    "chain",
    "conv_or_dense",
    "find_gates",
    "from_optax",
    "gradient_memory",
    "l2l",
    "learned_sgd",
    "load_rule",
    "log_sign",
    "lstm_gates",
    "matrix_or_vector",
    "only",
    "save_rule",
    "tunable",
    "two_layer",
    "with_float_copy",
]
