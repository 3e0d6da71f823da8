"""Meta-train one method of few_shot, or resume its meta-training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.sharding import Mesh

import metalstm
from experiments.common.devices import mesh_for
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics
from experiments.few_shot.data import Source
from experiments.few_shot.options import Config, may_change
from metalstm.base import PyTree
from metalstm.runs import build_algorithm, example_episode
from metalstm.runtime import sharding


class Programs(NamedTuple):
    """What is compiled once for each method and serves every seed."""

    algorithm: metalstm.MetaAlgorithm
    optimizer: optax.GradientTransformation
    train_loop: Callable[..., Any]
    evaluate: Callable[..., metalstm.Evaluation]
    mesh: Mesh | None  # of a meta-step


class Trained(NamedTuple):
    params: PyTree  # the best on validation
    episodes: int
    seconds: float  # of meta-training and validation
    episodes_per_second: float  # of meta-training, compilation left out; nan if none
    best_episode: int
    best_mean: float
    best_ci95: float


def make_programs(spec: dict[str, Any], config: Config, source: Source) -> Programs:
    """Compile-once parts of a method; ``config`` holds the flags as it reads them."""
    algorithm = build_algorithm(spec)
    mesh = mesh_for(config.devices, config.budget.meta_batch, "--meta-batch")
    # evaluation shares no task between devices
    trained = build_algorithm(spec, axis_name=sharding.shared_axis(mesh))
    budget = config.budget
    first_rate = spec.get("outer_step", budget.learning_rate)
    rate: optax.ScalarOrSchedule = first_rate
    if budget.schedule == "cosine":
        rate = optax.cosine_decay_schedule(first_rate, _num_steps(config))
    elif budget.schedule == "linear":
        rate = optax.linear_schedule(first_rate, 0.0, _num_steps(config))
    optimizer = optax.adam(rate)
    if "outer_step" in spec:
        optimizer = optax.sgd(rate)
    elif budget.clip:
        optimizer = metalstm.adam_clipped(rate, budget.clip)
    train_loop = metalstm.make_train_loop(
        trained,
        optimizer,
        source.train(config),
        num_tasks=budget.meta_batch,
        steps_per_call=budget.steps_per_call,
        mesh=mesh,
        accumulate_tasks=budget.accumulate_tasks,
    )
    evaluate = metalstm.make_evaluate(
        algorithm,
        source.test,
        batch_size=config.test.test_batch,
        mesh=sharding.task_mesh(num_devices=config.devices.devices),
    )
    return Programs(algorithm, optimizer, train_loop, evaluate, mesh)


def meta_train(
    method: str,
    programs: Programs,
    config: Config,
    source: Source,
    folder: Path,
    metrics: Metrics,
) -> Trained:
    """Train, or resume training, until the budget is spent.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
      NonFiniteLossError: the state before the bad step is saved.
    """
    budget, data = config.budget, config.data

    def score(params: PyTree) -> tuple[float, dict[str, float]]:
        result = programs.evaluate(
            params,
            source.dataset.validation,
            num_episodes=budget.validation_episodes,
            split="validation",
        )
        return result.mean, {"accuracy": result.mean, "ci95": result.ci95}

    setup = Setup(
        name=method,
        config=config,
        may_change=may_change(config),
        num_steps=_num_steps(config),
        minutes=budget.minutes,
        steps_per_call=budget.steps_per_call,
        validate_every=_in_steps(budget.validate_every, config),
        report_every=_in_steps(max(20, budget.episodes // 2_000), config),
        save_every=_in_steps(budget.save_every, config),
        score=score,
        describe=_describe,
        unit="episode",
        per_step=budget.meta_batch,
        mesh=programs.mesh,
    )
    make_state = functools.partial(
        metalstm.init_train_state,
        programs.algorithm,
        programs.optimizer,
        config.run.seed,
        example_episode(source.dataset.image_shape, data.way, data.shot),
    )
    loop = Loop(setup, folder, metrics, programs.algorithm, make_state)
    with loop.running():
        loop.fit(programs.train_loop, source.dataset.train)
    best = int(loop.state.best_step) * budget.meta_batch
    ci95 = {row["episode"]: row["ci95"] for row in loop.history}
    return Trained(
        loop.state.best_params,
        int(loop.state.train.step) * budget.meta_batch,
        loop.saved.seconds(),
        loop.stopwatch.speed(),
        best,
        float(loop.state.best_score),
        ci95.get(best, math.nan),
    )


def _describe(means: dict[str, float]) -> str:
    text = f"loss {means['loss']:.3f}"
    if "accuracy" in means:
        text += f"  acc {means['accuracy']:.1%}"
    return text


def _num_steps(config: Config) -> int:
    if config.budget.minutes is not None:
        # far enough that time decides
        return _in_steps(10**9, config)
    return _in_steps(config.budget.episodes, config)


def _in_steps(episodes: int, config: Config) -> int:
    """Meta-steps for that many episodes, up to a whole jitted call."""
    budget = config.budget
    calls = math.ceil(episodes / (budget.meta_batch * budget.steps_per_call))
    return calls * budget.steps_per_call


def curves(rows: list[dict[str, Any]], method: str, kind: str, name: str):
    """A `metalstm.plots.Curve` from rows of metrics.jsonl."""
    from metalstm.plots import Curve

    mine = [r for r in rows if (r["method"], r["kind"]) == (method, kind) and name in r]
    episodes = np.array([row["episode"] for row in mine])
    values = np.array([row[name] for row in mine])
    ci95 = np.array([row.get("ci95", np.nan) for row in mine])
    return Curve(episodes, values, None if kind == "train" else ci95)
