"""Checkpoints that a kill at any moment cannot lose, over orbax.

A directory holds one folder per step: the arrays of any pytree (orbax) and
``metadata.json``. A folder gets its name only when everything in it is written, and an
older one is removed only after that. `restore` checks the arrays and the metadata
against digests, so a truncated or altered file is noticed, and then goes back to the
checkpoint before it.

In a multi-process run every process calls `save` and `restore`, on storage they share.
Each writes its part of what is split over them, process 0 the rest: it names, removes
and writes the metadata. Each reads whole arrays, so that other numbers of devices and
processes can go on, and they agree on which checkpoint that is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from metalstm.base import PyTree
from metalstm.runtime import sharding

__all__ = [
    "ConfigMismatch",
    "Restored",
    "best",
    "check_config",
    "latest",
    "read_metadata",
    "restore",
    "save",
    "steps",
]

FORMAT_VERSION = 1
_WRITING, _REMOVING, _REPLACED = ".writing-", ".removing-", ".replaced-"


class ConfigMismatch(ValueError):  # noqa: N818 (reads as what it is)
    """A checkpoint or a run folder belongs to another configuration."""


class Restored(NamedTuple):
    state: PyTree  # the structure of the target
    step: int
    metadata: dict[str, Any]
    message: str | None  # which newer checkpoints could not be read, and why


def steps(directory: str | Path) -> list[int]:
    """Return the steps of all complete checkpoints, ascending."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    names = [p.name.removeprefix(_REPLACED) for p in directory.iterdir()]
    return sorted({int(name) for name in names if name.isdecimal()})


def latest(directory: str | Path) -> int | None:
    """Return the newest step, None when there is no checkpoint."""
    return max(steps(directory), default=None)


def best(directory: str | Path) -> int | None:
    """Return the step with the highest ``score=``, the newest of equals, else None."""
    scored = []
    for step in steps(directory):
        try:
            score = _read_json(_path(directory, step))["score"]
        except (OSError, ValueError, KeyError):
            continue  # unreadable metadata: `restore` says so, this only ranks
        if score is not None:
            scored.append((score, step))
    return max(scored)[1] if scored else None


def read_metadata(
    directory: str | Path, which: Literal["latest", "best"] | int = "latest"
) -> dict[str, Any]:
    """Return the metadata given to `save`, without reading any array.

    Raises:
      FileNotFoundError: there is no such checkpoint.
    """
    return _read_json(_path(directory, _find(directory, which)))["metadata"]


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

    Later steps, which training must have gone back behind, are removed: the newest is
    what was saved last.

    Args:
      state: any pytree of arrays and numbers. PRNG keys must be raw key data.
      metadata: JSON: the config (under ``"config"``), the validation history and so on.
      score: higher is better; the checkpoint with the highest one is never removed.
      keep: how many of the newest to keep beside the best.

    Raises:
      ValueError: ``keep`` or ``step`` is out of range, or metadata is not JSON.
      OSError: it cannot be written; what was there before is as it was.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least the newest checkpoint must stay")
    if step < 0:
        raise ValueError(f"step={step}: steps count from 0")
    directory = Path(directory).absolute()
    names, leaves = _flatten(state)
    document = {
        "format": FORMAT_VERSION,
        "step": step,
        "score": None if score is None else float(score),
        "metadata": dict(metadata or {}),
        "leaves": [_describe(n, v) for n, v in zip(names, leaves, strict=True)],
    }
    try:
        document = json.loads(json.dumps(document))  # as `_read_json` will see it
    except TypeError as error:
        raise ValueError(f"metadata must be JSON: {error}") from error
    document["digest"] = _digest_of_json(document)
    text = json.dumps(document, indent=1)
    try:
        _write(directory, step, text, leaves)
    except Exception as error:  # OSError, or what orbax makes of one
        raise OSError(
            f"checkpoint {directory / str(step)} cannot be written "
            f"({_first_line(error)}): free space on its disk, or give a folder that "
            f"can be written (complete there: {_listed(directory)})"
        ) from error
    if sharding.is_main():
        try:
            _prune(directory, step, keep)
        except OSError as error:
            raise OSError(
                f"checkpoint {directory / str(step)} is written, but an older one "
                f"cannot be removed ({_first_line(error)}): free space on its disk"
            ) from error
    _barrier("checkpoint-end")
    return directory / str(step)


