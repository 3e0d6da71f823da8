"""Where episodes come from: pools of images, the sampler, and the sources."""

from metalstm.data import augment
from metalstm.data.cache import cache_folder
from metalstm.data.episodes import (
    EpisodeSpec,
    Sampler,
    episode_key,
    sample_episode,
    sample_episodes,
    validate,
)
from metalstm.data.glyphs import load_glyphs
from metalstm.data.pools import (
    IMAGENET,
    SPLITS,
    ClassPool,
    Dataset,
    Normalisation,
    checksum,
    make_pool,
)
from metalstm.data.synthetic import ClusterSpec, SinusoidSpec

__all__ = [
    "IMAGENET",
    "SPLITS",
    "ClassPool",
    "ClusterSpec",
    "Dataset",
    "EpisodeSpec",
    "Normalisation",
    "Sampler",
    "SinusoidSpec",
    "augment",
    "cache_folder",
    "checksum",
    "episode_key",
    "load_glyphs",
    "make_pool",
    "sample_episode",
    "sample_episodes",
    "validate",
]
