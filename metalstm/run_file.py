"""Methods of a run folder: one self-describing file, and what predicts with them.

``predictors.json`` holds ``{"format_version", "image_shape", "normalise", "methods":
{name: {"spec", "checkpoint"}}}``: a spec as `metalstm.specs` has it, and the folder of
the method's checkpoint, relative to the file's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from metalstm.base import PyTree
from metalstm.checks import check_choice
from metalstm.inputs import ExampleArray
from metalstm.predictor import Predictor, example_episode
from metalstm.runtime import checkpoints
from metalstm.runtime.files import atomic_write
from metalstm.specs import build_algorithm, fixed_way

__all__ = ["describe_methods", "load_params", "load_run"]

FILE = "predictors.json"
FORMAT_VERSION = 1


def describe_methods(
    folder: str | Path,
    methods: Mapping[str, tuple[Mapping[str, Any], str]],
    *,
    image_shape: Sequence[int],
    normalise: Any = None,
) -> None:
    """Write the file that `load_run` reads, completely or not at all.

    Args:
      methods: name -> spec, and the folder of its checkpoint, relative to ``folder``.
      image_shape: [H, W, ch] of the images in training.
      normalise: mean and standard deviation of each channel, or None.
    """
    document = {
        "format_version": FORMAT_VERSION,
        "image_shape": list(image_shape),
        "normalise": normalise,
        "methods": {
            name: {"spec": spec, "checkpoint": checkpoint}
            for name, (spec, checkpoint) in methods.items()
        },
    }
    with atomic_write(Path(folder) / FILE) as part:
        part.write_text(json.dumps(document, indent=1) + "\n")


def load_params(
    folder: str | Path, spec: Mapping[str, Any], image_shape: Sequence[int]
) -> tuple[PyTree, str | None]:
    """Read a method's best meta-parameters, and what had to be skipped to get them."""
    algorithm = build_algorithm(spec)
    episode = example_episode(image_shape, fixed_way(spec) or 5)
    target = jax.eval_shape(algorithm.init, jax.random.key(0), episode)
    if not jax.tree.leaves(target):
        return target, None
    restored = checkpoints.restore(Path(folder), target)
    return restored.state, restored.message


def load_run(path: str | Path, method: str | None = None) -> Predictor:
    """Load a trained method as a predictor for a user's own images.

    Args:
      path: a folder with a ``predictors.json``, such as ``python -m
        experiments.few_shot`` writes.
      method: one of those in the file; default its first.

    Raises:
      FileNotFoundError: the file, or the method's checkpoint, is not there.
      ValueError: there is no such method, or the file is damaged.
    """
    path = Path(path)
    file = path / FILE
    if not file.exists():
        raise FileNotFoundError(_not_there(path))
    document = _read(file)
    methods = document["methods"]
    method = next(iter(methods)) if method is None else method
    check_choice("method", method, methods)
    spec, shape = methods[method]["spec"], document["image_shape"]
    checkpoint = path / methods[method]["checkpoint"]
    try:
        algorithm, way = build_algorithm(spec), fixed_way(spec)
    except Exception as error:  # whatever an option of a wrong kind leads to
        raise _makes_none(file, method, error) from error
    try:
        params, message = load_params(checkpoint, spec, shape)
    except (OSError, ValueError):
        raise
    except Exception as error:
        raise _makes_none(file, method, error) from error
    return Predictor(
        method=method,
        algorithm=algorithm,
        params=params,
        way=way,
        example=ExampleArray(tuple(shape)),
        normalise=document.get("normalise"),
        message=message,
        spec=spec,
        source=(load_run, (path.absolute(), method)),
    )


def _not_there(path: Path) -> str:
    inside = sorted(found.parent.name for found in path.glob(f"*/{FILE}"))
    if inside:
        return f"{path} holds several runs: give {' or '.join(inside)} in it"
    return (
        f"{path} is not a run folder: it has no {FILE}; give the folder that "
        "experiments.few_shot printed"
    )


def _makes_none(file: Path, method: str, error: Exception) -> ValueError:
    return ValueError(
        f"{file} makes no {method} ({type(error).__name__}: {error}): put a copy of it "
        "back, or train with this metalstm"
    )


def _read(file: Path) -> dict[str, Any]:
    """The methods of a run and their data; raises ValueError when it is damaged."""
    try:
        document = json.loads(file.read_bytes())
        version, methods = document["format_version"], document["methods"]
        shape, normalise = document["image_shape"], document.get("normalise")
        sound = len(methods) > 0 and len(shape) > 0
        sound &= all(isinstance(n, int) and n > 0 for n in shape)
        for entry in methods.values():
            way = fixed_way(entry["spec"])
            sound &= way is None or (isinstance(way, int) and way > 0)
            sound &= isinstance(entry["checkpoint"], str)
        if normalise is not None:
            mean, std = (np.array(part, np.float32) for part in normalise)
            sound &= mean.shape == std.shape and mean.shape in ((1,), (shape[-1],))
            sound &= bool(np.isfinite([mean, std]).all() and (std > 0).all())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({type(error).__name__}: {error}): put a copy of it "
            "back, or train again"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version={version!r}, and this metalstm reads "
            f"{FORMAT_VERSION}: install the metalstm that wrote it"
        )
    if not sound:
        raise ValueError(
            f"{file} is damaged (no methods, or sizes that cannot be): put a copy of "
            "it back, or train again"
        )
    return document
