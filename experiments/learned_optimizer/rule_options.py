"""The rules by name; an option's JSON is the spec `metalstm.rules.build_rule` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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


class NamedRule(NamedTuple):
    about: str
    options: Rule


_V2 = TwoLayer()
RULES = {
    "l2l": NamedRule("a coordinate-wise LSTM", L2L()),
    "l2l-published": NamedRule(
        "the same as Andrychowicz et al. (2016) had it, in every preset", L2L()
    ),
    "v2": NamedRule("a gradient memory chained into gates", _V2),
    "meta-lstm": NamedRule(
        "the gates of Ravi & Larochelle (2017), with their LSTM", LstmGates()
    ),
    "gates": NamedRule(
        "the gates alone, on features, without an LSTM", LstmGates(hidden_size=0)
    ),
    "meta-lstm-f1": NamedRule(
        "meta-lstm with the forget gate fixed at 1", LstmGates(forget="one")
    ),
    "gates-f1": NamedRule(
        "gates with the forget gate fixed at 1", LstmGates(hidden_size=0, forget="one")
    ),
    "v2-f1": NamedRule(
        "v2 with the forget gate fixed at 1",
        replace(_V2, gates=replace(_V2.gates, forget="one")),
    ),
    "learned-sgd": NamedRule("one learned rate", LearnedSgd()),
}


def named_rules() -> dict[str, Rule]:
    return {name: rule.options for name, rule in RULES.items()}
