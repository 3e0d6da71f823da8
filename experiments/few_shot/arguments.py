"""What the options of every method are: the arguments of its constructor.

What follows from other options (``num_classes`` from the data, a rule's number of steps
from the inner loop's) is no option: `Arguments.arguments` adds it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from experiments.few_shot.options import Learner

Spec = dict[str, Any]
QueryNorm = Literal["support", "support+1", "transductive", "frozen"]


class Given(NamedTuple):
    """What arguments follow from besides a method's own options."""

    way: int
    learner: Learner
    num_classes: int  # of the meta-train split, which transfer methods pre-train on
    train_shots: int | None = None


@dataclass(frozen=True)
class Arguments:
    """Options of a method; the fields are its constructor's arguments."""

    constructor: ClassVar[str]
    own_only: ClassVar[tuple[str, ...]] = ()  # not set by a flag for all methods
    features: ClassVar[bool] = False  # whether the learner has no head

    def arguments(self, given: Given) -> Spec:
        del given
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def head_of(given: Given, *, features: bool) -> Spec:
    """The ``learner`` argument: the network with its head, or up to its features."""
    options = dict(vars(given.learner))
    tied = options.pop("tied_head") and not features
    way = None if tied or features else given.way
    learner = {"learner": options.pop("learner"), "num_classes": way, **options}
    return {"learner": {"learner": "tied_head", "body": learner} if tied else learner}
