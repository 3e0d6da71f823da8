"""Programs in files, which JAX alone can run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from metalstm.runtime.files import atomic_write

__all__ = ["export_program"]


def export_program(
    path: str | Path,
    make: Callable[..., Callable[..., jax.Array]],
    *fixed: Any,
    last: Any,
    num_last: int | None,
    platforms: Sequence[str],
) -> Path:
    """Write a jitted function to a file, for `jax.export.deserialize`.

    Args:
      make: returns the function, given the shape of its last argument.
      fixed: shapes and types of the arguments before, pytrees of them.
      last: likewise of one of what the last argument has many of.
      num_last: how many it has; None: any number.
      platforms: what it runs on.

    Raises:
      ValueError: it cannot be written for any number.
      ImportError: flatbuffers is not installed.
    """
    from jax import export  # which is slow to import

    (num,) = export.symbolic_shape("M") if num_last is None else (num_last,)
    many = jax.tree.map(
        lambda one: jax.ShapeDtypeStruct((num, *one.shape), one.dtype), last
    )
    try:
        program = jax.jit(make(many))
        exported = export.export(program, platforms=tuple(platforms))(*fixed, many)
    except Exception as error:  # whatever a shape that is not a number leads to
        if num_last is not None:
            raise
        raise ValueError(
            "this method cannot be exported for any number of queries "
            f"({type(error).__name__}): give num_queries"
        ) from error
    try:
        data = exported.serialize()
    except ImportError as error:
        raise ImportError(
            "writing a program needs flatbuffers: pip install 'metalstm[export]'"
        ) from error
    path = Path(path)
    with atomic_write(path) as part:
        part.write_bytes(data)
    return path
