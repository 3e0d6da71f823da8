"""What users name by a path, such as ``mymodule:CNN`` or ``mymodule:my_rule``."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["object_at"]


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
    found = getattr(module, attribute, None)
    if found is None:
        has = ", ".join(sorted(n for n in vars(module) if not n.startswith("_")))
        raise ValueError(f"{kind} {path!r}: {name} has no {attribute!r}, but {has}")
    return found
