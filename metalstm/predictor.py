"""Trained methods: one self-describing file, and what predicts with its methods.

``predictors.json`` holds ``{"format_version", "image_shape", "normalise", "methods":
{name: {"spec", "checkpoint"}}}``: a spec as `metalstm.specs` has it, and the folder of
the method's checkpoint, relative to the file's own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import Batch, Episode, MetaAlgorithm, PyTree
from metalstm.checks import check_choice
from metalstm.runtime import checkpoints
from metalstm.runtime.files import atomic_write
from metalstm.specs import build_algorithm, fixed_way

__all__ = [
    "Predictor",
    "describe_methods",
    "example_episode",
    "load_params",
    "load_run",
]

FILE = "predictors.json"
FORMAT_VERSION = 1


def example_episode(image_shape: Sequence[int], way: int, shot: int = 1) -> Episode:
    """An episode of zeros, for the shapes that initialisation reads."""

    def batch() -> Batch:
        x = jnp.zeros((way * shot, *image_shape), jnp.float32)
        return Batch(x, jnp.arange(way * shot, dtype=jnp.int32) % way)

    return Episode(batch(), batch())


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


@dataclass(frozen=True)
class Predictor:
    """A trained method, ready for a user's own images.

    ::

        predict = metalstm.load_run("runs/few_shot/glyphs-5w1s-0")
        labels = predict(support_images, ["cat", "dog", ...], query_images)

    It can be pickled, copied and sent to another process, which loads the run folder
    itself: the folder must be there.
    """

    method: str
    algorithm: MetaAlgorithm
    params: PyTree
    way: int | None  # the number of classes it takes; None: any
    image_shape: tuple[int, ...]
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None
    message: str | None = None  # which checkpoints could not be read
    path: Path | None = None  # the run folder that it was loaded from

    def __reduce__(self):
        # programs and closures cannot be pickled: another process loads the run itself
        if self.path is None:
            raise TypeError(
                "a Predictor without a run folder cannot be pickled: give the process "
                "what it needs to build one, or load one by metalstm.load_run"
            )
        return load_run, (self.path, self.method)

    def __copy__(self) -> Predictor:
        return self

    def __deepcopy__(self, memo) -> Predictor:
        return self

    def __call__(
        self, images: Any, labels: Sequence[Any], query_images: Any
    ) -> np.ndarray:
        """Return the predicted label of each query; labels may be any values."""
        scores, classes = self.scores(images, labels, query_images)
        return classes[scores.argmax(-1)]

    def scores(
        self, images: Any, labels: Sequence[Any], query_images: Any, *, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores [M, way], higher is better, and the class of each column.

        Args:
          images: the support set, [N, H, W, ch]: uint8, or floats in [0, 1].
          labels: N values.
          query_images: [M, H, W, ch].
          seed: of what is random in a method, such as a fresh initialisation.

        Raises:
          ValueError: images of another shape or range than in training, labels that are
            not N numbers or strings, or a number of classes the learner's head lacks.
        """
        x, query = (self._prepare(a) for a in (images, query_images))
        if len(labels) != len(x):
            raise ValueError(f"{len(labels)} labels for {len(x)} images: give one each")
        classes, y = _classes(labels)
        if self.way is not None and len(classes) != self.way:
            raise ValueError(
                f"labels name {len(classes)} classes, but this {self.method} was "
                f"trained with way={self.way}: give {self.way} classes, or train with "
                f"--way {len(classes)}"
            )
        support = Batch(jnp.asarray(x), jnp.asarray(y, jnp.int32))
        out = _predict(self.algorithm, len(classes))(
            self.params, jax.random.key(seed), support, jnp.asarray(query)
        )
        return np.asarray(out), classes

    def _prepare(self, images: Any) -> np.ndarray:
        images = np.asarray(images)
        if images.dtype.kind not in "uif":
            raise ValueError(
                f"images are of type {images.dtype}: give uint8, or floats in [0, 1]"
            )
        if images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images have the shape {images.shape}, but this run was trained on "
                f"[N, {', '.join(map(str, self.image_shape))}]: resize them"
            )
        if images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        images = images.astype(np.float32)
        # said so that NaN, which no comparison is true of, is refused too
        if images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images span {images.min():.3g} to {images.max():.3g}: give uint8, or "
                "floats in [0, 1]; normalisation is done here"
            )
        if self.normalise is not None:
            mean, std = (np.asarray(a, np.float32) for a in self.normalise)
            images = (images - mean) / std
        return images


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
        image_shape=tuple(shape),
        normalise=document.get("normalise"),
        message=message,
        path=path.absolute(),
    )


def _classes(labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes, and which of them each label is."""
    try:
        array = np.asarray(labels)
    except ValueError:  # rows of unequal length
        array = np.empty((0, 0))
    kinds = {np.asarray(label).dtype.kind for label in labels}
    kinds = {"number" if kind in "iufb" else kind for kind in kinds}
    missing = array.dtype.kind == "f" and np.isnan(array).any()
    if array.ndim != 1 or len(kinds) > 1 or kinds - {"number", "U"} or missing:
        raise ValueError(
            f"labels are {labels!r:.60}: give one number or one string for each image, "
            "none of them NaN (y.argmax(-1) of a one-hot coding)"
        )
    return np.unique(array, return_inverse=True)


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


def _predict(algorithm: MetaAlgorithm, num_classes: int) -> Callable[..., jax.Array]:
    # jitted afresh for each call: a user predicts with few shapes, and keeping programs
    # would tie their life to the predictor's
    return jax.jit(
        lambda params, key, support, query: algorithm.predict(
            params, key, support, query, num_classes=num_classes
        )
    )
