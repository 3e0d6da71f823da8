"""Options that are read from a constructor: its arguments, defaults and docstring.

They come from its source, not from the function: to import it is to import jax, and
--help is to be quick.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from experiments.common.cli import Options

__all__ = ["options_of"]

_LIBRARY = Path(__file__).parents[2] / "metalstm"
_TYPES = {kind.__name__: kind for kind in (bool, dict, float, int, str, tuple)}


class _Sequences(ast.NodeTransformer):
    """``Sequence[int]`` as ``tuple[int, ...]``: options cannot change."""

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id == "Sequence":
            item = ast.unparse(node.slice)
            return ast.parse(f"tuple[{item}, ...]", mode="eval").body
        return node


def options_of(
    path: str,
    name: str,
    *,
    omit: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    **kind: Any,
) -> Any:
    """Options with the arguments of a function of ``metalstm/PATH``, but for some.

    Args:
      omit: arguments that are no options.
      defaults: of arguments that have none, or another here.
      kind: of `msgspec.defstruct`, such as ``tag`` and ``tag_field``.
    """
    tree = ast.parse((_LIBRARY / path).read_text())
    function = next(
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    given = function.args
    at_end = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    pairs = [*zip(given.args, at_end, strict=True)]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    fields = []
    for argument, default in pairs:
        if argument.arg in omit:
            continue
        assert argument.annotation is not None
        annotation = ast.unparse(_Sequences().visit(argument.annotation))
        value = ast.literal_eval(default) if default is not None else None
        value = (defaults or {}).get(argument.arg, value)
        fields.append(
            (argument.arg, eval(annotation, {"Literal": Literal, **_TYPES}), value)
        )
    said = (ast.get_docstring(function) or "").split("\n\n")
    help_text = [said[0], *(part for part in said if part.startswith("Args:"))]
    return msgspec.defstruct(
        "".join(part.title() for part in name.split("_")),
        fields,
        bases=(Options,),
        frozen=True,
        namespace={"__doc__": "\n\n".join(help_text)},
        **kind,
    )