def restore(
    directory: str | Path,
    target: PyTree,
    *,
    which: Literal["latest", "best"] | int = "latest",
    config: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
) -> Restored:
    """Read a checkpoint into the structure of ``target``.

    Args:
      target: a pytree of arrays or ShapeDtypeStructs; shapes and dtypes must agree. A
        sharding on a leaf is the one its array gets.
      which: "latest" and "best" go back to the one before when a checkpoint cannot be
        read, and say so in ``message``; a step is that step or an error.
      config: compared first, but for the keys in ``ignore``, with the saved
        ``metadata["config"]``.

    Raises:
      FileNotFoundError: no checkpoint, or none that can be read.
      ConfigMismatch: the checkpoint's config differs from ``config``.
      ValueError: the checkpoint holds other arrays than ``target``.
    """
    directory = Path(directory).absolute()
    # shared storage may show a folder to one process before another
    first = json.loads(sharding.from_main(json.dumps(_look_for(directory, which))))
    if first is None:
        raise _missing(directory, which)
    candidates = [first]
    if not isinstance(which, int):
        others = json.loads(sharding.from_main(json.dumps(steps(directory))))
        candidates += [s for s in reversed(others) if s != first]
    failures = []
    for step in candidates:
        path = _path(directory, step)
        try:
            document = _read_json(path)
            if config is not None:
                check_config(
                    document["metadata"].get("config", {}), config, ignore=ignore
                )
            _check_target(document["leaves"], target, path)
            read = _read_arrays(path, document["leaves"], target)
            failure = None
        except (ConfigMismatch, _TargetMismatchError):
            raise
        except Exception as error:  # whatever a broken file makes its reader raise
            failure = _first_line(error)
        if sharding.any_process(failure is not None):
            failure = failure or "by another process"
            failures.append(f"checkpoint {path} cannot be read ({failure})")
            continue
        state = jax.tree.map(_like, target, read)
        message = None
        if failures:
            message = "; ".join([*failures, f"went back to step {step}"])
        return Restored(state, step, document["metadata"], message)
    raise FileNotFoundError(
        "; ".join(failures) + "; no earlier one is left: start again in another folder"
    )


def check_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, ignore: Iterable[str] = ()
) -> None:
    """Raise `ConfigMismatch` with one line per differing entry.

    Nested mappings are compared entry by entry under dotted names; ``ignore`` holds
    dotted names. Both sides are compared as JSON, so tuples equal lists.
    """
    ignored = set(ignore)
    old, new = _flat_json(saved), _flat_json(current)
    absent = "(absent)"
    lines = [
        f"  {name}: saved {old.get(name, absent)}, now {new.get(name, absent)}"
        for name in sorted(old.keys() | new.keys())
        if name not in ignored and old.get(name, absent) != new.get(name, absent)
    ]
    if lines:
        raise ConfigMismatch(
            "the saved config differs:\n"
            + "\n".join(lines)
            + "\nuse the saved values, or another folder"
        )


class _TargetMismatchError(ValueError):
    pass


def _write(directory: Path, step: int, text: str, leaves: list[Any]) -> None:
    writing = directory / f"{_WRITING}{step}"
    try:
        if sharding.is_main():
            directory.mkdir(parents=True, exist_ok=True)
            _clean(directory)
            writing.mkdir()
        _barrier("checkpoint-begin")
        with _checkpointer() as checkpointer:
            checkpointer.save(writing / "state", _numbered(leaves))
        if sharding.is_main():
            (writing / "metadata.json").write_text(text)
            _flush_to_disk(writing)
            _give_name(writing, directory / str(step))
    except Exception:
        if (
            sharding.is_main()
        ):  # half a checkpoint takes space that may be what is missing
            shutil.rmtree(writing, ignore_errors=True)
        raise


