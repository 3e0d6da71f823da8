"""A part of a module's parameters, by an nnx filter."""

from __future__ import annotations

from typing import Any, NoReturn

from flax import traverse_util

from metalstm.base import PyTree

__all__ = ["joined", "raise_nothing_selected", "selected"]


def selected(params: PyTree, wrt: Any) -> tuple[PyTree, PyTree]:
    """Split nested dicts of parameters into those that ``wrt`` selects and the others.

    Raises:
      ValueError: it selects none.
    """
    from flax import nnx

    is_selected = nnx.filterlib.to_predicate(wrt)
    chosen: dict = {}
    others: dict = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        (chosen if is_selected(path, leaf) else others)[path] = leaf
    if not chosen:
        raise_nothing_selected(wrt, params)
    return traverse_util.unflatten_dict(chosen), traverse_util.unflatten_dict(others)


def joined(chosen: PyTree, others: PyTree) -> PyTree:
    """Undo `selected`."""
    flat = traverse_util.flatten_dict(chosen) | traverse_util.flatten_dict(others)
    return traverse_util.unflatten_dict(flat)


def raise_nothing_selected(wrt: Any, params: PyTree) -> NoReturn:
    paths = (".".join(map(str, path)) for path in traverse_util.flatten_dict(params))
    raise ValueError(
        f"wrt={wrt!r} selects no parameter of {', '.join(paths)}: give an nnx filter, "
        "such as nnx.LoRAParam, nnx.PathContains('head') or a function of "
        "(path, parameter)"
    )
