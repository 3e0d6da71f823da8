"""Meta-train one rule, or resume its meta-training."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

import metalstm
from experiments.common.devices import mesh_for
from experiments.common.run_folder import Metrics
from experiments.common.training_session import Session
from experiments.learned_optimizer.command_line import Stage, may_change, stages
from experiments.learned_optimizer.options import Config
from experiments.learned_optimizer.problems import NEED_NO_DATA, Source
from experiments.learned_optimizer.tables import capped_logs
from metalstm import learned_optimizers
from metalstm.base import MetaAlgorithm, PyTree, UpdateRule
from metalstm.learned_optimizers import curves, problems
from metalstm.meta.training import place_state
from metalstm.runtime import sharding

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
    session = _Session(name, rule, config, source, folder, metrics)
    session.run()
    return session.result()


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
    return learned_optimizers.learned_optimizer(
        source.training,
        rule,
        second_order=budget.second_order,
        memory="plain" if budget.keep == "all" else budget.keep,
        weights=linear if budget.weights == "linear" else None,
        **options,
    )


def _optimizer(config: Config) -> optax.GradientTransformation:
    budget = config.budget
    rate: optax.ScalarOrSchedule = budget.learning_rate
    if budget.schedule == "cosine":
        rate = optax.cosine_decay_schedule(budget.learning_rate, budget.meta_steps)
    if budget.clip:
        return metalstm.adam_clipped(rate, budget.clip)
    return optax.adam(rate)


class _Session(Session):
    def __init__(
        self,
        name: str,
        rule: UpdateRule,
        config: Config,
        source: Source,
        folder: Path,
        metrics: Metrics,
    ):
        budget = config.budget
        self.rule, self.source = rule, source
        self.stages = stages(config)
        if budget.minutes is not None:
            self.stages = [self.stages[-1]._replace(end=_FOREVER)]
        calls = self.stages[-1].end // budget.steps_per_call
        super().__init__(
            name,
            config,
            folder,
            metrics,
            num_steps=calls * budget.steps_per_call,
            may_change=may_change(config),
            mesh=mesh_for(config.devices, config.training.num_tasks, "--num-tasks"),
        )
        self.sampler = problems.ProblemSampler(
            source.training, config.training.unroll_steps + 1
        )
        self.optimizer = _optimizer(config)
        algorithm = _algorithm(rule, config, source, self.stages[0])
        make = functools.partial(
            metalstm.init_train_state,
            algorithm,
            self.optimizer,
            config.run.seed,
            self.sampler.sample(jax.random.key(0), source.training_data),
        )
        self.start(algorithm, make)

    def train(self) -> None:
        for stage in self.stages:
            if int(self.state.train.step) < stage.end:
                self._train_stage(stage)

    def _train_stage(self, stage: Stage) -> None:
        budget = self.config.budget
        algorithm = _algorithm(self.rule, self.config, self.source, stage)
        if int(self.state.train.step) == stage.start:
            self._begin(algorithm, stage)
        train_loop = metalstm.make_train_loop(
            algorithm,
            self.optimizer,
            self.sampler,
            num_tasks=self.config.training.num_tasks,
            steps_per_call=budget.steps_per_call,
            mesh=self.mesh,
        )
        every = budget.steps_per_call
        self.fit(
            train_loop,
            self.source.training_data,
            num_steps=min(stage.end, self.num_steps),
            validate_every=budget.validate_every,
            report_every=max(budget.meta_steps // 500 // every, 1) * every,
            save_every=budget.save_every,
        )

    def _begin(self, algorithm: MetaAlgorithm, stage: Stage) -> None:
        """Start every problem afresh; resuming from a checkpoint here does the same."""
        key = jax.random.fold_in(jax.random.key(self.config.run.seed), stage.start)
        draw = self.sampler.sample(key, self.source.training_data)
        train = self.state.train
        params = sharding.local(train.params)
        carry = algorithm.init_carry(key, params, draw)
        # copies: a train step donates its state, which may hold no buffer twice
        train = train._replace(carry=jax.tree.map(jnp.array, carry))
        train = place_state(algorithm, train, self.mesh)
        self.state = self.state._replace(train=train)

    @functools.cached_property
    def _curves(self) -> Callable[[PyTree, Any, int], np.ndarray]:
        test = self.config.test
        kind = self.config.problem.name
        return curves.make_loss_curves(
            self.source.test,
            self.rule,
            num_instances=self.config.budget.validation_instances,
            num_steps=test.steps,
            record_every=test.steps,
            eval_batch=test.eval_batch,
            task_mapping="vmap" if kind in NEED_NO_DATA else None,
        )

    def score(self, params: PyTree) -> tuple[float, dict[str, float]]:
        """Minus the mean log of the last loss, a divergence at its cap."""
        params = sharding.local(params)
        losses = self._curves(params, self.source.data, _VALIDATION_SEED)
        logs = capped_logs(losses, -1)
        mean = float(logs.mean())
        ci95 = float(1.96 * logs.std(ddof=1) / len(logs) ** 0.5)
        return -mean, {"log_loss": mean, "ci95": ci95}

    def result(self) -> Trained:
        return Trained(
            self.state.best_params,
            int(self.state.train.step),
            self.saved_seconds(),
            int(self.state.best_step),
            -float(self.state.best_score),
        )
