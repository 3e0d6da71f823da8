"""The commands: ``python -m experiments.few_shot`` and the others."""

import importlib.util

_missing = [
    name
    for name in ("filelock", "matplotlib", "msgspec", "tabulate", "tqdm", "tyro")
    if importlib.util.find_spec(name) is None
]
if _missing:
    raise SystemExit(
        f"error: the command line needs {', '.join(_missing)}, not installed here: "
        "pip install 'metalstm[experiments]'"
    )
