"""A checkpoint's description of itself: its format, its arrays and their digests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalstm.base import PyTree

__all__ = [
    "FORMAT_VERSION",
    "RefusedError",
    "check_target",
    "describe",
    "digest",
    "digest_of_json",
    "dtype_of",
    "read_document",
]

# 1 had a metadata.json of its own, and digests of each array
FORMAT_VERSION = 2


class RefusedError(ValueError):
    """A checkpoint that is complete but not the one that was asked for."""


def describe(
    state: PyTree, step: int, score: float | None, metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """What orbax keeps as the metadata of a checkpoint."""
    document = {
        "format": FORMAT_VERSION,
        "step": int(step),
        "score": None if score is None else float(score),
        "metadata": dict(metadata),
        "leaves": _signature(state),
        "arrays": digest(_whole(leaf) for leaf in jax.tree.leaves(state)),
    }
    try:
        document = json.loads(json.dumps(document))  # as `read_document` will see it
    except TypeError as error:
        raise ValueError(f"metadata must be JSON: {error}") from error
    return document | {"digest": digest_of_json(document)}


def read_document(folder: Path) -> dict[str, Any]:
    """What `describe` made; raises ValueError when it is anything else."""
    from orbax.checkpoint import v1 as ocp

    document = dict(ocp.metadata(folder).custom_metadata or {})
    if document.pop("digest", None) != digest_of_json(document):
        raise ValueError("its metadata do not agree with their digest")
    if document["format"] != FORMAT_VERSION:
        raise RefusedError(
            f"{folder} has format {document['format']}, and this version of metalstm "
            f"reads {FORMAT_VERSION}: use the version that wrote it"
        )
    return document


def check_target(document: dict[str, Any], target: PyTree, folder: Path) -> None:
    saved, expected = document["leaves"], _signature(target)
    remedy = "restore with the algorithm, learner and optimizer that wrote it"
    if len(saved) != len(expected):
        raise RefusedError(
            f"{folder} holds {len(saved)} arrays where {len(expected)} are expected: "
            f"{remedy}"
        )
    for (saved_name, *found), (name, *wanted) in zip(saved, expected, strict=True):
        if found != wanted:
            raise RefusedError(
                f"{folder} holds {saved_name} as {found} where {name} is {wanted}: "
                f"{remedy}"
            )


def digest_of_json(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def digest(arrays: Iterable[np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def _signature(tree: PyTree) -> list[list[Any]]:
    """Name, shape and dtype of each leaf."""
    return [
        [jax.tree_util.keystr(path), list(np.shape(leaf)), str(dtype_of(leaf))]
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def dtype_of(leaf: Any) -> np.dtype:
    # A Python number is stored as JAX sees it, so that an abstract target agrees.
    return np.dtype(getattr(leaf, "dtype", None) or jax.numpy.result_type(leaf))


def _whole(leaf: Any) -> np.ndarray:
    """All of an array, also of one that no process has whole."""
    if isinstance(leaf, jax.Array) and not (
        leaf.is_fully_addressable or leaf.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf, dtype_of(leaf))
