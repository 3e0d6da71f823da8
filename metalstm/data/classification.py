"""Batches labelled by the classes of a pool: ordinary classification."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from metalstm.base import Array, Batch
from metalstm.data.drawing import to_integers
from metalstm.data.episodes import EpisodeSpec, finish_images
from metalstm.data.pools import ClassPool

__all__ = ["ClassificationSpec"]


@dataclass(frozen=True)
class ClassificationSpec:
    """A `TaskSampler` of labelled batches, for pre-training.

    Attributes:
      num_images: of one batch; classes and images are drawn with replacement.
      num_classes: of the pool; four times as many with ``episodes.rotations``, where
        class c turned by k quarter circles is class 4 c + k.
      episodes: whose rotations, augmentation and normalisation apply.
    """

    num_images: int
    num_classes: int
    episodes: EpisodeSpec

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
        uniform = jax.random.uniform(draw_key, (2, self.num_images))
        y = to_integers(uniform[0], available)
        classes, turns = y // num_turns, y % num_turns
        slots = to_integers(uniform[1], pool.counts[classes])
        rows = pool.starts[classes] + slots
        x = pool.images.at[rows].get(mode="promise_in_bounds")
        return Batch(finish_images(augment_key, x, turns, self.episodes), y)
