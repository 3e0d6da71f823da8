"""Import the network or the rule of one's own that a command line names."""

from __future__ import annotations

import importlib
import os
import sys

__all__ = ["import_object"]


def import_object(flag: str, path: str) -> None:
    """Import the module of ``path``, MODULE:NAME, also from the current directory.

    Args:
      flag: that names it: ``--learner`` or ``--rule``.

    Raises:
      ValueError: there is no such module, it cannot be imported, or it lacks the name.
    """
    module, _, name = path.partition(":")
    if not name.isidentifier() or not all(p.isidentifier() for p in module.split(".")):
        raise ValueError(f"{flag} {path}: write MODULE:NAME, such as mymodule:CNN")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        remedy = f"install {error.name}, which {module} imports"
        if error.name and f"{module}.".startswith(f"{error.name}."):
            remedy = (
                f"run in the folder of {module.split('.')[0]}, or add it to PYTHONPATH"
            )
        raise ValueError(f"{flag} {path}: {error}; {remedy}") from None
    except Exception as error:
        raise ValueError(
            f"{flag} {path}: importing {module} failed ({type(error).__name__}: "
            f"{error})"
        ) from error
    from metalstm.user_objects import object_at  # --help is to be quick

    object_at(path, flag.strip("-").removesuffix("s"))
