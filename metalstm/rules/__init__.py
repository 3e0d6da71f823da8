"""Update rules: functions from meta-parameters to an optax transform."""

from metalstm.rules.classic import chain, from_optax, learned_sgd, tunable
from metalstm.rules.features import FEATURES_VERSION, log_sign
from metalstm.rules.gates import GatesState, find_gates, lstm_gates

__all__ = [
    "FEATURES_VERSION",
    "GatesState",
    "chain",
    "find_gates",
    "from_optax",
    "learned_sgd",
    "log_sign",
    "lstm_gates",
    "tunable",
]
