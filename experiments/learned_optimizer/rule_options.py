"""Options of rules; their JSON is the spec that `metalstm.rules.build_rule` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from experiments.common.cli import Options, replace
from experiments.common.constructors import options_of

_PER_TENSOR = ("input_bias_of", "bias_per", "num_bias_steps")  # no file can hold them
_GATES: dict[str, Any] = {"omit": _PER_TENSOR, "defaults": {"hidden_size": 20}}
L2L = options_of("rules/l2l_lstm.py", "l2l", tag_field="rule", tag="l2l")
Gates = options_of("rules/gates.py", "lstm_gates", **_GATES)
LstmGates = options_of(
    "rules/gates.py", "lstm_gates", tag_field="rule", tag="lstm_gates", **_GATES
)
Memory = options_of("rules/memory.py", "gradient_memory")
LearnedSgd = options_of(
    "rules/classic.py", "learned_sgd", omit=["per"], tag_field="rule", tag="learned_sgd"
)
TwoLayer: Any = msgspec.defstruct(
    "TwoLayer",
    [
        ("memory", Memory, Memory()),
        ("gates", Gates, Gates(hidden_size=0, feature_gradient="full")),
    ],
    bases=(Options,),
    frozen=True,
    tag_field="rule",
    tag="two_layer",
)
if TYPE_CHECKING:
    Rule = Any
else:
    Rule = L2L | LstmGates | TwoLayer | LearnedSgd

RULES = {
    "l2l": "a coordinate-wise LSTM",
    "l2l-published": "the same as Andrychowicz et al. (2016) had it, in every preset",
    "v2": "a gradient memory chained into gates",
    "meta-lstm": "the gates of Ravi & Larochelle (2017), with their LSTM",
    "gates": "the gates alone, on features, without an LSTM",
    "meta-lstm-f1": "meta-lstm with the forget gate fixed at 1",
    "gates-f1": "gates with the forget gate fixed at 1",
    "v2-f1": "v2 with the forget gate fixed at 1",
    "learned-sgd": "one learned rate",
}


def named_rules() -> dict[str, Rule]:
    """Every one of `RULES`."""
    gates, alone, v2 = LstmGates(), LstmGates(hidden_size=0), TwoLayer()
    return {
        "l2l": L2L(),
        "l2l-published": L2L(),
        "v2": v2,
        "meta-lstm": gates,
        "gates": alone,
        "meta-lstm-f1": replace(gates, forget="one"),
        "gates-f1": replace(alone, forget="one"),
        "v2-f1": replace(v2, gates=replace(v2.gates, forget="one")),
        "learned-sgd": LearnedSgd(),
    }
