"""A run: meta-train what the flags name, export the rules, make the studies."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import optax

import metalstm
from experiments.common import devices, report, run_folder
from experiments.common.command import run_in
from experiments.common.loop import Loop, Setup
from experiments.common.run_folder import Metrics, write_json
from experiments.common.saved_options import to_json
from experiments.learned_optimizer import command_line
from experiments.learned_optimizer.command_line import MODULE, Stage, may_change
from experiments.learned_optimizer.measuring import saved_rules
from experiments.learned_optimizer.options import Budget, Config, rule_spec
from experiments.learned_optimizer.problems import Source, describe, load_source
from experiments.learned_optimizer.studies import Context, make_studies
from metalstm import learned_optimizers, plots, rules
from metalstm.base import MetaAlgorithm, PyTree, UpdateRule
from metalstm.learned_optimizers import curves, problems
from metalstm.meta.step import place_state
from metalstm.runtime import processes, sharding
from metalstm.statistics import mean_and_ci95

ROOT = Path("runs") / "learned_optimizer"
_VALIDATION_SEED = 1_000_003  # far from the seeds of training, tuning and test
_FOREVER = 10**9  # meta-steps: time decides


def choose_folder(config: Config) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    run = config.run
    name = f"{run.preset or config.problem.name}-{run.seed}"
    return run.resume or run.workdir or run_folder.free_folder(ROOT / name)


def run(config: Config, folder: Path) -> int:
    """Run in the folder, which nobody else may use; return the exit status."""
    body = functools.partial(_run, config, folder)
    return run_in(folder, config, may_change(config), body, MODULE)


def _run(config: Config, folder: Path) -> None:
    """Meta-train, or resume; then every study; then results.json."""
    source = load_source(config.problem)
    mesh = devices.mesh_for(config.devices, config.training.num_tasks, "--num-tasks")
    print(_header(config, devices.describe(mesh)), flush=True)
    specs = {
        name: rule_spec(name, config)
        for name, path in command_line.rule_files(config).items()
        if path is None
    }
    built = {name: rules.build_rule(spec) for name, spec in specs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    document = {"config": to_json(config), "rules": specs, "data": source.about}
    run_folder.refuse_other_data(folder, source.about)
    write_json(folder / "config.json", document | {"versions": report.versions()})
    metrics = Metrics(folder, counter="step")
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        rule = built[name]
        trained = meta_train(name, rule, config, source, folder, metrics)
        if processes.is_main():
            found[name] = _export(name, spec, trained, config, folder)
    if not processes.is_main():
        return
    files = ["results.json", "config.json", "metrics.jsonl"]
    if specs:
        files += [f"rules/{name}.npz" for name in specs]
        figure = _learning_curves(metrics, list(specs))
        files.append(report.save_figure(figure, folder / "learning_curve.png"))
    studies = make_studies(Context(config, saved_rules(config, folder), folder))
    results = {
        "problem": describe(config.problem),
        "rules": found,
        "studies": studies,
        "versions": report.versions(),
        "device": jax.devices()[0].device_kind,
    }
    write_json(folder / "results.json", results)
    print(
        f"{report.ending(folder, files)}\n"
        f"studies again, or others: python -m {MODULE} --evaluate {folder} --study ...",
        flush=True,
    )


def evaluate(config: Config, arguments: list[str]) -> None:
    """Make the studies of a finished (or stopped) run again, with these flags.

    Raises:
      FileNotFoundError: the run has exported no rule yet.
    """
    folder = config.run.evaluate
    assert folder is not None
    print(_header(config, devices.describe(None)), flush=True)
    flags = command_line.other_flags(arguments)
    make_studies(Context(config, saved_rules(config, folder), folder, flags))


def _export(
    name: str, spec: dict[str, Any], trained: Loop, config: Config, folder: Path
) -> dict[str, Any]:
    """Write the rule's file; returns what results.json says about it."""
    state, seconds = trained.state, trained.saved.seconds()
    params, best = state.best_params, int(state.best_step)
    about = {
        "trained_on": describe(config.problem),
        "meta_steps": int(state.train.step),
        "best_step": best,
        "wall_seconds": round(seconds, 1),
        "validation_mean_log_loss": -float(state.best_score),
        "learned_parameters": sum(int(np.size(x)) for x in jax.tree.leaves(params)),
        "seed": config.run.seed,
    }
    said = to_json(config)
    info = about | {name: said[name] for name in ("training", "budget")}
    path = folder / "rules" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    rules.save_rule(path, spec, params, info=info)
    print(
        f"{name}: best on validation at meta-step {best:,} of "
        f"{about['meta_steps']:,} (mean log-loss {-float(state.best_score):.3f}), "
        f"{seconds / 60:.1f} minutes, {about['learned_parameters']:,} learned "
        "parameters",
        flush=True,
    )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return about | {"spec": spec, "sha256": digest}


def _header(config: Config, computing: str) -> str:
    budget, training = config.budget, config.training
    how_long = f"{budget.meta_steps:,} meta-steps"
    if budget.minutes is not None:
        how_long = f"{budget.minutes:g} minutes"
    unroll = training.unroll_steps
    how = f"truncated at {unroll}" if unroll < training.horizon else "complete"
    if training.estimator == "pes":
        how = f"in pieces of {unroll}, by pes"
    return (
        f"{report.machine(computing)}  seed {config.run.seed}\n"
        f"{describe(config.problem)}\n"
        f"meta-training: {how_long} of {training.num_tasks} problems, "
        f"{training.horizon} updates, {how}"
    )


def _learning_curves(metrics: Metrics, names: list[str]) -> Any:
    return plots.meta_training_curves(
        {name: metrics.curve(name, "train", "loss") for name in names},
        {name: metrics.curve(name, "validation", "log_loss") for name in names},
    )


# -- meta-training ---------------------------------------------------------------------


def meta_train(
    name: str,
    rule: UpdateRule,
    config: Config,
    source: Source,
    folder: Path,
    metrics: Metrics,
) -> Loop:
    """Train, or resume training, until the budget is spent.

    Raises:
      Interrupted: after Ctrl-C; the state is saved.
      NonFiniteLossError: the state before the bad step is saved.
    """
    budget, num_tasks = config.budget, config.training.num_tasks
    planned = command_line.stages(config)
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
        mesh=devices.mesh_for(config.devices, num_tasks, "--num-tasks"),
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
    return loop


def _make_score(
    rule: UpdateRule, config: Config, source: Source
) -> Callable[[PyTree], tuple[float, dict[str, float]]]:
    """Minus the mean log of the last loss, a divergence at its cap."""
    test, told = config.test, rule
    if config.training.tell_progress:
        told = UpdateRule(
            rule.init, lambda params: rules.with_progress(rule.bind(params), test.steps)
        )
    loss_curves = curves.make_loss_curves(
        source.test,
        told,
        num_instances=config.budget.validation_instances,
        num_steps=test.steps,
        record_every=test.steps,
        eval_batch=test.eval_batch,
        task_mapping=source.task_mapping,
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
    linear = lambda done: 2 * done  # noqa: E731
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
