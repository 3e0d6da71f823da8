"""The trained methods of the package, by name."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, overload

from metalstm.predictor import Predictor
from metalstm.runtime.files import finished_files
from metalstm.saving import load, read_info

__all__ = ["LearnerCard", "pretrained_learner"]

_SHIPPED = Path(__file__).parent / "shipped"


class LearnerCard(NamedTuple):
    """What to know before using a trained method."""

    name: str
    trained_on: str
    result: str
    limits: str


@overload
def pretrained_learner(
    name: None = None, *, directory: str | Path = ...
) -> tuple[LearnerCard, ...]: ...


@overload
def pretrained_learner(name: str, *, directory: str | Path = ...) -> Predictor: ...


def pretrained_learner(name=None, *, directory=_SHIPPED):
    """Return a trained method, ready to predict; without a name, list them all.

    Its learner and meta-parameters are there to build on::

        trained = metalstm.pretrained_learner("NAME")
        labels = trained(support_images, support_labels, query_images)
        state = metalstm.init_train_state(mine, tx, 0, episode, start=trained.params)

    Args:
      name: one of the names that the list has.
      directory: other files of `metalstm.save` to choose from; their ``info`` has
        ``trained_on``, ``result`` and ``limits``.

    Raises:
      ValueError: there is no trained method of this name.
    """
    files = finished_files(Path(directory), "*.npz")
    if name is None:
        return tuple(_card(*item) for item in files.items())
    if name not in files:
        remedy = (
            f"choose from {', '.join(files)}" if files else "give another directory"
        )
        raise ValueError(
            f"there is no trained method {name!r} in {directory}: {remedy}"
        )
    return load(files[name])


def _card(name: str, path: Path) -> LearnerCard:
    info = read_info(path)
    known = (str(info.get(f, "not stated")) for f in LearnerCard._fields[1:])
    return LearnerCard(name, *known)
