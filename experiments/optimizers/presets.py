"""Named recipes. A preset is a set of flags; what it does not name keeps its default.

docs/results/learned_optimizers.md says what each gave.
"""

from __future__ import annotations

from typing import Any

from experiments.config import did_you_mean, with_flags
from experiments.optimizers.config import Config

# Andrychowicz et al. (2016), section 3.2: 784-20-10, sigmoid, batches of 128, 100 steps
_MNIST: dict[str, Any] = {
    "problem": "mlp",
    "dataset": "mnist",
    "widths": (20,),
    "activation": "sigmoid",
    "init_std": 0.01,
    "batch_size": 128,
    "steps": 100,
    "unroll": 20,
    "horizon": 100,
    "tasks": 1,
    "meta_steps": 5_000,
    "validate_every": 500,
    "validation_instances": 8,
    "save_every": 100,
}

PRESETS: dict[str, dict[str, Any]] = {
    # a look at everything in some two minutes
    "demo": {"meta_steps": 300, "tasks": 32, "validate_every": 100, "save_every": 100},
    # Gaussian quadratics, theta_0 ~ N(0, 1); the whole trajectory is differentiated
    "quadratics": {
        "problem": "quadratics",
        "init_std": 1.0,
        "tasks": 64,
        "unroll": 100,
        "horizon": 100,
        "loss_transform": "log",
        "schedule": "cosine",
        "meta_steps": 5_000,
        "validate_every": 500,
        "save_every": 250,
        "validation_instances": 256,
    },
    # the published recipe: W and y uniform, theta_0 ~ N(0, 0.01^2), truncated at 20
    "quadratics-published": {
        "problem": "quadratics",
        "distribution": "uniform",
        "init_std": 0.01,
        "tasks": 128,
        "unroll": 20,
        "horizon": 100,
        "features": "raw",
        "output_scale": 1.0,
        "meta_steps": 10_000,
    },
    "mnist-mlp": _MNIST,
    # to hold on other networks and for longer: random scaling, a curriculum
    "held": _MNIST
    | {
        "scaling": (0.1, 10.0),
        "horizon": 1_000,
        "first_horizon": 40,
        "stagger": True,
        "tasks": 4,
        "study": ("comparison", "generalisation", "cost"),
    },
    "mnist-conv": _MNIST
    | {
        "problem": "conv",
        "activation": "relu",
        "init_std": None,
        "separate": "conv-or-dense",
    },
    "plateau": {
        "problem": "plateau",
        "rules": ("gates", "gates-f1", "v2", "v2-f1"),
        "study": ("comparison", "plateau"),
    },
}


def preset(name: str) -> Config:
    """Return the config of a named recipe.

    Raises:
      ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"--preset {name}: {did_you_mean(name, PRESETS)}")
    return with_flags(Config(), preset=name, **PRESETS[name])
