"""Meta-train one rule, or resume its meta-training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

import metalstm
from experiments.common.devices import mesh_for
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics
from experiments.learned_optimizer.command_line import Stage, may_change, stages
from experiments.learned_optimizer.options import Budget, Config
from experiments.learned_optimizer.problems import Source, task_mapping
from metalstm import learned_optimizers
from metalstm.base import MetaAlgorithm, PyTree, UpdateRule
from metalstm.learned_optimizers import curves, problems
from metalstm.meta.step import place_state
from metalstm.runtime import sharding
from metalstm.statistics import mean_and_ci95

_VALIDATION_SEED = 1_000_003  # far from the seeds of training, tuning and test
_FOREVER = 10**9  # meta-steps: time decides


class Trained(NamedTuple):
    params: PyTree  # the best on validation
    meta_steps: int
    seconds: float  # of meta-training and validation, over all sessions
    best_step: int
    validation: float  # mean log-loss after the last update


def meta_train(
    name: str,
    rule: UpdateRule,
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
    budget, num_tasks = config.budget, config.training.num_tasks
    planned = stages(config)
    if budget.minutes is not None:
        planned = [planned[-1]._replace(end=_FOREVER)]
    every = budget.steps_per_call
    setup = Setup(
        name=name,
        config=config,
        may_change=may_change(config),
        num_steps=planned[-1].end // every * every,
        minutes=budget.minutes,
        steps_per_call=every,
        validate_every=budget.validate_every,
        report_every=max(budget.meta_steps // 500 // every, 1) * every,
        save_every=budget.save_every,
        score=_make_score(rule, config, source),
        describe=lambda means: f"loss {means['loss']:.4g}",
        mesh=mesh_for(config.devices, num_tasks, "--num-tasks"),
    )
    sampler = problems.ProblemSampler(source.training, config.training.unroll_steps + 1)
    optimizer = _optimizer(config.budget)
    algorithms = [_algorithm(rule, config, source, stage) for stage in planned]
    draw = sampler.sample(jax.random.key(0), source.training_data)
    seed = config.run.seed
    make_state = functools.partial(
        metalstm.init_train_state, algorithms[0], optimizer, seed, draw
    )
    loop = Loop(setup, folder, metrics, algorithms[0], make_state)
    with loop.running():
        for stage, algorithm in zip(planned, algorithms, strict=True):
            train = loop.state.train
            if int(train.step) >= stage.end:
                continue
            if int(train.step) == stage.start:
                # every problem starts afresh, after resuming here too
                key = jax.random.fold_in(jax.random.key(seed), stage.start)
                draw = sampler.sample(key, source.training_data)
                carry = algorithm.init_carry(key, sharding.local(train.params), draw)
                # copies: a train step donates its state, which may hold no buffer twice
                train = train._replace(carry=jax.tree.map(jnp.array, carry))
                train = place_state(algorithm, train, setup.mesh)
                loop.state = loop.state._replace(train=train)
            train_loop = metalstm.make_train_loop(
                algorithm,
                optimizer,
                sampler,
                num_tasks=num_tasks,
                steps_per_call=every,
                mesh=setup.mesh,
            )
            loop.fit(train_loop, source.training_data, until=stage.end)
    state = loop.state
    return Trained(
        state.best_params,
        int(state.train.step),
        loop.saved.seconds(),
        int(state.best_step),
        -float(state.best_score),
    )


def _make_score(
    rule: UpdateRule, config: Config, source: Source
) -> Callable[[PyTree], tuple[float, dict[str, float]]]:
    """Minus the mean log of the last loss, a divergence at its cap."""
    test = config.test
    loss_curves = curves.make_loss_curves(
        source.test,
        rule,
        num_instances=config.budget.validation_instances,
        num_steps=test.steps,
        record_every=test.steps,
        eval_batch=test.eval_batch,
        task_mapping=task_mapping(config.problem),
    )

    def score(params: PyTree) -> tuple[float, dict[str, float]]:
        losses = loss_curves(sharding.local(params), source.data, _VALIDATION_SEED)
        mean, ci95 = mean_and_ci95(curves.capped_logs(losses))
        return -mean, {"log_loss": mean, "ci95": ci95}

    return score


def _horizon(config: Config, stage: Stage) -> int | Callable[[jax.Array], jax.Array]:
    """The horizon, or how it grows with the meta-step: doubling, in equal shares."""
    first, last = config.budget.first_horizon, config.training.horizon
    if stage.end < config.budget.meta_steps or first in (None, last):
        return stage.horizon
    horizons, unroll = [first], config.training.unroll_steps
    while horizons[-1] < last:
        horizons.append(min(2 * horizons[-1], last) // unroll * unroll)
    lengths = np.array(horizons, np.int32)
    # the carry counts meta-steps from the start of the stage
    each = max((stage.end - stage.start) // (2 * len(horizons)), 1)
    return lambda step: jnp.asarray(lengths)[
        jnp.minimum(jnp.asarray(step) // each, len(horizons) - 1)
    ]


def _algorithm(
    rule: UpdateRule, config: Config, source: Source, stage: Stage
) -> MetaAlgorithm:
    budget = config.budget
    linear = lambda step: 2 * step / stage.horizon  # noqa: E731
    options = msgspec.structs.asdict(config.training)
    options |= {"unroll_steps": stage.unroll_steps, "horizon": _horizon(config, stage)}
    second = budget.order == "second"
    differentiation = metalstm.second_order if second else metalstm.first_order
    return learned_optimizers.learned_optimizer(
        source.training,
        rule,
        differentiation=differentiation(keep=budget.keep),
        axis_name=sharding.COORDINATE if config.devices.devices_per_task > 1 else None,
        weights=linear if budget.weights == "linear" else None,
        **options,
    )


def _optimizer(budget: Budget) -> optax.GradientTransformation:
    rate: optax.ScalarOrSchedule = budget.learning_rate
    if budget.schedule == "cosine":
        rate = optax.cosine_decay_schedule(budget.learning_rate, budget.meta_steps)
    if budget.clip:
        return metalstm.adam_clipped(rate, budget.clip)
    return optax.adam(rate)
