"""The run of `general`: evolution over whole runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalstm
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics, write_json
from experiments.common.saved_options import to_json
from experiments.learned_optimizer.general import Config
from experiments.learned_optimizer.general_segments import make_parts
from experiments.learned_optimizer.general_validation import (
    NAME,
    built,
    export,
    make_score,
)
from experiments.learned_optimizer.meta_tasks import Task
from metalstm.base import Array, PyTree, UpdateRule
from metalstm.learned_optimizers import (
    PairedRuns,
    make_paired_runs,
    with_random_scaling,
)

MAY_CHANGE = ("folder", "export", "evaluate", "save_every")
_LARGEST = 1.0  # of a difference of two scores: a factor of e in the last loss


# -- meta-steps ------------------------------------------------------------------------


def make_meta_step(
    config: Config,
    rule: UpdateRule,
    tasks: Sequence[Task],
    optimizer: optax.GradientTransformation,
) -> Callable[[metalstm.TrainState, Any], tuple[metalstm.TrainState, dict]]:
    """``(state, data of each task) -> (state, metrics [1])``, for `metalstm.fit`."""
    low, high = np.log(config.horizon)
    programs = [
        make_paired_runs(
            with_random_scaling(task.family, *config.scaling, per="problem"),
            rule,
            num_pairs=-(-config.num_pairs // (2 if task.costly else 1)),
            tell_progress=config.tell_progress,
            antithetic=config.antithetic,
        )
        for task in tasks
    ]

    @jax.jit
    def absorb(state: metalstm.TrainState, std: PyTree, found: list[PairedRuns]):
        grads = jax.tree.map(jnp.zeros_like, state.params)
        for pairs in found:
            along = jnp.clip(pairs.differences, -_LARGEST, _LARGEST)
            along = along / (len(along) * len(found))
            grads = jax.tree.map(
                lambda g, z: g + jnp.tensordot(along, z, 1),  # noqa: B023
                grads,
                pairs.noises,
            )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(jnp.multiply, updates, std)
        metrics = {
            "loss": jnp.stack([pairs.score for pairs in found]).mean(),
            "diverged": jnp.stack([pairs.diverged for pairs in found]).mean(),
            "grad_norm": optax.tree.norm(grads),
            "finite": jnp.isfinite(optax.tree.norm(updates)),
        }
        new = metalstm.TrainState(
            state.step + 1,
            state.seed,
            optax.apply_updates(state.params, updates),
            opt_state,
            (),
        )
        return new, jax.tree.map(lambda x: x[None], metrics)

    def run(state: metalstm.TrainState, pools: Sequence[Any]):
        seed, step = int(state.seed), int(state.step)
        std = perturbations(config, state.params, step)
        key = jax.random.fold_in(jax.random.key(seed), step)
        lengths = np.random.default_rng([seed, step]).uniform(low, high, len(tasks))
        found = [
            program(
                state.params,
                std,
                pool,
                jax.random.fold_in(key, k),
                jnp.int32(round(math.exp(lengths[k]))),
            )
            for k, (program, pool) in enumerate(zip(programs, pools, strict=True))
        ]
        return absorb(state, std, found)

    return run


def perturbations(config: Config, params: PyTree, step: int) -> PyTree:
    """The standard deviation of each leaf, like ``params``; 0 where it stays."""
    linear = step < config.linear_steps

    def one(path: tuple, leaf: Array) -> float:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name.startswith("step") or name.endswith("output.bias"):
            return config.std
        return 0.0 if linear else config.std / 2

    return jax.tree_util.tree_map_with_path(one, params)


def init_state(
    config: Config,
    rule: UpdateRule,
    optimizer: optax.GradientTransformation,
) -> metalstm.TrainState:
    params = rule.init(jax.random.key(config.seed), {})
    state = metalstm.TrainState(
        jnp.int32(0),
        jnp.uint32(config.seed),
        params,
        optimizer.init(params),
        (),
    )
    return jax.tree.map(jnp.array, state)


# -- the run ---------------------------------------------------------------------------


def run(config: Config, tasks: Sequence[Task], validation: Sequence[Task]) -> None:
    """Meta-train on the families of ``tasks``, or resume; then export the best.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
    """
    rule = built(config)
    data = [task.data for task in tasks]
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.meta_steps)
    optimizer = optax.adam(schedule, b2=0.99)
    if config.estimator == "runs":
        step = make_meta_step(config, rule, tasks, optimizer)
        make_state = lambda: init_state(config, rule, optimizer)  # noqa: E731
    else:
        clip, scale = optax.clip_by_global_norm(1.0), optax.scale(config.std)
        optimizer = optax.chain(clip, optimizer, scale)
        parts = make_parts(config, rule, tasks)
        step = metalstm.make_mixture_loop(parts, optimizer)
        make_state = lambda: metalstm.init_mixture_state(  # noqa: E731
            parts, optimizer, config.seed, data
        )
    write_json(config.folder / "config.json", {"config": to_json(config)})
    setup = Setup(
        name=NAME,
        config=config,
        may_change=MAY_CHANGE,
        num_steps=config.meta_steps,
        minutes=None,
        steps_per_call=1,
        validate_every=config.validate_every,
        report_every=5,
        save_every=config.save_every,
        score=make_score(config, rule, validation),
        describe=lambda means: f"loss {means['loss']:.4g}",
    )
    metrics = Metrics(config.folder, counter="step")
    loop = Loop(setup, config.folder, metrics, None, make_state)
    with loop.running():
        if int(loop.state.train.step) == 0:  # the fresh rule may remain the best
            score, row = setup.score(loop.state.train.params)
            metrics.write(NAME, "validation", 0, **row)
            loop.state = loop.state._replace(best_score=jnp.float32(score))
        loop.fit(step, data)
    export(config.folder, config.folder / f"{NAME}.npz")
