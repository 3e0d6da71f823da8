"""Named recipes: published ones, and ours. A preset is a set of flags.

What a preset does not name keeps the flag's default.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from experiments.few_shot.options import Config, did_you_mean, with_flags

# Ravi & Larochelle (ICLR 2017), the authors' code. Conv4-32 on 84x84 divided by 255;
# hidden 20; first order; one episode a meta-step; Adam 1e-3, clipping 0.25.
_RAVI: dict[str, Any] = {
    "dataset": "mini-imagenet",
    "filters": 32,
    "scale_init": "uniform",
    "algorithms": ("meta-lstm",),
    "order": "first",
    "gradient_scale": "batch",
    "hidden": 20,
    "meta_batch": 1,
    "learning_rate": 1e-3,
    "clip": 0.25,
    "validate_every": 1_000,
    "validation_episodes": 100,
    "test_episodes": 600,
}
# Finn et al. (ICML 2017). Their batch norm is transductive, in training and in test.
_MAML: dict[str, Any] = {
    "algorithms": ("maml", "fomaml"),
    "query_norm": "transductive",
    "learning_rate": 1e-3,
    "clip": 0.0,
    "initializer": "flax",
}
# Ours for Omniglot, held-out alphabets, inductive: layer norm looks at one image only,
# and classes that share their head's start can be meta-trained twenty at a time.
# docs/results/omniglot.md says what else was tried.
_OMNIGLOT: dict[str, Any] = {
    "dataset": "omniglot",
    "way": 5,
    "shot": 1,
    "rotations": True,
    "filters": 32,
    "strided": True,
    "norm": "layer",
    "final_relu": False,
    "tied_head": True,
    "train_way": 20,
    "train_queries": 5,
    "algorithms": ("meta-lstm", "maml", "fomaml", "nearest-neighbour"),
    "steps": 2,
    "order": "second",
    "gradient_scale": "way",
    "support_stats": "final",
    "hidden": 4,
    "bias_per": "tensor_and_step",
    "forget_bias": (7.0, 7.0),
    "input_bias": (-4.6, -4.6),
    "head_input_bias": (-0.5, -0.5),
    "inner_rate": 0.08,
    "meta_batch": 1,
    "learning_rate": 1e-3,
    "clip": 10.0,
    "schedule": "cosine",
    "episodes": 12_000,
    "validate_every": 1_000,
    "validation_episodes": 200,
    "save_every": 2_000,
}

PRESETS: dict[str, dict[str, Any]] = {
    # the same on letters; turned letters may be other letters
    "demo": _OMNIGLOT
    | {
        "dataset": "glyphs",
        "rotations": False,
        "algorithms": ("meta-lstm", "prototypical", "scratch", "nearest-neighbour"),
        "episodes": 1_500,
        "validate_every": 500,
        "validation_episodes": 100,
        "save_every": 500,
        "scratch_steps": 20,
    },
    "ravi-1shot": _RAVI
    | {
        "shot": 1,
        "steps": 12,
        "norm_momentum": 0.1,
        "episodes": 75_000,
    },
    "ravi-5shot": _RAVI
    | {
        "shot": 5,
        "steps": 8,
        "norm_momentum": 0.05,
        "episodes": 50_000,
    },
    "maml-omniglot": _MAML
    | {
        "dataset": "omniglot",
        "split": "characters",
        "rotations": True,
        "shot": 1,
        "queries": 1,
        "filters": 64,
        "strided": True,
        "steps": 1,
        "test_steps": 3,
        "inner_rate": 0.4,
        "meta_batch": 32,
        "episodes": 32 * 60_000,
        "validate_every": 16_000,
        "save_every": 16_000,
    },
    "maml-mini-imagenet": _MAML
    | {
        "dataset": "mini-imagenet",
        "shot": 1,
        "queries": 15,
        "filters": 32,
        "steps": 5,
        "test_steps": 10,
        "inner_rate": 0.01,
        "meta_batch": 4,
        "episodes": 4 * 60_000,
    },
    # the methods that a CPU can train, by time; Meta-LSTM as published
    "mini-imagenet": _RAVI
    | {
        "shot": 1,
        "steps": 12,
        "norm_momentum": 0.1,
        "algorithms": (
            "meta-lstm",
            "prototypical",
            "matching",
            "baseline++",
            "finetune-head",
            "finetune-all",
            "feature-centroid",
            "feature-neighbour",
            "nearest-neighbour",
        ),
        "minutes": 30,
    },
    "omniglot": _OMNIGLOT,
}

# What methods set otherwise than their preset. A flag on the command line holds for
# every method and wins over these. `experiments.few_shot.methods.COMMON` names what all methods
# of a table share, and so cannot stand here.

# The published Conv4 of methods that compare embeddings.
_EMBEDDING: dict[str, Any] = {
    "learner": "conv4",
    "filters": 64,
    "strided": False,
    "norm": "batch",
    "norm_momentum": 0.95,
    "final_relu": True,
    "tied_head": False,
    "train_way": 20,
    "train_queries": 5,
    "meta_batch": 1,
    "augment": "shift",
}
_METRIC_METHODS = (
    "prototypical", "prototypical-cosine", "matching", "matching-euclidean",
    "matching-fce", "relation", "relation-softmax", "siamese", "siamese-triplet",
    "hallucination",
)  # fmt: skip
_TRANSFER_METHODS = (
    "am-softmax", "arcface", "sphereface", "feature-neighbour", "feature-centroid",
    "feature-cosine", "finetune-head", "finetune-all", "baseline++",
)  # fmt: skip

# MAML and its kin on that Conv4, by one update. With a tied head it moves the head
# alone (every class starts alike, so the body's first gradient is zero), which makes
# meta-training on twenty ways as fast as a metric method's (docs/results/omniglot.md).
_ONE_UPDATE: dict[str, Any] = _EMBEDDING | {
    "final_relu": False,
    "tied_head": True,
    "steps": 1,
    "gradient_scale": "way",
    "inner_rate": 0.1,
}
# Two updates of one fixed rate on the mean loss: scaled by the way, as the gates' are,
# the second would overshoot on tasks of fewer classes.
_TWO_UPDATES: dict[str, Any] = {
    "filters": 64,
    "augment": "shift",
    "gradient_scale": "one",
    "inner_rate": 0.4,
}

# 84x84 pixels: as few filters as Meta-LSTM has as published, for a CPU.
_ON_LARGE_IMAGES: dict[str, Any] = _EMBEDDING | {"filters": 32, "augment": "none"}

METHOD_FLAGS: dict[str, dict[str, dict[str, Any]]] = {
    "omniglot": {
        **dict.fromkeys(
            ("maml", "fomaml", "meta-sgd", "learned-sgd"),
            _ONE_UPDATE | {"episodes": 6_000},
        ),
        "anil": _TWO_UPDATES | {"episodes": 6_000},
        "gradient-agreement": _ONE_UPDATE | {"meta_batch": 4, "episodes": 6_000},
        **dict.fromkeys(_METRIC_METHODS, _EMBEDDING | {"episodes": 4_000}),
        "prototypical": _EMBEDDING | {"episodes": 10_000},
        "hallucination": _EMBEDDING | {"episodes": 4_000, "train_way": 10},
        **dict.fromkeys(_TRANSFER_METHODS, _EMBEDDING | {"episodes": 5_000}),
        **dict.fromkeys(
            ("relation", "relation-softmax"),
            _EMBEDDING | {"episodes": 4_000, "train_way": 10, "train_queries": 4},
        ),
        "mann": _EMBEDDING | {"meta_batch": 16},
        "scratch": _EMBEDDING,
    },
    "mini-imagenet": {
        **dict.fromkeys(_METRIC_METHODS + _TRANSFER_METHODS, _ON_LARGE_IMAGES),
    },
}


def preset(name: str) -> Config:
    """Return the config of a named recipe.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: {did_you_mean(name, PRESETS)}")
    config = with_flags(Config(), preset=name, **PRESETS[name])
    own = METHOD_FLAGS.get(name, {})
    return dataclasses.replace(config, own={m: dict(flags) for m, flags in own.items()})
