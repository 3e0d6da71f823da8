"""Episodes as a pure function of (seed, split, step, task).

No iterator, no state: the same key gives the same episode on every host, before and
after a restart, and for every method that is compared. Everything here is jittable; the
pool is an argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from metalstm.base import Array, Batch, Episode
from metalstm.batches import are_labels, check_episode, to_rank_of
from metalstm.checks import check_at_least, check_choice
from metalstm.data.drawing import draw_distinct, draw_grouped, grouped_capacity
from metalstm.data.pools import SPLITS, ClassPool, Dataset, Normalisation

__all__ = [
    "EpisodeSpec",
    "Sampler",
    "TaskSampler",
    "classes_of",
    "episode_key",
    "finish_images",
    "prepare_examples",
    "sample_checked",
    "sample_episode",
    "sample_episodes",
    "validate",
]

Augment = Callable[[Array, Array], Array]
"""(key, images float [N, H, W, ch] in [0, 1]) -> images, jittable and hashable."""


class TaskSampler(Protocol):
    """What training asks of a spec: hashable, static under jit."""

    def sample(self, key: Array, pool: Any) -> Any:
        """Draw one task; a source that needs no pool ignores it."""
        ...


class Sampler(TaskSampler, Protocol):
    """What evaluation asks: an `Episode`.

    Float targets [N, d] make it a regression. A sampler of labels [N] has an attribute
    ``way``, the number of classes, as well.
    """

    def sample(self, key: Array, pool: Any) -> Episode:
        """Draw one episode; a source that needs no pool ignores it."""
        ...


@dataclass(frozen=True)
class EpisodeSpec:
    """What an episode is made of. Hashable: a static argument of jitted functions.

    Attributes:
      way: classes of an episode.
      shot: images of each class in the support set.
      queries: images of each class in the query set.
      rotations: a character turned by 90, 180 or 270 degrees is another class, which
        makes four times as many. One episode never holds two turns of one character,
        which could be the same drawing.
      augment: applied to support and query images in [0, 1], after the rotation; see
        `metalstm.data.augment`.
      normalise: subtract the mean and divide by the standard deviation, last.

    Raises:
      ValueError: a number below 1, statistics that do not fit each other, or an
        ``augment`` that is not hashable.
    """

    way: int
    shot: int
    queries: int = 15
    rotations: bool = False
    augment: Augment | None = None
    normalise: Normalisation | None = None

    def __post_init__(self) -> None:
        for name in ("way", "shot", "queries"):
            check_at_least(name, getattr(self, name), 1)
        if self.normalise is not None:
            mean, std = map(tuple, self.normalise)
            finite = np.isfinite([*mean, *std]).all()
            if len(mean) != len(std) or min(std, default=0) <= 0 or not finite:
                raise ValueError(
                    f"normalise={self.normalise}: give as many means as standard "
                    f"deviations, finite and the latter above 0"
                )
            object.__setattr__(self, "normalise", Normalisation(mean, std))
        try:
            hash(self.augment)
        except TypeError:
            raise ValueError(
                f"augment={self.augment!r} is not hashable, so it cannot be static "
                f"under jit; use a function or a frozen dataclass"
            ) from None

    @property
    def regression(self) -> bool:
        return False

    def sample(self, key: Array, pool: ClassPool) -> Episode:
        return sample_episode(key, pool, self)


def episode_key(seed: Any, split: str, step: Any, task: Any = 0) -> Array:
    """Return the key of one episode: fold_in of the split, the step and the task.

    ``task`` is the task's global index in the meta-batch, so another number of devices
    or hosts draws the same episodes. ``seed``, ``step`` and ``task`` may be traced.
    """
    check_choice("split", split, SPLITS)
    key = jax.random.fold_in(jax.random.key(seed), SPLITS[split])
    return jax.random.fold_in(jax.random.fold_in(key, step), task)


def sample_episode(key: Array, pool: ClassPool, spec: EpisodeSpec) -> Episode:
    """Draw one episode: x float32 [N, H, W, ch] in [0, 1] and y int32 [N].

    Of a pool of other numbers than bytes x holds what the pool holds, [N, ...].

    Classes are distinct and labelled at random, the images of a class are distinct, and
    support and query come in shuffled order. Where the pool has groups, support and
    query share none. ``augment`` and ``normalise`` come last and change x's range.

    Raises:
      ValueError: if ``spec`` asks for more classes than the pool has, or more images
        than its smallest class. `validate` checks the groups too.
    """
    _check_shapes(spec, pool, "pool")
    way, num = spec.way, spec.shot + spec.queries
    num_support = way * spec.shot
    draw_key, group_key, augment_key = jax.random.split(key, 3)
    # One draw for everything: each further call of the generator costs compile time.
    uniform = jax.random.uniform(draw_key, (way * (3 + 3 * num),))
    for_class, for_turn, for_slot, for_order = jnp.split(
        uniform, np.cumsum([2 * way, way, 2 * way * num])
    )
    classes = draw_distinct(for_class.reshape(2, way), pool.num_classes)
    turns = jnp.floor(4 * for_turn).astype(jnp.int32)
    if pool.groups is None:
        slots = jax.vmap(draw_distinct)(
            for_slot.reshape(way, 2, num), pool.counts[classes]
        )
    else:
        slots = draw_grouped(
            group_key, pool, classes, shot=spec.shot, queries=spec.queries
        )

    # Indices are shuffled before the one gather, so no image is moved twice.
    labels = jnp.broadcast_to(jnp.arange(way)[:, None], slots.shape)
    order = jnp.concatenate(
        [
            jnp.argsort(for_order[:num_support]),
            num_support + jnp.argsort(for_order[num_support:]),
        ]
    )

    def arrange(per_slot: Array) -> Array:
        parts = jnp.split(per_slot, [spec.shot], axis=1)
        return jnp.concatenate([part.ravel() for part in parts])[order]

    y = arrange(labels).astype(jnp.int32)
    rows = arrange(pool.starts[classes][:, None] + slots)
    x = pool.take(rows)
    x = finish_images(augment_key, x, turns[y], spec)
    return Episode(
        support=Batch(x[:num_support], y[:num_support]),
        query=Batch(x[num_support:], y[num_support:]),
    )


def classes_of(spec: Sampler, episode: Episode) -> int | None:
    """Return the number of classes of a sampler's tasks; None: a regression.

    Args:
      episode: one or more of its tasks.

    Raises:
      ValueError: it draws labels and has no ``way``.
    """
    if not are_labels(episode.query.y):
        return None
    way: int | None = getattr(spec, "way", None)
    if way is None:
        raise ValueError(
            f"spec={spec} draws labels, of how many classes it does not say: give it "
            "an attribute way (a regression has float targets [N, d])"
        )
    return way


def sample_checked(spec: TaskSampler, key: Array, pool: Any) -> Any:
    """Draw a task by ``spec``, and refuse labels or targets that do not fit.

    Where the spec says whether it is a ``regression``, they must be of that kind.
    """
    task = spec.sample(key, pool)
    if isinstance(task, Episode):
        check_episode(task, getattr(spec, "regression", None))
    return task


def sample_episodes(keys: Array, pool: ClassPool, spec: EpisodeSpec) -> Episode:
    """Draw the episode of each key of [T]; every leaf has a leading [T]."""
    return jax.vmap(lambda key: sample_episode(key, pool, spec))(keys)


def finish_images(key: Array, x: Array, turns: Array, spec: EpisodeSpec) -> Array:
    """Turn, scale, augment and normalise drawn images, by the options of ``spec``.

    Args:
      x: uint8 [N, H, W, ch], or floats [N, ...], which are not scaled.
      turns: [N] quarter circles, ignored without ``spec.rotations``.

    Returns:
      float32 [N, H, W, ch], or floats [N, ...].
    """
    if spec.rotations:
        turns = turns[:, None, None, None]
        for quarter in (1, 2):  # two conditional turns make all four
            x = jnp.where(turns & quarter > 0, jnp.rot90(x, quarter, (1, 2)), x)
    if spec.augment is not None:
        x = spec.augment(key, prepare_examples(x, None))
    return prepare_examples(x, spec.normalise)


def prepare_examples(x: Array, normalise: Normalisation | None) -> Array:
    """Scale bytes to [0, 1], and normalise: what training does, and prediction too.

    Args:
      x: uint8 [N, H, W, ch]; other numbers [N, ...] are not scaled. Integers that are
        normalised become floats.
    """
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.float32) / 255
    if normalise is not None:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(jnp.float32)
        mean, std = (to_rank_of(jnp.array(part, x.dtype), x) for part in normalise)
        x = (x - mean) / std
    return x


def validate(spec: EpisodeSpec, dataset: Dataset, split: str = "train") -> None:
    """Refuse a spec that ``dataset``'s split cannot serve, before anything compiles.

    Raises:
      ValueError: for more ways than classes, more images than the smallest class has,
        rotations where a turned class is another class, or a normalisation for another
        number of channels; each message has a remedy.
    """
    pool, where = dataset.pool(split), f"{dataset.name}'s {split} split"
    names = dataset.class_names[split]
    if spec.rotations and not dataset.info.get("rotations", True):
        raise ValueError(
            f"rotations=True: a turned class of {dataset.name} can be another of its "
            f"classes; choose rotations=False"
        )
    if pool.groups is not None:
        available = np.asarray(grouped_capacity(pool))
        for column, name in enumerate(("shot", "queries")):
            smallest = int(available[:, column].argmin())
            limit = int(available[smallest, column])
            if getattr(spec, name) > limit:
                raise ValueError(
                    f"{name}={getattr(spec, name)}: half the groups of class "
                    f"{names[smallest]!r} of {where} hold {limit} images, and support "
                    f"and query share no group; choose {name} <= {limit}"
                )
    _check_shapes(spec, pool, where, names)


def _check_shapes(
    spec: EpisodeSpec, pool: ClassPool, where: str, names: Sequence[Any] | None = None
) -> None:
    num_classes, shape = pool.num_classes, pool.shape
    if spec.way > num_classes:
        raise ValueError(
            f"way={spec.way} is more than the {num_classes} classes of {where}; choose "
            f"way <= {num_classes}"
        )
    if spec.shot + spec.queries > pool.smallest:
        smallest = "the smallest class"
        if names is not None:
            smallest = f"class {names[int(np.argmin(pool.counts))]!r}"
        raise ValueError(
            f"shot={spec.shot} and queries={spec.queries} need "
            f"{spec.shot + spec.queries} images a class, but {smallest} of {where} has "
            f"{pool.smallest}; choose shot + queries <= {pool.smallest} or omit such "
            "classes"
        )
    if spec.rotations and (len(shape) != 3 or shape[0] != shape[1]):
        raise ValueError(
            f"rotations=True needs square images, but those of {where} are "
            f"{' x '.join(map(str, shape[:2]))}; choose rotations=False or another "
            "image size"
        )
    if spec.normalise and len(spec.normalise.mean) not in (1, shape[-1]):
        raise ValueError(
            f"normalise has {len(spec.normalise.mean)} means for the {shape[-1]} "
            f"channels of {where}; give 1 or {shape[-1]}"
        )
