"""Options of rules; their JSON is the spec that `metalstm.rules.build_rule` reads."""

from __future__ import annotations

from typing import Literal

from experiments.common.cli import Options, Positive, replace


class L2L(Options, frozen=True, tag_field="rule", tag="l2l"):
    """A coordinate-wise LSTM that reads gradients."""

    hidden_size: int = 20
    """Units of each layer."""
    num_layers: int = 2
    """LSTM layers."""
    output_scale: Positive = 0.1
    """Factor of the update."""
    features: Literal["log_sign", "raw", "moments"] = "log_sign"
    """What the LSTM reads: the gradient, published in two ways, or what Adam reads."""
    p: float = 10.0
    """Of the log_sign features."""
    shortcut: float | None = None
    """With moments: start as Adam of the rate output_scale times this."""
    relative: bool = False
    """With moments: updates in units of the gradient's size, as momentum's are."""


class Gates(Options, frozen=True):
    """Gates that mix the old parameter with the gradient."""

    hidden_size: int = 20
    """Units of the LSTM below the gates; 0: they read the features."""
    variant: Literal["code", "paper"] = "code"
    """What the gates read of their previous step: the logit or the value."""
    forget: Literal["gate", "one"] = "gate"
    """one: f is fixed at 1."""
    input: Literal["gate", "constant"] = "gate"
    """constant: i is a learned constant."""
    loss_input: bool = True
    """Whether the LSTM sees the loss."""
    theta_input: bool = True
    """Whether the gates see theta."""
    carry_input: bool = True
    """Whether the gates see their own previous value."""
    feature_gradient: Literal["stopped", "full"] = "stopped"
    """Second order: whether the derivative flows through the features too."""
    p: float = 10.0
    """Of the log_sign features."""
    forget_bias: tuple[float, float] = (4.0, 5.0)
    """Range of the forget gate's initial bias."""
    input_bias: tuple[float, float] = (-5.0, -4.0)
    """Range of the input gate's initial bias; it sets the first step size."""
    init_scale: float = 0.01
    """Weights are drawn from U(-scale, scale)."""


class LstmGates(Gates, frozen=True, tag_field="rule", tag="lstm_gates"):
    """The Meta-LSTM's rule."""


class Memory(Options, frozen=True):
    """A memory of gradients, as momentum and RMSprop have."""

    hidden_size: int = 20
    """Units of its LSTM."""
    p: float = 10.0
    """Of the log_sign features."""
    eps: float = 1e-8
    """Added to the average square."""
    init_scale: float = 0.01
    """Kernels are drawn from U(-scale, scale)."""


class TwoLayer(Options, frozen=True, tag_field="rule", tag="two_layer"):
    """A gradient memory chained into gates."""

    memory: Memory = Memory()
    gates: Gates = Gates(hidden_size=0, feature_gradient="full")


class LearnedSgd(Options, frozen=True, tag_field="rule", tag="learned_sgd"):
    """SGD with a learned rate."""

    rate: float = 0.01
    """Where it starts."""
    num_steps: int | None = None
    """A rate of its own for each of this many updates."""


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


def named_rules(
    hidden_size: int = 20, l2l: L2L | None = None, **others: Rule
) -> dict[str, Rule]:
    """Every one of `RULES`, with LSTMs of ``hidden_size`` units."""
    found: dict[str, Rule] = {
        "l2l": l2l or L2L(hidden_size=hidden_size),
        "l2l-published": L2L(),
        "v2": TwoLayer(memory=Memory(hidden_size=hidden_size)),
        "meta-lstm": LstmGates(hidden_size=hidden_size),
        "gates": LstmGates(hidden_size=0),
    }
    for name in ("meta-lstm", "gates"):
        found[f"{name}-f1"] = replace(found[name], forget="one")
    gates = Gates(hidden_size=0, feature_gradient="full", forget="one")
    found["v2-f1"] = replace(found["v2"], gates=gates)
    return found | {"learned-sgd": LearnedSgd()} | others
