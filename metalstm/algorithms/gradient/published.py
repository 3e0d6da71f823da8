"""Published algorithms that adapt by gradient steps, as ways to fill `learned_init`."""

from __future__ import annotations

from typing import Any

import optax

from metalstm.algorithms.gradient.engine import learned_init
from metalstm.base import Learner, MetaAlgorithm, QueryNorm, RuleTraits, UpdateRule
from metalstm.inner import first_order, second_order
from metalstm.records import recorded
from metalstm.rules import learned_sgd, lstm_gates, only

__all__ = [
    "DEFAULT_GATES",
    "anil",
    "fixed_sgd",
    "fomaml",
    "from_scratch",
    "maml",
    "meta_lstm",
    "meta_sgd",
    "published_meta_lstm",
]

DEFAULT_GATES: dict[str, Any] = {
    "hidden_size": 4,
    "forget_bias": (7.0, 7.0),
    "input_bias": (2.0, 2.0),
}
"""Of `meta_lstm`: f starts near 1, i at 0.88 of the largest useful step."""


@recorded("algorithm")
def meta_lstm(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation | None = None,
    *,
    num_steps: int,
    **options: Any,
) -> MetaAlgorithm:
    """Meta-Learner LSTM (Ravi & Larochelle, 2017) with a start that learns quickly.

    `learned_init` with `rules.lstm_gates`, second order, and the gradient on the scale
    of the data (``gradient_scale="calibrated"``), on which the input gate starts at
    0.88. ``options`` are those of `learned_init`; `published_meta_lstm` has the
    authors' settings, and docs/choosing_gate_settings.md compares them.

    Args:
      rule: None: gates of 4 hidden units whose f starts near 1, so that what is learned
        of theta_0 is not forgotten. ``lstm_gates()`` given here keeps its published
        biases, i near 0.01, and learns slowly: choose its ``forget_bias`` and
        ``input_bias`` too.
    """
    if rule is None:
        rule = lstm_gates(**DEFAULT_GATES)
    ours: dict[str, Any] = {
        "differentiation": second_order(),
        "gradient_scale": "calibrated",
    }
    return learned_init(learner, rule, num_steps=num_steps, **(ours | options))


@recorded("algorithm")
def published_meta_lstm(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation | None = None,
    *,
    num_steps: int,
    **options: Any,
) -> MetaAlgorithm:
    """Meta-Learner LSTM (Ravi & Larochelle, 2017) as the authors' code.

    `learned_init` with `rules.lstm_gates`, first order, the gradient divided by the
    batch size, and test statistics gathered as a moving average over the support
    passes. The first steps are tiny (i near 0.01): it needs tens of thousands of
    episodes. ``options`` are those of `learned_init`.
    """
    rule = lstm_gates() if rule is None else rule
    published: dict[str, Any] = {
        "differentiation": first_order(),
        "gradient_scale": "1/batch",
        "support_stats": "moving",
    }
    return learned_init(learner, rule, num_steps=num_steps, **(published | options))


@recorded("algorithm")
def maml(
    learner: Learner, rate: float = 0.01, *, num_steps: int = 5, **options: Any
) -> MetaAlgorithm:
    """MAML (Finn et al., 2017): SGD of a fixed rate, theta_0 learned, second order.

    ``options`` are those of `learned_init`.
    """
    options = {"differentiation": second_order()} | options
    return learned_init(learner, fixed_sgd(rate), num_steps=num_steps, **options)


@recorded("algorithm")
def fomaml(
    learner: Learner, rate: float = 0.01, *, num_steps: int = 5, **options: Any
) -> MetaAlgorithm:
    """First-order MAML: the meta-gradient is the query gradient at theta_T."""
    options = {"differentiation": first_order()} | options
    return maml(learner, rate, num_steps=num_steps, **options)


@recorded("algorithm")
def anil(
    learner: Learner,
    rate: float = 0.01,
    *,
    num_steps: int = 5,
    head: str = "head",
    **options: Any,
) -> MetaAlgorithm:
    """ANIL (Raghu et al., 2020): MAML whose inner loop adapts the head alone.

    ``head`` is the name in the path of the parameters that adapt; the others are
    learned by the meta-gradient. ``options`` are those of `learned_init`.
    """
    options = {"differentiation": second_order()} | options
    rule = only(fixed_sgd(rate), head)
    return learned_init(learner, rule, num_steps=num_steps, **options)


@recorded("algorithm")
def meta_sgd(
    learner: Learner,
    rate: tuple[float, float] = (0.005, 0.1),
    *,
    num_steps: int = 1,
    **options: Any,
) -> MetaAlgorithm:
    """Meta-SGD (Li et al., 2017): theta_0 and a rate for every parameter, learned."""
    options = {"differentiation": second_order()} | options
    rule = learned_sgd(rate, per="parameter")
    return learned_init(learner, rule, num_steps=num_steps, **options)


@recorded("algorithm")
def from_scratch(
    learner: Learner,
    rule: UpdateRule | optax.GradientTransformation,
    *,
    num_steps: int = 100,
    query_norm: QueryNorm = "support",
    **options: Any,
) -> MetaAlgorithm:
    """A baseline: train a freshly drawn learner on the support set alone."""
    return learned_init(
        learner,
        rule,
        num_steps=num_steps,
        differentiation=first_order(),
        learn_init=False,
        trainable=False,
        query_norm=query_norm,
        **options,
    )


def fixed_sgd(rate: float) -> UpdateRule:
    """SGD with nothing to learn."""
    sgd = learned_sgd()
    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    return UpdateRule(lambda key, params: (), lambda _: sgd.bind(rate), traits)
