"""Options that are read from constructors: their arguments, defaults and docstrings.

They come from the source, not from the functions: to import these is to import jax, and
--help is to be quick.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from experiments.common.cli import Options, said

__all__ = ["options_of"]

_LIBRARY = Path(__file__).parents[2] / "metalstm"


class _Sequence:
    """``Sequence[int]`` is ``tuple[int, ...]``: options cannot change."""

    def __class_getitem__(cls, item: Any) -> Any:
        return tuple[item, ...]


_TYPES: dict[str, Any] = {"Literal": Literal, "None": None, "Sequence": _Sequence}
_TYPES |= {kind.__name__: kind for kind in (bool, dict, float, int, str, tuple)}


def options_of(
    path: str,
    *names: str,
    omit: Sequence[str] = (),
    types: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    more: Sequence[tuple[str, Any, Any]] = (),
    integer: Any = int,
    **kind: Any,
) -> Any:
    """Options with the arguments of functions, or the attributes of modules.

    Args:
      path: of the file in ``metalstm/`` that has the names, or imports them.
      names: of two arguments with one name, the first function's counts.
      omit: arguments that are no options.
      types: of arguments, other than annotated.
      defaults: of arguments that have none, or another here; None may then be given.
      more: further options, (name, type, default).
      integer: what ``int`` stands for in annotations, such as one with limits.
      kind: of `msgspec.defstruct`, such as ``tag`` and ``tag_field``.
    """
    known = _TYPES | {"int": integer}
    types, defaults = types or {}, defaults or {}
    fields = {name: (name, hint, default) for name, hint, default in more}
    found = [_find(path, name) for name in names]
    texts = [ast.get_docstring(node) or "" for _, node in found]
    help_of: dict[str, str] = {}
    for text in reversed(texts):
        help_of |= _argument_help(text)
    for where, node in found:
        for name, annotation, default in _arguments(node):
            if name in fields or name in omit:
                continue
            hint = types.get(name)
            if hint is None:
                hint = _evaluated(annotation, where, known)
            value = ast.literal_eval(default) if default is not None else None
            value = defaults.get(name, value)
            if value is None and type(None) not in getattr(hint, "__args__", ()):
                hint = hint | None
            if name in help_of:
                hint = said(hint, help_of[name])
            fields[name] = (name, hint, value)
    return msgspec.defstruct(
        "".join(part.title() for part in names[0].split("_")),
        list(fields.values()),
        bases=(Options,),
        frozen=True,
        namespace={"__doc__": texts[0].split("\n")[0], **kind.pop("namespace", {})},
        **kind,
    )


@functools.cache
def _tree(path: str) -> ast.Module:
    return ast.parse((_LIBRARY / path).read_text())


@functools.cache
def _find(path: str, name: str) -> tuple[str, Any]:
    """Where a name is defined, following imports, and its definition."""
    for node in _tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return path, node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return path, node.value
        if isinstance(node, ast.ImportFrom) and name in [a.name for a in node.names]:
            module = "/".join(str(node.module).split(".")[1:])
            file = f"{module}.py"
            exists = (_LIBRARY / file).exists()
            return _find(file if exists else f"{module}/__init__.py", name)
    raise LookupError(f"{path} has no {name}")


def _arguments(node: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, annotation and default of each."""
    if isinstance(node, ast.ClassDef):
        for line in node.body:
            if isinstance(line, ast.AnnAssign):
                yield ast.unparse(line.target), line.annotation, line.value
        return
    given = node.args
    at_end = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    pairs = [*zip(given.args, at_end, strict=True)]
    pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
    for argument, default in pairs:
        yield argument.arg, argument.annotation, default


def _evaluated(annotation: ast.AST, path: str, known: Mapping[str, Any]) -> Any:
    """The type that an annotation means; its names may be aliases of types."""
    words = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    aliases = {w: _evaluated(*_find(path, w)[::-1], known) for w in words - {*known}}
    return eval(ast.unparse(annotation), {**known, **aliases})


def _argument_help(docstring: str) -> dict[str, str]:
    """What the docstring says of each argument or attribute, in one line."""
    section = re.split(r"^(?:Args|Attributes):\n", docstring, flags=re.MULTILINE)
    entries = re.findall(
        r"^  ([\w, ]+): (.+(?:\n    .+)*)",
        section[-1].split("\n\n")[0] if len(section) > 1 else "",
        re.MULTILINE,
    )
    found: dict[str, str] = {}
    for names, text in entries:
        words = text.replace("`", "").split()
        if len(words[0]) > 1 and words[0].replace("-", "").isalpha():
            words[0] = words[0][0].upper() + words[0][1:]
        found |= dict.fromkeys(names.split(", "), " ".join(words))
    return found
