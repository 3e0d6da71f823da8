"""Where episodes come from: pools of images, the sampler, and the sources."""

from metalstm.data import augment
from metalstm.data.cache import cache_folder
from metalstm.data.classification import ClassificationSpec
from metalstm.data.embedding import embed
from metalstm.data.episodes import (
    EpisodeSpec,
    Sampler,
    TaskSampler,
    episode_key,
    sample_episode,
    sample_episodes,
    validate,
)
from metalstm.data.images import read_images
from metalstm.data.pools import (
    IMAGENET,
    SPLITS,
    ClassPool,
    Dataset,
    Normalisation,
    checksum,
    make_pool,
)
from metalstm.data.sources.arrays import load_arrays, read_arrays
from metalstm.data.sources.folders import load_image_folders
from metalstm.data.sources.glyphs import load_glyphs
from metalstm.data.sources.labelled import ImageData, LabelledImages, load_image_data
from metalstm.data.sources.mini_imagenet import load_mini_imagenet
from metalstm.data.sources.omniglot import load_omniglot
from metalstm.data.sources.synthetic import ClusterSpec, SinusoidSpec
from metalstm.data.sources.tfds import load_tfds
from metalstm.data.splits import split_classes
from metalstm.data.varying import VaryingEpisodeSpec

__all__ = [
    "IMAGENET",
    "SPLITS",
    "ClassPool",
    "ClassificationSpec",
    "ClusterSpec",
    "Dataset",
    "EpisodeSpec",
    "ImageData",
    "LabelledImages",
    "Normalisation",
    "Sampler",
    "SinusoidSpec",
    "TaskSampler",
    "VaryingEpisodeSpec",
    "augment",
    "cache_folder",
    "checksum",
    "embed",
    "episode_key",
    "load_arrays",
    "load_glyphs",
    "load_image_data",
    "load_image_folders",
    "load_mini_imagenet",
    "load_omniglot",
    "load_tfds",
    "make_pool",
    "read_arrays",
    "read_images",
    "sample_episode",
    "sample_episodes",
    "split_classes",
    "validate",
]
