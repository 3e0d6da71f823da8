"""Episodes of varying way and shots, masked so that all are of one shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from metalstm.base import Array, Batch, Episode, MetaAlgorithm
from metalstm.batches import UNMASKED, MaskedBatch
from metalstm.data.episodes import EpisodeSpec, sample_episode
from metalstm.data.pools import ClassPool

__all__ = ["VaryingEpisodeSpec", "check_masked"]


@dataclasses.dataclass(frozen=True)
class VaryingEpisodeSpec(EpisodeSpec):
    """Episodes whose number of classes, and shots of each class, are drawn.

    ``way`` and ``shot`` of `EpisodeSpec` are the most. The number of classes is uniform
    in [min_way, way], and the shots of each class are uniform in [min_shot, shot],
    each its own, as cross-domain benchmarks have them (Meta-Dataset, Triantafillou et
    al., 2020). Every class of an episode has ``queries`` queries.

    An episode is the one that ``EpisodeSpec`` draws by a part of the key, as
    `MaskedBatch`: what is over its way and shots is no example. Methods that cannot
    leave such rows out refuse these tasks when they are set up.

    Raises:
      ValueError: ``min_way`` or ``min_shot`` below 1, or above ``way`` or ``shot``.
    """

    min_way: int = 2
    min_shot: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("min_way", self.way), ("min_shot", self.shot)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}={getattr(self, name)}: choose 1 to {most}, the most"
                )

    def sample(self, key: Array, pool: ClassPool) -> Episode:
        episode_key, way_key, shot_key = jax.random.split(key, 3)
        support, query = sample_episode(episode_key, pool, self)
        num_classes = jax.random.randint(way_key, (), self.min_way, self.way + 1)
        shots = jax.random.randint(shot_key, (self.way,), self.min_shot, self.shot + 1)
        # which of its class an example is, in the order of the support set
        of_class = jax.nn.one_hot(support.y, self.way, dtype=jnp.int32)
        place = (jnp.cumsum(of_class, 0) * of_class).sum(-1) - 1
        in_support = (support.y < num_classes) & (place < shots[support.y])
        return Episode(
            _masked(support, in_support), _masked(query, query.y < num_classes)
        )


def _masked(batch: Batch, mask: Array) -> Any:
    return MaskedBatch(batch.x, jnp.where(mask, batch.y, 0), mask)


def check_masked(algorithm: MetaAlgorithm, spec: Any) -> None:
    """Refuse tasks of varying size for a method that would count their empty rows.

    Raises:
      ValueError: see `MaskedBatch`.
    """
    if isinstance(spec, VaryingEpisodeSpec) and not algorithm.masked:
        raise ValueError(UNMASKED)
