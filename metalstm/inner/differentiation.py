"""How to differentiate an inner loop: one value, an argument of the loop."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from metalstm.checks import check_at_least, check_choice

__all__ = ["Differentiation", "Keep", "first_order", "second_order"]

Keep = Literal["all", "remat", "mixed", "segments"]
"""What is stored of the steps for the backward pass; see docs/memory.md.

``all``: everything they computed. ``remat``: theta_t and the rule's state; each step is
recomputed. ``mixed``: these and the gradients; of a step only the rule is recomputed,
and the derivative of its gradient is taken forward over reverse (`mixed_mode`), which
stores nothing of the learner. ``segments``: the state at the start of every segment of
about sqrt(T) steps; each segment is recomputed, as ``mixed``. Values stay the same.
"""


@dataclasses.dataclass(frozen=True)
class Differentiation:
    """How the outer derivative goes through T updates; made by the two functions below.

    Raises:
      ValueError: a field outside its choices.
    """

    order: Literal["first", "second"]
    keep: Keep
    last: int | None = None  # second order through the last so many updates only
    truncate_every: int | None = None

    def __post_init__(self):
        check_choice("order", self.order, ("first", "second"))
        check_choice("keep", self.keep, get_args(Keep))
        if self.last is not None:
            check_at_least("last", self.last, 1, "or None")
            if self.order == "first":
                raise ValueError(
                    f"last={self.last} needs second order: choose second_order(last=..)"
                )
        if self.truncate_every is not None:
            check_at_least("truncate_every", self.truncate_every, 1, "or None")


def first_order(
    keep: Keep = "all", truncate_every: int | None = None
) -> Differentiation:
    """Differentiate through the rule, the inner gradients being constants.

    Constants are the gradient, the loss that the rule reads and the batch statistics.
    theta and the rule's state are not: theta_0 keeps its gradient, and every loss its
    first derivative by theta_t.

    Args:
      keep: what is stored for the backward pass: `Keep`. A coordinate-wise rule is
        replayed in blocks of coordinates whatever is kept.
      truncate_every: make the parameters, the rule's state and the statistics constants
        before every so many-th update (truncated back-propagation through time). It is
        for objectives over the whole trajectory: theta_T no longer depends on theta_0.

    >>> first_order().keep
    'all'
    """
    return Differentiation("first", keep, None, truncate_every)


def second_order(
    keep: Keep = "mixed", last: int | None = None, truncate_every: int | None = None
) -> Differentiation:
    """Differentiate through the inner gradients too.

    Args:
      keep: what is stored for the backward pass: `Keep`. ``mixed`` was the fastest as
        well, but it has no `jax.jvp`: ``remat`` has.
      last: second order through the last so many updates only; the gradients of earlier
        ones are constants, as in first order. None: all of them.
      truncate_every: as in `first_order`.

    >>> second_order(last=2)
    Differentiation(order='second', keep='mixed', last=2, truncate_every=None)
    """
    return Differentiation("second", keep, last, truncate_every)
