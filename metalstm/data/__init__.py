"""Where episodes come from: pools of images, the sampler, and the sources."""

from metalstm.data.episodes import (
    EpisodeSpec,
    Sampler,
    episode_key,
    sample_episode,
    sample_episodes,
    validate,
)
from metalstm.data.pools import (
    IMAGENET,
    SPLITS,
    ClassPool,
    Dataset,
    Normalisation,
    checksum,
    make_pool,
)

__all__ = [
    "IMAGENET",
    "SPLITS",
    "ClassPool",
    "Dataset",
    "EpisodeSpec",
    "Normalisation",
    "Sampler",
    "checksum",
    "episode_key",
    "make_pool",
    "sample_episode",
    "sample_episodes",
    "validate",
]
