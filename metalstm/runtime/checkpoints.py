"""Checkpoints that a kill at any moment cannot lose, over orbax's V1 API.

orbax writes the arrays (each process its part of what is split over them), gives a
folder its name, the step, only when all of it is written, and removes folders. Added:

- Damage is noticed. Arrays and metadata are compared with digests. A damaged checkpoint
  is skipped with a message, and the one before it is read.
- Saving a step again keeps the old version until the new one has its name.
- An older checkpoint is removed only when the newer one has reached the disk.
- The config is compared before any array is read. Errors name the remedy.
- Each process reads whole arrays: any number of devices and processes can resume.

Every process calls `save` and `restore`, on storage that they share.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import PyTree
from metalstm.checks import check_at_least, check_choice
from metalstm.runtime import checkpoint_format, processes
from metalstm.runtime.saved_config import ConfigMismatch, check_config

__all__ = [
    "Restored",
    "best",
    "latest",
    "read_metadata",
    "restore",
    "save",
    "steps",
]

_SET_ASIDE = ".replaced-"  # the older version of a step, until the newer has its name
Which = Literal["latest", "best"] | int


class Restored(NamedTuple):
    state: PyTree  # the structure of the target
    step: int
    metadata: dict[str, Any]
    message: str | None  # which newer checkpoints could not be read, and why


def steps(directory: str | Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    return sorted(_folders(directory))


def latest(directory: str | Path) -> int | None:
    """Return the newest step, None when there is no checkpoint."""
    return max(steps(directory), default=None)


def best(directory: str | Path) -> int | None:
    """Return the step with the highest ``score=``, the newest of equals, else None."""
    return _best_of(_folders(directory))


def _best_of(folders: Mapping[int, Path]) -> int | None:
    scored = []
    for step, folder in folders.items():
        # unreadable metadata: `restore` says so, this only ranks
        with contextlib.suppress(Exception):
            score = checkpoint_format.read_document(folder)["score"]
            if score is not None and not math.isnan(score):
                scored.append((score, step))
    return max(scored)[1] if scored else None


def read_metadata(directory: str | Path, which: Which = "latest") -> dict[str, Any]:
    """Return the metadata given to `save`, without reading any array.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: it is damaged; or ``which`` is not a choice.
    """
    directory = Path(directory).absolute()
    step = _find(directory, which)
    if step is None:
        raise _missing(directory, which)
    folder = _folders(directory)[step]
    try:
        return checkpoint_format.read_document(folder)["metadata"]
    except checkpoint_format.RefusedError:
        raise
    except Exception as error:  # whatever a broken file makes its reader raise
        raise ValueError(
            f"{_unreadable(folder, 'metadata', error)}; {_remedy(directory, [step])}"
        ) from error


def save(
    directory: str | Path,
    state: PyTree,
    *,
    step: int,
    metadata: Mapping[str, Any] | None = None,
    score: float | None = None,
    keep: int = 2,
) -> Path:
    """Write ``state`` as the checkpoint of ``step``; atomic and synchronous.

    Later steps are removed, since training went back to an earlier one: the newest
    step is always the one that was saved last.

    Args:
      state: any pytree of arrays and numbers. PRNG keys must be raw key data.
      metadata: JSON: the config (under ``"config"``), the validation history and so on.
      score: higher is better; the checkpoint with the highest one is never removed.
      keep: how many of the newest to keep, besides the best.

    Raises:
      ValueError: ``keep`` or ``step`` is out of range, or metadata is not JSON.
      OSError: it cannot be written; older checkpoints are unchanged.
    """
    check_at_least("keep", keep, 1)
    if not isinstance(step, int | np.integer):
        raise ValueError(f"step={step!r}: choose a whole number")
    check_at_least("step", step, 0)
    directory = Path(directory).absolute()
    path = directory / str(step)
    document = checkpoint_format.describe(state, step, score, metadata or {})
    failed = f"checkpoint {path} cannot be written"
    remedy = "free space on its disk, or give a folder that can be written"
    from orbax.checkpoint import v1 as ocp

    try:
        processes.on_main(lambda: _set_aside(directory, step))
        # lightweight: damaged metadata of an older checkpoint must not stop a new one
        with ocp.training.Checkpointer(
            directory, lightweight_initialize=True, cleanup_tmp_directories=True
        ) as checkpointer:
            checkpointer.save(
                step,
                _numbered(jax.tree.leaves(state)),
                force=True,
                overwrite=True,  # there is none: it has been set aside
                custom_metadata=document,
            )
            processes.on_main(lambda: _flush_to_disk(path))
            failed = f"checkpoint {path} is written, but an older one cannot be removed"
            remedy = "free space on its disk"
            processes.on_main(lambda: _clean(directory))
            for old in _superseded(directory, step, keep):
                checkpointer.delete(old, missing_ok=True)
    except Exception as error:  # OSError, or what orbax makes of one
        if processes.is_main():
            with contextlib.suppress(OSError):
                _clean(directory)
        raise OSError(
            f"{failed} ({_first_line(error)}): {remedy} (complete there: "
            f"{_listed(directory)})"
        ) from error
    return path


def restore(
    directory: str | Path,
    target: PyTree | None,
    *,
    which: Which = "latest",
    config: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
) -> Restored:
    """Read a checkpoint into the structure of ``target``.

    Args:
      target: a pytree of arrays or ShapeDtypeStructs; shapes and dtypes must agree. A
        sharding on a leaf is the one its array gets. None: a list of numpy arrays.
      which: "latest" and "best" fall back to the one before when a checkpoint cannot be
        read, and say so in ``message``; a step is that step or an error.
      config: compared with the saved ``metadata["config"]`` before any array is read,
        except for the keys in ``ignore``.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ConfigMismatch: the checkpoint's config differs from ``config``.
      ValueError: all that may be read are damaged; the checkpoint holds other arrays
        than ``target``; or ``which`` is not a choice.
    """
    directory = Path(directory).absolute()
    # shared storage may show a folder to one process before another
    found = [_find(directory, which), steps(directory)]
    first, known = json.loads(processes.from_main(json.dumps(found)))
    if first is None:
        raise _missing(directory, which)
    older = [] if isinstance(which, int) else [s for s in known[::-1] if s != first]
    failures, cause = [], None
    for step in [first, *older]:
        folder = _folders(directory).get(step, directory / str(step))
        failure, part = None, "metadata"
        try:
            document = checkpoint_format.read_document(folder)
            if config is not None:
                saved = document["metadata"].get("config", {})
                check_config(saved, config, ignore=ignore)
            expected = _empty(document) if target is None else target
            checkpoint_format.check_target(document, expected, folder)
            part = "arrays"
            values = _read_arrays(document, folder)
        except (ConfigMismatch, checkpoint_format.RefusedError):
            raise
        except Exception as error:  # whatever a broken file makes its reader raise
            failure = cause = error
        if processes.any_process(failure is not None):
            failures.append(_unreadable(folder, part, failure))
            continue
        leaves, treedef = jax.tree.flatten(expected)
        placed = map(_as_in_target, leaves, values)
        state = jax.tree.unflatten(treedef, placed)
        message = "; ".join([*failures, f"fell back to step {step}"])
        return Restored(
            state, step, document["metadata"], message if failures else None
        )
    tried = [first, *older]
    raise ValueError("; ".join([*failures, _remedy(directory, tried)])) from cause


def _folders(directory: str | Path) -> dict[int, Path]:
    """The folder of each step: a set-aside one only while there is no other."""
    directory, found = Path(directory).absolute(), {}
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        name = path.name.removeprefix(_SET_ASIDE)
        if name.isdecimal():  # set-aside ones come first, for their name has a dot
            found[int(name)] = path
    return found


def _find(directory: str | Path, which: Which) -> int | None:
    if isinstance(which, int):
        return which if which in steps(directory) else None
    check_choice("which", which, ("latest", "best", "the number of a step"))
    step = best(directory) if which == "best" else None
    return latest(directory) if step is None else step


def _missing(directory: str | Path, which: Which) -> FileNotFoundError:
    return FileNotFoundError(
        f"no checkpoint {which!r} in {directory} (steps there: {_listed(directory)})"
    )


def _unreadable(folder: Path, part: str, error: Exception | None) -> str:
    reason = "by another process" if error is None else _first_line(error)
    return f"checkpoint {folder} cannot be read: its {part} are damaged ({reason})"


def _remedy(directory: Path, tried: list[int]) -> str:
    left = [step for step in steps(directory) if step not in tried]
    if left:
        return f"choose another step ({', '.join(map(str, left))})"
    return "no other one is left: start again in another folder"


def _listed(directory: str | Path) -> str:
    return ", ".join(map(str, steps(directory))) or "none"


def _set_aside(directory: Path, step: int) -> None:
    path, aside = directory / str(step), directory / f"{_SET_ASIDE}{step}"
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def _superseded(directory: Path, newest: int, keep: int) -> list[int]:
    # A later step could not be read, or training went back to an earlier one. It must
    # not count among the newest, or remove what was just written.
    folders = _folders(directory)
    earlier = {step: path for step, path in folders.items() if step <= newest}
    stay = {*sorted(earlier)[-keep:], _best_of(earlier)}
    superseded = [step for step in folders if step not in stay]
    return json.loads(processes.from_main(json.dumps(superseded)))


def _clean(directory: Path) -> None:
    """Remove what is incomplete; give set-aside folders their name back if unused."""
    for path in directory.glob("*.orbax-checkpoint-tmp*"):
        shutil.rmtree(path, ignore_errors=True)
    for aside in directory.glob(_SET_ASIDE + "*"):
        path = directory / aside.name.removeprefix(_SET_ASIDE)
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def _flush_to_disk(folder: Path) -> None:
    """Flush a checkpoint to disk before an older one is removed: power may fail."""
    for path in (folder, *folder.rglob("*"), folder.parent):
        with contextlib.suppress(OSError):  # not every file system syncs folders
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    # Numbers as names: the structure is the target's business, so that a renamed field
    # does not make a file unreadable. Arrays without entries are not worth a file.
    # Of several processes, orbax refuses one's own arrays: process 0 writes those.
    def for_orbax(leaf: Any) -> Any:
        alone = jax.process_count() == 1
        if isinstance(leaf, jax.Array) and (alone or not leaf.is_fully_addressable):
            return leaf
        return np.asarray(leaf, checkpoint_format.dtype_of(leaf))

    return {f"{i:06d}": for_orbax(x) for i, x in enumerate(leaves) if np.size(x)}


def _empty(document: dict[str, Any]) -> list[np.ndarray]:
    return [np.empty(shape, dtype) for _, shape, dtype in document["leaves"]]


def _read_arrays(document: dict[str, Any], folder: Path) -> list[np.ndarray]:
    """Whole arrays, in this process's memory, compared with their digest."""
    from orbax.checkpoint import v1 as ocp

    # this process reads without waiting for others: one may fail
    context, me = ocp.Context(), jax.process_index()
    context.multiprocessing.primary_host = me
    context.multiprocessing.active_processes = {me}
    empty = _empty(document)
    with context:
        read = ocp.load(folder, _numbered(empty))
    values = [np.asarray(read.get(f"{i:06d}", x)) for i, x in enumerate(empty)]
    if checkpoint_format.digest(values) != document["arrays"]:
        raise OSError("its arrays do not agree with their digest")
    return values


def _as_in_target(leaf: Any, value: np.ndarray) -> Any:
    """The value as an array, or a number, of the target's kind and place."""
    if isinstance(leaf, int | float):
        return type(leaf)(value)
    if isinstance(leaf, np.ndarray | np.generic):
        return value
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        # committed to no device, as a new state is: programs compiled before serve it
        return jnp.array(value)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
