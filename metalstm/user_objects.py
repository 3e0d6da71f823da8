"""What users name by a path, such as ``mymodule:CNN`` or ``mymodule:my_rule``."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, get_args

__all__ = ["maker_at", "object_at"]


def object_at(path: str, kind: str) -> Any:
    """Return what ``path`` names, in a module that is imported already.

    Importing runs code, so that a path that was read from a file imports nothing.

    Args:
      kind: what it is to be, for messages, such as ``"rule"``.

    Raises:
      ValueError: the module is not imported, or has no such name.
    """
    name, _, attribute = path.partition(":")
    module = sys.modules.get(name)
    if module is None:
        raise ValueError(f"{kind} {path!r}: `import {name}` first")
    names = vars(module)  # a module's own __getattr__ may import
    if names.get(attribute) is None:
        has = ", ".join(sorted(n for n in names if not n.startswith("_")))
        raise ValueError(f"{kind} {path!r}: {name} has no {attribute!r}, but {has}")
    return names[attribute]


def maker_at(path: str, kind: str, types: tuple[type, ...]) -> Any:
    """Return what ``path`` names, if it is one of ``types`` or says that it makes one.

    The path may have been read from a file, so that nothing is called to find out: a
    class must be a subclass, and a function must have the return annotation. Otherwise
    a file could call any function of any imported module.

    Raises:
      ValueError: as `object_at`; or it is something else.
    """
    found = object_at(path, kind)
    if isinstance(found, types) or (callable(found) and _makes(found, types)):
        return found
    name, *others = map(_full_name, types)
    raise ValueError(
        f"{kind} {path!r} is {found!r:.200}: give a {name}, or a function that says by "
        f"its return annotation that it makes one, `def {path.partition(':')[2]}(..) "
        f"-> {name}` (or {', '.join(others)})"
    )


def _makes(maker: Callable, types: tuple[type, ...]) -> bool:
    while isinstance(maker, functools.partial):
        maker = maker.func
    hint: Any = maker
    if not isinstance(maker, type):
        try:
            hint = inspect.signature(maker, eval_str=True).return_annotation
        except Exception:  # of annotations that name nothing; built-ins have none
            return False
    hints = get_args(hint) or (hint,)  # of a union
    return all(isinstance(part, type) and issubclass(part, types) for part in hints)


def _full_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"
