"""The run of `general`: the mixture, validation next to tuned AdamW, the export."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optax

import metalstm
from experiments.common.cli import check_names
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics, write_json
from experiments.common.saved_options import to_json
from experiments.learned_optimizer.general import Config
from experiments.learned_optimizer.meta_tasks import (
    Task,
    training_tasks,
    validation_tasks,
)
from metalstm import rules
from metalstm.base import PyTree, UpdateRule
from metalstm.learned_optimizers import (
    ProblemSampler,
    capped_logs,
    learned_optimizer,
    make_loss_curves,
    sweep,
    with_random_scaling,
)

NAME = "gates"
_VALIDATION_SEED = 1_000_003
_CAP = 2.0  # of a family's log ratio: losses near zero must not decide alone
_RATES = tuple(10 ** (k / 2) for k in range(-8, 0))  # of AdamW: 1e-4 to 0.3
_MAY_CHANGE = ("folder", "export", "save_every")


def make_parts(
    config: Config, rule: UpdateRule, tasks: Sequence[Task]
) -> tuple[list[metalstm.MixturePart], list[Any]]:
    """The parts of the mixture, and each one's data."""
    steps, parts, pools = config.unroll_steps, [], []
    for task in tasks:
        family = with_random_scaling(
            task.family, *config.scaling, per="problem", loss=config.loss_scaling
        )
        options: dict[str, Any] = {
            "num_tasks": task.num_tasks,
            "unroll_steps": steps,
            "tell_progress": config.tell_progress,
            "loss_transform": "log_relative",
            "weights": lambda done: 3 * done**2,
            "task_mapping": "vmap",
        }
        evolved = learned_optimizer(
            family,
            rule,
            horizon=config.horizon,
            estimator="pes",
            pes_std=config.pes_std,
            stagger=True,
            **options,
        )
        algorithms = [(evolved, 1.0)]
        if task.name in config.backprop:
            exact = learned_optimizer(
                family,
                rule,
                horizon=steps,
                differentiation=metalstm.second_order("all"),
                **options,
            )
            algorithms.append((exact, config.backprop_weight))
        sampler = ProblemSampler(family, steps + 1)
        for algorithm, weight in algorithms:
            part = metalstm.MixturePart(algorithm, sampler, task.num_tasks, weight)
            parts.append(part)
            pools.append(task.data)
    return parts, pools


def make_score(
    config: Config, rule: UpdateRule, tasks: Sequence[Task]
) -> Callable[[PyTree], tuple[float, dict[str, float]]]:
    """Minus the mean log ratio of final losses to tuned AdamW's."""
    steps = config.validation_steps
    options: dict[str, Any] = {
        "num_instances": config.validation_instances,
        "num_steps": steps,
        "record_every": steps,
        "eval_batch": 1_024,
        "task_mapping": "vmap",
    }
    length = steps if config.tell_progress else None
    told = UpdateRule(
        rule.init, lambda params: rules.with_progress(rule.bind(params), length)
    )
    measures = {
        task.name: make_loss_curves(task.family, told, **options) for task in tasks
    }
    reference = {task.name: _adamw(task, options) for task in tasks}

    def score(params: PyTree) -> tuple[float, dict[str, float]]:
        ratios = {}
        for task in tasks:
            losses = measures[task.name](params, task.data, _VALIDATION_SEED)
            ratio = capped_logs(losses).mean() - reference[task.name]
            ratios[task.name] = float(np.clip(ratio, -_CAP, _CAP))
        mean = float(np.mean(list(ratios.values())))
        return -mean, {"log_ratio": mean, **ratios, "cpu_seconds": time.process_time()}

    return score


def _adamw(task: Task, options: dict[str, Any]) -> float:
    """The mean log of AdamW's final losses, at the best rate for these very runs."""

    def adamw(learning_rate):
        steps = options["num_steps"]
        return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))

    found = sweep(
        task.family,
        rules.tunable(adamw, learning_rate=1e-3),
        {"learning_rate": _RATES},
        task.data,
        seed=_VALIDATION_SEED,
        score="mean_log",
        **options,
    )
    mean = float(capped_logs(found.best_curves).mean())
    where = "" if found.inside["learning_rate"] else ", at the end of its grid"
    rate = found.best["learning_rate"]
    print(f"{task.name}: AdamW at {rate:.2g}{where}, log loss {mean:.3f}", flush=True)
    return mean


def run(config: Config) -> None:
    """Meta-train, or resume; then export the best.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
    """
    rule = rules.build_rule(_spec(config))
    parts, pools = make_parts(config, rule, _chosen(config))
    moving = max(config.meta_steps - config.burn_in, 1)
    decay = optax.cosine_decay_schedule(config.learning_rate, moving)
    stays = optax.constant_schedule(0.0)
    schedule = optax.join_schedules([stays, decay], [config.burn_in])
    optimizer = metalstm.adam_clipped(schedule, 1.0)
    setup = Setup(
        name=NAME,
        config=config,
        may_change=_MAY_CHANGE,
        num_steps=config.meta_steps,
        minutes=None,
        steps_per_call=1,
        validate_every=config.validate_every,
        report_every=50,
        save_every=config.save_every,
        score=make_score(config, rule, validation_tasks()),
        describe=lambda means: f"loss {means['loss']:.4g}",
    )
    metrics = Metrics(config.folder, counter="step")
    loop = Loop(
        setup,
        config.folder,
        metrics,
        parts[0].algorithm,
        lambda: metalstm.init_mixture_state(parts, optimizer, config.seed, pools),
    )
    if not config.export:
        write_json(config.folder / "config.json", {"config": to_json(config)})
        with loop.running():
            if int(loop.state.train.step) == 0:  # of a fresh rule
                _, row = setup.score(loop.state.train.params)
                metrics.write(NAME, "validation", 0, **row)
            loop.fit(metalstm.make_mixture_loop(parts, optimizer), pools)
    _export(config, loop)


def _spec(config: Config) -> dict[str, Any]:
    return {"rule": config.rule, "hidden_size": config.hidden_size}


def _chosen(config: Config) -> list[Task]:
    tasks = {task.name: task for task in training_tasks()}
    check_names("--families", config.families, tasks)
    check_names("--backprop", config.backprop, tasks)
    return [tasks[name] for name in config.families or tasks]


def _export(config: Config, loop: Loop) -> None:
    state = loop.state
    step = int(state.best_step)
    if not math.isfinite(float(state.best_score)):
        raise ValueError(f"{config.folder} has no validated rule yet: train it first")
    info = {
        "trained_on": f"{len(_chosen(config))} families of small problems",
        "best_step": step,
        "meta_steps": int(state.train.step),
        "validation_log_ratio_to_adamw": -float(state.best_score),
        "config": to_json(config),
    }
    path = config.folder / f"{NAME}.npz"
    rules.save_rule(path, _spec(config), state.best_params, info=info)
    ratio = math.exp(-float(state.best_score))
    print(f"{path}: meta-step {step:,}, final losses {ratio:.3f} of tuned AdamW's")
