"""The run of `general`: evolution, validation next to tuned AdamW, the export."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
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
from metalstm.base import Array, PyTree, UpdateRule
from metalstm.learned_optimizers import (
    PairedRuns,
    make_loss_curves,
    make_paired_runs,
    sweep,
    with_random_scaling,
)

NAME = "gates"
_VALIDATION_SEED = 1_000_003
_FLOOR = 0.02  # share of the first loss below which a validation loss hardly counts
_RATES = tuple(10 ** (k / 2) for k in range(-8, 0))  # of AdamW: 1e-4 to 0.3
_MAY_CHANGE = ("folder", "export", "save_every")
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


# -- validation ------------------------------------------------------------------------


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
    reference = _references(config, tasks, options)

    def score(params: PyTree) -> tuple[float, dict[str, float]]:
        ratios = {}
        for task in tasks:
            losses = measures[task.name](params, task.data, _VALIDATION_SEED)
            ratios[task.name] = _mean_log(losses) - reference[task.name]
        mean = float(np.mean(list(ratios.values())))
        return -mean, {"log_ratio": mean, **ratios, "cpu_seconds": time.process_time()}

    return score


def _mean_log(losses: np.ndarray) -> float:
    """Of last over first losses [I, 2], at most 10, plus the floor."""
    first, last = np.asarray(losses, np.float64).T
    relative = np.where(last < 10 * first, last / first, 10)  # NaN is not below
    return float(np.log(relative + _FLOOR).mean())


def _references(
    config: Config, tasks: Sequence[Task], options: dict[str, Any]
) -> dict[str, float]:
    """AdamW's scores, kept in the run's folder."""
    path = config.folder / "adamw.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for task in tasks:
        if task.name not in known:
            known[task.name] = _adamw(task, options)
            write_json(path, known)
    return known


def _adamw(task: Task, options: dict[str, Any]) -> float:
    """The score of AdamW at the best rate for these very runs."""

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
    score = _mean_log(found.best_curves)
    where = "" if found.inside["learning_rate"] else ", at the end of its grid"
    rate = found.best["learning_rate"]
    print(f"{task.name}: AdamW at {rate:.2g}{where}, score {score:.3f}", flush=True)
    return score


# -- the run ---------------------------------------------------------------------------


def run(config: Config) -> None:
    """Meta-train, or resume; then export the best.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
    """
    rule, tasks = rules.build_rule(_spec(config)), _chosen(config)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.meta_steps)
    optimizer = optax.adam(schedule, b2=0.99)
    setup = Setup(
        name=NAME,
        config=config,
        may_change=_MAY_CHANGE,
        num_steps=config.meta_steps,
        minutes=None,
        steps_per_call=1,
        validate_every=config.validate_every,
        report_every=5,
        save_every=config.save_every,
        score=make_score(config, rule, validation_tasks()),
        describe=lambda means: f"loss {means['loss']:.4g}",
    )
    metrics = Metrics(config.folder, counter="step")
    loop = Loop(
        setup,
        config.folder,
        metrics,
        None,
        lambda: init_state(config, rule, optimizer),
    )
    if not config.export:
        write_json(config.folder / "config.json", {"config": to_json(config)})
        with loop.running():
            if int(loop.state.train.step) == 0:  # of a fresh rule
                _, row = setup.score(loop.state.train.params)
                metrics.write(NAME, "validation", 0, **row)
            step = make_meta_step(config, rule, tasks, optimizer)
            loop.fit(step, [task.data for task in tasks])
    _export(config, loop)


def _spec(config: Config) -> dict[str, Any]:
    return {"rule": config.rule, "hidden_size": config.hidden_size}


def _chosen(config: Config) -> list[Task]:
    tasks = {task.name: task for task in training_tasks()}
    check_names("--families", config.families, tasks)
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
