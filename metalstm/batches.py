"""Examples and their labels or targets: what fits, and what is refused in words.

x is one array [N, ...], or any pytree of them (token ids and a mask). y is integer
labels [N] in [0, way), or float targets [N, d].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "UNMASKED",
    "MaskedBatch",
    "are_labels",
    "as_vectors",
    "check_adapt",
    "check_batch",
    "check_episode",
    "check_outputs",
    "check_predict",
    "fill_batch",
    "fill_rows",
    "first_example",
    "flatten_examples",
    "index_labels",
    "join_examples",
    "labels_of",
    "mask_of",
    "num_examples",
    "only_present",
    "power_of_two",
    "support_targets",
    "to_rank_of",
]

PyTree = Any


class MaskedBatch(NamedTuple):
    """A `Batch` of which some rows stand for no example.

    Episodes of fewer classes or examples than others have them, so that all are of one
    shape. Losses, metrics and methods with ``MetaAlgorithm.masked`` give what they give
    without these rows; all other methods refuse them.
    """

    x: PyTree  # [N, ...]
    y: jax.Array  # [N]
    mask: jax.Array  # bool [N], False where there is no example


def mask_of(batch: Any) -> jax.Array | None:
    """Return which rows are examples; None: all."""
    return getattr(batch, "mask", None)


def labels_of(batch: Any) -> jax.Array:
    """Return y [N]; -1, which is no class, where there is no example."""
    mask = mask_of(batch)
    return batch.y if mask is None else jnp.where(mask, batch.y.astype(jnp.int32), -1)


def only_present(scores: jax.Array, support: Any) -> jax.Array:
    """Set scores [M, way] to -inf for classes without an example, of a masked support.

    >>> support = MaskedBatch(None, jnp.array([0, 1]), jnp.array([True, False]))
    >>> only_present(jnp.array([[2.0, 3.0]]), support)
    Array([[  2., -inf]], dtype=float32)
    """
    mask = mask_of(support)
    if mask is None or not are_labels(support.y):
        return scores
    present = jnp.zeros(scores.shape[-1], bool).at[support.y].max(mask)
    # a sum, whose terms broadcast, so that nothing of the mask has the queries' shape
    return scores + jnp.where(present, 0, -jnp.inf).astype(scores.dtype)[None]


def first_example(x: PyTree) -> PyTree:
    """Return [1, ...] of examples [N, ...], whose shapes initialisation reads."""
    return jax.tree.map(lambda leaf: leaf[:1], x)


def as_vectors(x: PyTree) -> jax.Array:
    """Return [N, d]: all numbers of an example, of every part of it."""
    parts = [flatten_examples(part) for part in jax.tree.leaves(x)]
    return jnp.concatenate(parts, -1) if len(parts) > 1 else parts[0]


def join_examples(*parts: PyTree) -> PyTree:
    """Put examples one behind the other, leaf by leaf."""
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def to_rank_of(vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give ``vector`` leading axes of 1, as ``jax_numpy_rank_promotion="raise"`` asks.

    >>> to_rank_of(jnp.ones(3), jnp.ones((5, 2, 3))).shape
    (1, 1, 3)
    """
    return jnp.expand_dims(vector, tuple(range(x.ndim - vector.ndim)))


def num_examples(x: PyTree) -> int:
    return jnp.shape(jax.tree.leaves(x)[0])[0]


def flatten_examples(x: jax.Array) -> jax.Array:
    """Return [N, d] of [N, ...], N = 0 included.

    >>> flatten_examples(jnp.ones((0, 2, 3))).shape
    (0, 6)
    """
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def are_labels(y: Any) -> bool:
    """Whether y [N] holds integer labels, and not float targets."""
    return jnp.issubdtype(y.dtype, jnp.integer)


def check_outputs(outputs: jax.Array, targets: jax.Array) -> None:
    """Refuse targets that a loss would broadcast against the outputs.

    Raises:
      ValueError: labels that are not [N] for outputs [N, way], or float targets of
        another shape than the outputs.
    """
    if are_labels(targets):
        if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
            raise ValueError(
                f"labels have the shape {targets.shape} and outputs {outputs.shape}: "
                "give labels [N] for outputs [N, way]"
            )
    elif targets.shape != outputs.shape:
        raise ValueError(
            f"targets have the shape {targets.shape} and outputs {outputs.shape}: give "
            "targets [N, d] (flat ones as y[:, None]) for outputs [N, d], or integer "
            "labels [N]"
        )


def check_episode(episode: Any, regression: bool | None) -> None:
    """`check_batch` of the support and the query set of an `Episode`.

    Args:
      regression: what the sampler says of its targets; None: it does not say.
    """
    for name in ("support", "query"):
        check_batch(getattr(episode, name), name, regression=regression)


