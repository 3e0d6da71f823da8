"""Batches labelled by the classes of a pool: ordinary classification."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from metalstm.base import Array, Batch
from metalstm.checks import check_at_least
from metalstm.data.drawing import draw_distinct, to_integers
from metalstm.data.episodes import EpisodeSpec, finish_images
from metalstm.data.pools import ClassPool

__all__ = ["ClassificationSpec"]


@dataclass(frozen=True)
class ClassificationSpec:
    """A `TaskSampler` of labelled batches, for pre-training.

    Attributes:
      num_images: of one batch; classes and images are drawn with replacement, unless
        ``per_class`` says otherwise.
      num_classes: of the pool; four times as many with ``episodes.rotations``, where
        class c turned by k quarter circles is class 4 c + k.
      episodes: whose rotations, augmentation and normalisation apply.
      per_class: a batch has so many images of each of its classes, all distinct; a
        class that has fewer repeats some.

    Raises:
      ValueError: ``num_images`` is not a multiple of ``per_class``, or needs more
        classes than there are.
    """

    num_images: int
    num_classes: int
    episodes: EpisodeSpec
    per_class: int | None = None

    def __post_init__(self):
        if self.per_class is None:
            return
        check_at_least("per_class", self.per_class, 1, "or None")
        if self.num_images % self.per_class:
            raise ValueError(
                f"num_images={self.num_images}: choose a multiple of per_class="
                f"{self.per_class}"
            )
        if self.num_images // self.per_class > self.num_classes:
            raise ValueError(
                f"num_images={self.num_images} with per_class={self.per_class} needs "
                f"{self.num_images // self.per_class} classes, and there are "
                f"{self.num_classes}: choose a smaller batch, or a larger per_class"
            )

    def sample(self, key: Array, pool: ClassPool) -> Batch:
        """Draw x float32 [num_images, H, W, ch] and y int32 [num_images].

        Raises:
          ValueError: the pool has another number of classes.
        """
        num_turns = 4 if self.episodes.rotations else 1
        available = num_turns * pool.num_classes
        if available != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} but the pool has {available} classes"
                f"{' with rotations' * self.episodes.rotations}: pre-train with "
                f"num_classes={available}"
            )
        draw_key, augment_key = jax.random.split(key)
        y, slots = self._draw(draw_key, pool, num_turns)
        classes, turns = y // num_turns, y % num_turns
        rows = pool.starts[classes] + slots
        x = pool.take(rows)
        return Batch(finish_images(augment_key, x, turns, self.episodes), y)

    def _draw(self, key: Array, pool: ClassPool, num_turns: int) -> tuple[Array, Array]:
        """Labels, and which image of its class each is."""
        if self.per_class is None:
            uniform = jax.random.uniform(key, (2, self.num_images))
            y = to_integers(uniform[0], self.num_classes)
            return y, to_integers(uniform[1], pool.counts[y // num_turns])
        class_key, image_key = jax.random.split(key)
        num = self.num_images // self.per_class
        chosen = draw_distinct(
            jax.random.uniform(class_key, (2, num)), self.num_classes
        )
        uniform = jax.random.uniform(image_key, (num, 2, self.per_class))
        counts = pool.counts[chosen // num_turns]
        slots = jnp.where(
            counts[:, None] < self.per_class,
            to_integers(uniform[:, 0], counts[:, None]),
            jax.vmap(draw_distinct)(uniform, counts),
        )
        return jnp.repeat(chosen, self.per_class), slots.ravel()
