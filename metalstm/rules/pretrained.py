"""The trained rules of the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, overload

import optax

from metalstm.rules.fallback import with_fallback
from metalstm.rules.io import SHIPPED, load_rule
from metalstm.rules.progress import with_progress
from metalstm.runtime.files import finished_files

__all__ = ["RuleCard", "pretrained_optimizer"]


class RuleCard(NamedTuple):
    """What to know before using a rule."""

    name: str
    trained_on: str
    limits: str
    cost: str  # of one update


@overload
def pretrained_optimizer(
    name: None = None, *, directory: str | Path = ...
) -> tuple[RuleCard, ...]: ...


@overload
def pretrained_optimizer(
    name: str,
    *,
    num_steps: int | None = ...,
    fallback: bool = ...,
    directory: str | Path = ...,
) -> optax.GradientTransformationExtraArgs: ...


def pretrained_optimizer(
    name=None, *, num_steps=None, fallback=False, directory=SHIPPED
):
    """Return a trained rule as an optax transform; without a name, list them all.

    These rules do not read the loss, so they work wherever an optax optimizer does::

        learned = metalstm.pretrained_optimizer("l2l-mnist")
        tx = optax.chain(optax.clip_by_global_norm(1.0), learned)

    Args:
      name: one of the names that the list has.
      num_steps: updates of the whole training, for a rule that anneals its steps by
        `metalstm.rules.with_progress`; the others ignore it. None: such a rule does not
        anneal, and a schedule of one's own goes around it. The state holds it, so a
        restored state keeps the number that it was made with.
      fallback: blend its updates with AdamW's while they make the loss rise, by
        `metalstm.rules.with_fallback`; then ``update`` needs ``value=loss``.
      directory: other rule files (see `metalstm.save_rule`) to choose from; their
        ``info`` has ``trained_on``, ``limits`` and ``cost``.

    Raises:
      ValueError: there is no rule of this name, or ``num_steps`` is no integer above 0.
    """
    files = finished_files(Path(directory), "*.npz")
    if name is None:
        return tuple(_card(*item) for item in files.items())
    if name not in files:
        remedy = (
            f"choose from {', '.join(files)}" if files else "give another directory"
        )
        raise ValueError(f"there is no trained rule {name!r} in {directory}: {remedy}")
    learned = load_rule(files[name]).transform()
    if num_steps is not None:
        learned = with_progress(learned, num_steps)
    return with_fallback(learned) if fallback else learned


def _card(name: str, path: Path) -> RuleCard:
    info = load_rule(path).info
    known = (str(info.get(f, "not stated")) for f in ("trained_on", "limits", "cost"))
    return RuleCard(name, *known)