def check_batch(
    batch: Any, name: str, *, regression: bool | None = None, way: int | None = None
) -> None:
    """Refuse labels and targets that do not fit the examples or the kind of task.

    Shapes and types are checked under a trace too, values where they are known.

    Args:
      batch: has ``x`` and ``y``.
      regression: whether y must be float targets, or labels; None: either.
      way: labels must be below it.

    Raises:
      ValueError: strings, booleans, a one-hot coding, another number of them than of
        examples, float labels, integer targets, or a label outside [0, way).
    """
    y, where = batch.y, f"{name}.y"
    if isinstance(y, list | tuple) or getattr(y, "dtype", None) is None:
        raise ValueError(f"{where} is {y!r:.40}: give an array")
    kind, shape = jnp.dtype(y.dtype).kind if _is_numeric(y) else "U", y.shape
    shown = f"{where} is {y.dtype} {list(shape)}"
    if kind in "UbOScMm":
        raise ValueError(
            f"{shown}: give integer labels [N] in [0, way), such as "
            "np.unique(labels, return_inverse=True)[1], or float targets [N, d]"
        )
    num = num_examples(batch.x)
    if shape[:1] != (num,):
        raise ValueError(f"{shown} for {num} examples of {name}.x: give one each")
    if regression is False and not are_labels(y):
        raise ValueError(
            f"{shown}, but the task is a classification: give integer labels [N], "
            "y.argmax(-1) of a one-hot coding, or y.astype(int) of whole numbers"
        )
    if regression and are_labels(y):
        raise ValueError(
            f"{shown}, but the task is a regression: give float targets [N, d], such "
            "as y.astype(np.float32)[:, None]"
        )
    if len(shape) != (1 if are_labels(y) else 2):
        raise ValueError(
            f"{shown}: give integer labels [N] (y[:, 0] of [N, 1], y.argmax(-1) of a "
            "one-hot coding) or float targets [N, d] (y[:, None] of flat ones)"
        )
    if are_labels(y) and num and not isinstance(y, jax.core.Tracer):
        values = np.asarray(y)
        if values.min() < 0 or (way is not None and values.max() >= way):
            raise ValueError(
                f"{where} has labels from {values.min()} to {values.max()}: give "
                f"labels in [0, {'way' if way is None else way}), such as "
                "np.unique(labels, return_inverse=True)[1]"
            )


def check_predict(predict: Callable, masked: bool) -> Callable:
    """Let a ``predict`` of `MetaAlgorithm` see only support sets that fit the task.

    Args:
      masked: it takes a `MaskedBatch`.
    """

    @functools.wraps(predict)
    def checked(meta_params, key, support, query_x, /, *, num_classes):
        regression = num_classes is None
        if support is not None:  # an optimizer predicts nothing
            check_batch(support, "support", regression=regression, way=num_classes)
        if not masked and mask_of(support) is not None:
            raise ValueError(UNMASKED)
        return predict(meta_params, key, support, query_x, num_classes=num_classes)

    return checked


UNMASKED = (
    "this method cannot tell rows that are no examples from those that are: choose "
    "tasks of one size (EpisodeSpec), or maml, meta_lstm or another learned_init "
    "without batch norm or minibatches, prototypical, matching or nearest_centroid"
)


def check_adapt(adapt: Callable) -> Callable:
    """Let an ``adapt`` of `MetaAlgorithm` see only support sets that fit."""

    @functools.wraps(adapt)
    def checked(meta_params, key, support, /, *, num_classes=None):
        check_batch(support, "support", way=num_classes)
        return adapt(meta_params, key, support, num_classes=num_classes)

    return checked


def _is_numeric(y: Any) -> bool:
    return isinstance(y, jax.Array) or np.asarray(y).dtype.kind in "bifucV"


def power_of_two(x: PyTree) -> int:
    """The power of two that holds all rows."""
    return 1 << (num_examples(x) - 1).bit_length()


def fill_rows(x: PyTree, other: bool) -> PyTree:
    """Fill rows up to a power of two: with the same again, or others for a trial.

    In numpy, so that nothing compiles for a new number of rows. Rows of zeros could
    make NaN of a network that divides by a mask's sum.
    """
    num, size = num_examples(x), power_of_two(x)

    def fill(leaf: np.ndarray) -> np.ndarray:
        filling = leaf[np.arange(size - num) % num]
        if other and jnp.issubdtype(leaf.dtype, jnp.floating):
            filling = filling + np.ones((), leaf.dtype)
        elif other:
            filling = 255 - filling if leaf.dtype == np.uint8 else filling * 0
        return np.concatenate([leaf, filling], dtype=leaf.dtype)

    return jax.tree.map(fill, x)


def fill_batch(batch: Any, other: bool) -> MaskedBatch:
    """`fill_rows` of a batch of numpy arrays."""
    num, size = len(batch.y), power_of_two(batch.x)
    y: Any = np.concatenate([batch.y, np.zeros_like(batch.y)[: size - num]])
    mask: Any = np.arange(size) < num
    return MaskedBatch(fill_rows(batch.x, other), y, mask)


def index_labels(labels: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
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


def support_targets(targets: Sequence[Any]) -> Any:
    """Return a regression's targets [N, d], finite float32."""
    try:
        array = np.asarray(targets, np.float32)
    except (TypeError, ValueError):  # strings, or rows of unequal length
        array = np.full((1,), np.nan, np.float32)
    if not array.size or array.ndim not in (1, 2) or not np.isfinite(array).all():
        raise ValueError(
            f"targets are {targets!r:.60}: give one number or d numbers for each "
            "example, all of them finite, and one example or more"
        )
    return array.reshape(len(array), -1)
