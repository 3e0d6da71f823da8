"""What an example of a trained method is: an array, or dicts and tuples of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import PyTree
from metalstm.batches import num_examples
from metalstm.data.episodes import prepare_examples
from metalstm.data.pools import Normalisation

__all__ = ["ExampleArray", "check", "describe", "from_json", "scale", "to_json"]


@dataclass(frozen=True)
class ExampleArray:
    """An array that each example has, and as what it is given to a predictor.

    Attributes:
      shape: of one example.
      pixels: images: uint8, or floats in [0, 1]. Otherwise numbers are taken as they
        are.
      dtype: in training, after scaling.
    """

    shape: tuple[int, ...]
    pixels: bool = True
    dtype: str = "float32"

    def struct(self, *num: int) -> jax.ShapeDtypeStruct:
        """The shape and type [*num, ...] that an exported program takes."""
        dtype = "uint8" if self.pixels else self.dtype
        return jax.ShapeDtypeStruct((*num, *self.shape), dtype)

    def check(self, given: Any, name: str, method: str) -> np.ndarray:
        """Return [N, ...] of the type in training, or uint8 that is to be scaled.

        Args:
          name: of the array, for messages.
          method: likewise.

        Raises:
          ValueError: another shape, type or range than in training.
        """
        array = np.asarray(given)
        kinds = "uifb" if self.dtype == "bool" else "uif"
        # to numpy, bfloat16 is of no kind of number
        if array.dtype.kind not in kinds and not jnp.issubdtype(
            array.dtype, jnp.floating
        ):
            raise ValueError(
                f"{name} are of type {array.dtype}: give uint8, or floats in [0, 1]"
                if self.pixels
                else f"{name} are of type {array.dtype}: give {self.dtype}"
            )
        if array.shape[1:] != self.shape:
            expected = ", ".join(map(str, ("N", *self.shape)))
            raise ValueError(
                f"{name} have the shape {array.shape}, but this {method} was trained "
                f"on [{expected}]: resize them"
            )
        if not self.pixels:
            if not np.can_cast(array.dtype, self.dtype, "same_kind"):
                raise ValueError(
                    f"{name} are {array.dtype}, but this {method} was trained on "
                    f"{self.dtype}: convert them as in training"
                )
            converted = array.astype(self.dtype)
            if array.dtype.kind in "ui" and (converted != array).any():
                raise ValueError(
                    f"{name} span {array.min()} to {array.max()}, which {self.dtype} "
                    "does not hold: give numbers as in training"
                )
            return converted
        if array.dtype != np.uint8:
            array = array.astype(np.float32)
            # said so that NaN, which no comparison is true of, is refused too
            if array.size and not (array.min() >= 0 and array.max() <= 1):
                raise ValueError(
                    f"{name} span {array.min():.3g} to {array.max():.3g}: give "
                    "uint8, or floats in [0, 1]; normalisation is done here"
                )
        return array


def check(example: PyTree, given: Any, method: str) -> PyTree:
    """Return what is given as numpy arrays that `scale` takes.

    Args:
      example: a tree of `ExampleArray`.
      given: arrays in the same dicts and tuples.
      method: for messages.

    Raises:
      ValueError: another structure, shape, type or range than in training.
    """
    treedef: Any  # flatten_up_to is not among its annotations
    leaves, treedef = jax.tree_util.tree_flatten_with_path(example)
    try:
        parts = treedef.flatten_up_to(given)
    except ValueError:
        found = jax.tree.structure(given)
        raise ValueError(
            f"an example is {found}, but this {method} was trained on {treedef}: give "
            "arrays in the same dicts and tuples"
        ) from None

    def name(path: Any, array: ExampleArray) -> str:
        if not path:
            return "images" if array.pixels else "examples"
        return f"examples{jax.tree_util.keystr(path)}"

    arrays = [
        array.check(part, name(path, array), method)
        for (path, array), part in zip(leaves, parts, strict=True)
    ]
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(
            f"the parts of {num_examples(arrays)} examples have the shapes "
            f"{', '.join(str(array.shape) for array in arrays)}: give each as many rows"
        )
    return jax.tree.unflatten(treedef, arrays)


def scale(x: PyTree, normalise: Normalisation | None) -> PyTree:
    """Return examples as training saw them: scaled and normalised."""
    return jax.tree.map(lambda a: prepare_examples(jnp.asarray(a), normalise), x)


def describe(x: PyTree, *, pixels: bool) -> PyTree:
    """Return the `ExampleArray` of each array of examples [N, ...]."""
    return jax.tree.map(lambda a: ExampleArray(a.shape[1:], pixels, str(a.dtype)), x)


def to_json(example: PyTree) -> Any:
    """Return what `from_json` reads.

    Raises:
      ValueError: something else than arrays in dicts, lists and tuples.

    >>> from_json(to_json((ExampleArray((4,)), {"mask": ExampleArray(())})))[1]
    {'mask': ExampleArray(shape=(), pixels=True, dtype='float32')}
    """
    if isinstance(example, ExampleArray):
        return [list(example.shape), example.dtype, example.pixels]
    if type(example) is dict and all(isinstance(key, str) for key in example):
        return {"dict": {key: to_json(part) for key, part in example.items()}}
    if type(example) in (list, tuple):
        return {type(example).__name__: [to_json(part) for part in example]}
    raise ValueError(
        f"an example has a {type(example).__name__}: give arrays in tuples, lists and "
        "dicts whose keys are strings"
    )


def from_json(value: Any) -> PyTree:
    if isinstance(value, list):
        shape, dtype, pixels = value
        return ExampleArray(tuple(shape), pixels, dtype)
    ((kind, parts),) = value.items()
    if kind == "dict":
        return {key: from_json(part) for key, part in parts.items()}
    return {"list": list, "tuple": tuple}[kind](map(from_json, parts))
