"""Named recipes. A preset is a set of flags; what it does not name keeps its default.

docs/results/learned_optimizers.md says what each gave.
"""

from __future__ import annotations

from typing import Any

from experiments.few_shot.options import did_you_mean, with_flags
from experiments.learned_optimizer.options import Config

# What trained best: the LSTM reads what Adam reads, beside a learned shortcut to start
# from; second order; the log of the loss, late ones more; whole trajectories, at first
# short ones.
_RECIPE: dict[str, Any] = {
    "features": "moments",
    "lstm_layers": 1,
    "output_scale": 0.1,
    "shortcut": 0.2,
    "second_order": True,
    "loss_transform": "log",
    "weights": "linear",
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "unroll": 100,
    "horizon": 100,
    "steps": 100,
}
# Andrychowicz et al. (2016), section 3.2: 784-20-10, sigmoid, batches of 128, 100 steps
_MNIST: dict[str, Any] = {
    "problem": "mlp",
    "dataset": "mnist",
    "widths": (20,),
    "activation": "sigmoid",
    "init_std": 0.01,
    "batch_size": 128,
    "steps": 100,
    "tasks": 1,
    "validate_every": 50,
    "validation_instances": 8,
    "save_every": 25,
    "tune_instances": 8,
    "long_instances": 20,
}
_LEARNED_MNIST = (
    _RECIPE | _MNIST | {"hidden": 8, "stages": ("50:400",), "meta_steps": 800}
)

PRESETS: dict[str, dict[str, Any]] = {
    # a look at everything in a few minutes
    "demo": _RECIPE
    | {
        "relative": True,
        "tasks": 32,
        "unroll": 50,
        "stages": ("20:100",),
        "meta_steps": 200,
        "validate_every": 50,
        "save_every": 50,
    },
    # Gaussian quadratics, theta_0 ~ N(0, 1)
    "quadratics": _RECIPE
    | {
        "problem": "quadratics",
        "init_std": 1.0,
        "relative": True,
        "tasks": 128,
        "stages": ("20:300", "50:300"),
        "meta_steps": 1_200,
        "validate_every": 100,
        "validation_instances": 512,
        "save_every": 100,
        "instances": 1_000,
        "tune_instances": 256,
    },
    # as published: W and y uniform, theta_0 ~ N(0, 0.01^2), truncated at 20
    "quadratics-published": {
        "problem": "quadratics",
        "distribution": "uniform",
        "init_std": 0.01,
        "rules": ("l2l-published",),
        "rule_options": '{"l2l-published": {"features": "raw", "output_scale": 1.0}}',
        "tasks": 128,
        "unroll": 20,
        "horizon": 100,
        "meta_steps": 10_000,
        "validate_every": 1_000,
    },
    "mnist-mlp": _LEARNED_MNIST,
    # as published: truncated at 20, first order
    "mnist-mlp-published": _MNIST
    | {
        "rules": ("l2l-published",),
        "unroll": 20,
        "horizon": 100,
        "meta_steps": 10_000,
        "validate_every": 500,
        "save_every": 250,
    },
    # to hold on other networks and for longer: random scaling, a growing horizon
    "held": _LEARNED_MNIST
    | {
        "stages": ("50:150",),
        "unroll": 50,
        "horizon": 1_000,
        "first_horizon": 100,
        "weights": "uniform",
        "loss_transform": "log",
        "scaling": (0.33, 3.0),
        "scaling_per": "tensor",
        "tasks": 2,
        "stagger": True,
        "study": ("comparison", "generalisation", "cost"),
    },
    "mnist-conv": _LEARNED_MNIST
    | {"problem": "conv", "init_std": None, "separate": "conv-or-dense"},
    "plateau": {
        "problem": "plateau",
        "rules": ("gates", "gates-f1", "v2", "v2-f1"),
        "horizon": 100,
        "tasks": 64,
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
