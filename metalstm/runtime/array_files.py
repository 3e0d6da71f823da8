"""Arrays and JSON in one file: a ``.npz`` with a header and a digest.

Nothing in it is ever unpickled or evaluated, and its size is known before it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalstm.runtime.files import atomic_write

__all__ = ["as_json", "digest_of", "named_leaves", "read_members", "write_members"]

HEADER = "header"
MAX_HEADER_BYTES = 2**20


def write_members(
    path: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays and a JSON header, completely or not at all."""
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    # a file, not a name: to one without .npz numpy would add it
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **{HEADER: text}, **arrays)  # type: ignore[arg-type]


def read_members(
    path: Path,
    what: str,
    *,
    remedy: str,
    dtypes: Iterable[Any],
    max_bytes: int,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the header and the arrays of a file, by name.

    Args:
      what: kind of file, for messages: ``path`` is not a ``what`` file.
      remedy: in messages: how to get one.
      dtypes: the types that its arrays may have.
      max_bytes: the most that it may hold.

    Raises:
      ValueError: it is no such file, or is damaged or too large.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if sum(entry.file_size for entry in entries) > max_bytes:
                raise ValueError(f"it holds more than {max_bytes >> 20} MiB")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it is compressed")  # its true size is unknown
            names = [entry.filename.removesuffix(".npy") for entry in entries]
            if len(set(names)) < len(names):
                raise ValueError("two of its arrays have one name")
            allowed = {np.dtype(dtype) for dtype in (*dtypes, np.uint8)}
            arrays = {
                name: _parse_npy(archive.read(entry), allowed)
                for name, entry in zip(names, entries, strict=True)
            }
    except Exception as error:  # zipfile and numpy have a dozen kinds for a bad file
        raise ValueError(
            f"{path} is not a {what} file, or is cut short or damaged ({error}): "
            f"{remedy}, or copy it again"
        ) from error
    raw = arrays.pop(HEADER, None)
    if raw is None:
        raise ValueError(f"{path} is not a {what} file: it has no {HEADER}; {remedy}")
    try:
        if raw.nbytes > MAX_HEADER_BYTES:
            raise ValueError(f"more than {MAX_HEADER_BYTES} bytes")
        header = json.loads(raw.tobytes())
        json.dumps(header)  # the digest will
        header.items()
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} has a header that cannot be read ({error}): copy it again"
        ) from error
    return header, arrays


def _parse_npy(data: bytes, dtypes: set[np.dtype]) -> np.ndarray:
    """A .npy, read without the allocation its header asks for before it is checked."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array has a layout that is never written")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran or dtype not in dtypes:
        raise ValueError(f"an array is of {dtype}")
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(shape)


def named_leaves(tree: Any, prefix: str = "params") -> dict[str, Any]:
    """Return the leaves of a pytree by their paths."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {prefix + jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def differences(expected: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Say what arrays, by name, are in place of others; "" if all are the same."""
    names = sorted(expected.keys() | given.keys())
    return ", ".join(
        f"{name} is {given.get(name, 'missing')} in place of "
        f"{expected.get(name, 'nothing')}"
        for name in [n for n in names if expected.get(n) != given.get(n)][:3]
    )


def as_json(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping as JSON has it; raises ValueError when it is not JSON."""
    try:
        return json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}= must be JSON: {error}") from error


def digest_of(header: Any, arrays: Mapping[str, np.ndarray]) -> str:
    """Of everything that a reader relies on, in a fixed order."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