def _flush_to_disk(folder: Path) -> None:
    """Have files reach the disk before their folder's name does: power may fail."""
    inside = list(folder.rglob("*"))
    for path in (p for p in inside if p.is_file()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    for path in (p for p in (*inside, folder) if p.is_dir()):
        with contextlib.suppress(OSError):  # not every file system syncs folders
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _flatten(state: PyTree) -> tuple[list[str], list[Any]]:
    with_path = jax.tree_util.tree_flatten_with_path(state)[0]
    return [jax.tree_util.keystr(p) for p, _ in with_path], [v for _, v in with_path]


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    # Numbers as names: the structure is the target's business, so that orbax need not
    # know NamedTuples, and a renamed field does not make a file unreadable. It refuses
    # arrays without entries, of which there is nothing to save.
    # Where there are several processes it refuses a process's own arrays too: process 0
    # writes those.
    def shared(leaf: Any) -> bool:
        alone = jax.process_count() == 1
        return isinstance(leaf, jax.Array) and (alone or not leaf.is_fully_addressable)

    return {
        f"{i:06d}": leaf if shared(leaf) else np.asarray(leaf, _dtype(leaf))
        for i, leaf in enumerate(leaves)
        if np.size(leaf)
    }


def _describe(name: str, leaf: Any) -> dict[str, Any]:
    shape, dtype = list(np.shape(leaf)), str(_dtype(leaf))
    return {"name": name, "shape": shape, "dtype": dtype, "digest": _digest(leaf)}


def _dtype(leaf: Any) -> np.dtype:
    # A Python number is stored as JAX sees it, so that an abstract target agrees.
    return np.dtype(
        leaf.dtype if hasattr(leaf, "dtype") else jax.numpy.result_type(leaf)
    )


def _digest(leaf: Any) -> str:
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        return _digest_of_rows(_rows_of_all_processes(leaf))
    data = np.ascontiguousarray(np.asarray(leaf, _dtype(leaf))).tobytes()
    return _hash(data)


# A digest of digests, for an array that no process has all of.
_ROWS = "rows:"


def _digest_of_rows(rows: np.ndarray) -> str:
    """Of [N, 2] uint32, a digest for each entry of the leading axis."""
    return _ROWS + _hash(rows.tobytes())


def _rows(value: np.ndarray) -> np.ndarray:
    digests = [
        bytes.fromhex(_hash(np.ascontiguousarray(row).tobytes())) for row in value
    ]
    return np.frombuffer(b"".join(digests), np.uint32).reshape(-1, 2)


def _rows_of_all_processes(leaf: jax.Array) -> np.ndarray:
    from jax.experimental import multihost_utils

    rows = np.zeros((leaf.shape[0], 2), np.uint32)
    for shard in leaf.addressable_shards:
        if shard.data.shape[1:] != leaf.shape[1:]:
            raise ValueError(
                f"an array {leaf.shape} is split over more than its leading axis: "
                "split tasks alone (metalstm.runtime.sharding.place)"
            )
        rows[shard.index[0]] = _rows(np.asarray(shard.data))
    # every row is another process's zeros
    return multihost_utils.process_allgather(rows).max(0)


def _agrees(value: np.ndarray, digest: str | None) -> bool:
    if digest is None:  # of a split array, before there were digests of rows
        return True
    if digest.startswith(_ROWS):
        return digest == _digest_of_rows(_rows(value))
    return digest == _digest(value)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _check_target(saved: list[dict], target: PyTree, path: Path) -> None:
    names, leaves = _flatten(target)
    if len(saved) != len(leaves):
        raise _TargetMismatchError(
            f"{path} holds {len(saved)} arrays where {len(leaves)} are expected: "
            "restore with the algorithm, learner and optimizer that wrote it"
        )
    for entry, name, leaf in zip(saved, names, leaves, strict=True):
        found = (tuple(entry["shape"]), entry["dtype"])
        expected = (tuple(np.shape(leaf)), str(_dtype(leaf)))
        if found != expected:
            raise _TargetMismatchError(
                f"{path} holds {entry['name']} as {found} where {name} is {expected}: "
                "restore with the algorithm, learner and optimizer that wrote it"
            )


def _read_arrays(path: Path, saved: list[dict], target: PyTree) -> PyTree:
    """Whole arrays, in this process's memory, each compared with its digest."""
    leaves, treedef = jax.tree.flatten(target)
    empty = [np.empty(np.shape(leaf), _dtype(leaf)) for leaf in leaves]
    wanted = {f"{i:06d}": leaf for i, leaf in enumerate(empty) if leaf.size}
    with _checkpointer(alone=True) as checkpointer:
        read = checkpointer.restore(path / "state", wanted)
    values = [np.asarray(read.get(f"{i:06d}", leaf)) for i, leaf in enumerate(empty)]
    for entry, value in zip(saved, values, strict=True):
        if not _agrees(value, entry["digest"]):
            raise OSError(f"{entry['name']} does not agree with its digest")
    return jax.tree.unflatten(treedef, values)


def _like(leaf: Any, value: np.ndarray) -> Any:
    """The value as an array, or a number, of the target's kind and place."""
    if isinstance(leaf, int | float):
        return type(leaf)(value)
    if isinstance(leaf, np.ndarray | np.generic):
        return value
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, "sharding", None) or here
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def _checkpointer(*, alone: bool = False):
    """With ``alone``, a process reads without waiting for others: one may fail."""
    import orbax.checkpoint as ocp

    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me if alone else 0, active_processes={me} if alone else None
    )
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


