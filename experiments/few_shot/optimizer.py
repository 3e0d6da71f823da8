"""What meta-training minimises with, and for how many meta-steps."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from experiments.few_shot.methods import moves_theta
from experiments.few_shot.options import Training
from metalstm.base import MetaParams, PyTree


def make_optimizer(method: Any, training: Training) -> optax.GradientTransformation:
    """Adam, clipped; for reptile SGD, whose step is the outer one."""
    if moves_theta(method):
        return optax.sgd(_schedule(method.outer_step, training))
    adam = optax.adam(_schedule(training.learning_rate, training))
    if training.theta_learning_rate is not None:
        of_theta = optax.set_to_zero()
        if training.theta_learning_rate:
            of_theta = optax.adam(_schedule(training.theta_learning_rate, training))
        adam = optax.multi_transform({"learner": of_theta, "rule": adam}, _fields)
    if training.clip:
        return optax.chain(optax.clip_by_global_norm(training.clip), adam)
    return adam


def _schedule(first_rate: float, training: Training) -> optax.ScalarOrSchedule:
    steps = max(1, num_steps(training))  # of no episodes it is never asked
    if training.schedule == "cosine":
        return optax.cosine_decay_schedule(first_rate, steps)
    if training.schedule == "linear":
        return optax.linear_schedule(first_rate, 0.0, steps)
    return first_rate


def _fields(params: PyTree) -> PyTree:
    """Which part of the meta-parameters each array belongs to."""
    if not isinstance(params, MetaParams):
        raise ValueError(
            "--theta-learning-rate is for methods that learn theta_0 for a rule: this "
            "one has no rule; give --learning-rate"
        )
    return MetaParams(
        *(
            jax.tree.map(lambda _, name=name: name, getattr(params, name))
            for name in params._fields
        )
    )


def num_steps(training: Training) -> int:
    # with minutes: far enough that time decides
    return in_steps(training.episodes if training.minutes is None else 10**9, training)


def in_steps(episodes: int, training: Training) -> int:
    """Meta-steps for that many episodes, up to a whole jitted call."""
    calls = math.ceil(episodes / (training.meta_batch * training.steps_per_call))
    return calls * training.steps_per_call
