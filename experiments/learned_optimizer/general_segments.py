"""The estimators that `general` is compared with: runs in segments, a family a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import metalstm
from experiments.learned_optimizer.general import Config
from experiments.learned_optimizer.meta_tasks import Task
from metalstm.base import UpdateRule
from metalstm.learned_optimizers import (
    ProblemSampler,
    learned_optimizer,
    with_random_scaling,
)


def make_parts(
    config: Config, rule: UpdateRule, tasks: Sequence[Task]
) -> list[metalstm.MixturePart]:
    """A part for each family, for `metalstm.make_mixture_loop`.

    All losses of a run count, late ones more: a segment knows no last one.
    """
    parts = []
    for task in tasks:
        family = with_random_scaling(task.family, *config.scaling, per="problem")
        num_tasks = -(-config.num_pairs // (2 if task.costly else 1))
        options: dict[str, Any] = {
            "num_tasks": num_tasks,
            "unroll_steps": config.segment,
            "horizon": config.horizon,
            "tell_progress": config.tell_progress,
            "stagger": True,
            "loss_transform": "log_relative",
            "weights": lambda done: 3 * done**2,
            "task_mapping": "vmap",
        }
        algorithm = learned_optimizer(
            family,
            rule,
            estimator=cast(Literal["pes", "backprop"], config.estimator),
            pes_std=config.std,
            differentiation=metalstm.second_order("all"),
            **options,
        )
        sampler = ProblemSampler(family, config.segment + 1)
        parts.append(metalstm.MixturePart(algorithm, sampler, num_tasks))
    return parts