def _find(directory: str | Path, which: Literal["latest", "best"] | int) -> int:
    step = _look_for(directory, which)
    if step is None:
        raise _missing(directory, which)
    return step


def _look_for(
    directory: str | Path, which: Literal["latest", "best"] | int
) -> int | None:
    if which == "best":
        step = best(directory)
        step = latest(directory) if step is None else step
    elif which == "latest":
        step = latest(directory)
    else:
        step = which if which in steps(directory) else None
    return step


def _missing(directory: str | Path, which: Any) -> FileNotFoundError:
    return FileNotFoundError(
        f"no checkpoint {which!r} in {directory} (steps there: {_listed(directory)})"
    )


def _listed(directory: str | Path) -> str:
    return ", ".join(map(str, steps(directory))) or "none"


def _path(directory: str | Path, step: int) -> Path:
    path = Path(directory) / str(step)
    return path if path.exists() else Path(directory) / f"{_REPLACED}{step}"


def _give_name(writing: Path, path: Path) -> None:
    # Saving a step twice replaces it. No moment is without one of the two: until the
    # second rename, readers find the old one under its other name.
    replaced = path.with_name(_REPLACED + path.name)
    if path.exists():
        os.rename(path, replaced)
    os.rename(writing, path)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(directory: Path, newest: int, keep: int) -> None:
    # A later step is one that could not be read, or was gone back behind on purpose.
    # It must not count among the newest, or push out what was just written.
    for step in steps(directory):
        if step > newest:
            _remove(directory, step)
    stay = {*steps(directory)[-keep:], best(directory)}
    for step in steps(directory):
        if step not in stay:
            _remove(directory, step)


def _remove(directory: Path, step: int) -> None:
    # Renamed first: a kill half way must not leave what looks complete.
    doomed = directory / f"{_REMOVING}{step}"
    os.rename(directory / str(step), doomed)
    shutil.rmtree(doomed)


def _clean(directory: Path) -> None:
    """Finish what a killed `save` left."""
    for left_over in directory.glob(_REPLACED + "*"):
        path = directory / left_over.name.removeprefix(_REPLACED)
        if path.exists():
            shutil.rmtree(left_over)
        else:
            os.rename(left_over, path)
    for prefix in (_WRITING, _REMOVING):
        for left_over in directory.glob(prefix + "*"):
            shutil.rmtree(left_over)


def _read_json(path: Path) -> dict[str, Any]:
    """The metadata file; raises ValueError when it is not what `save` wrote."""
    document = json.loads((path / "metadata.json").read_bytes())
    if not isinstance(document, dict):
        raise ValueError("metadata.json is not what save writes")
    # files written before there was a digest have none
    digest = document.pop("digest", None)
    if digest is not None and digest != _digest_of_json(document):
        raise ValueError("metadata.json does not agree with its digest")
    return document


def _digest_of_json(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[
        :16
    ]


def _flat_json(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat_json(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value, sort_keys=True, default=str)
    return flat


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
