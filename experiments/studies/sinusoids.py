"""Potential after training against performance now: regression of sinusoids.

Claim (Finn et al., 2017, section 5.1; Nichol et al., 2018, section 4): tasks are
y = A sin(x - p) with A ~ U(0.1, 5), p ~ U(0, pi). A network trained on all tasks at
once is the best answer before it has seen a task, since it predicts their mean, and
stays near it when it is fine-tuned; meta-learned ones are worse there and far better
after a few gradient steps.

    python -m experiments.studies.sinusoids                  # four methods
    python -m experiments.studies.sinusoids --preset demo    # two, under two minutes

One learner (MLP 40-40, ReLU) and one budget for all: the same meta-training tasks in
the same order, the same number of points of each. Every method's inner and outer rate
are chosen from twelve pairs on validation tasks, by the mean error over the updates
drawn. Then theta_0 is meta-trained again from several draws of its own initialisation,
all else being equal.

Three minutes on a CPU core. Expected, error with 10 points before and after 10 updates:
joint 2.93 and 1.49, maml 2.95 and 0.08, reptile 2.94 and 0.34.
docs/results/sinusoids.md has results, machine and time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.cli import Count, Names, Natural, Pair, check_names
from experiments.common.study import StudyOptions, read, run_study, write_results
from experiments.common.tables import Table
from experiments.studies import regression
from experiments.studies.regression import Found, Method, make_learner
from metalstm import algorithms, rules
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.base import UpdateRule
from metalstm.data import SinusoidSpec, episode_key
from metalstm.inner import second_order
from metalstm.statistics import mean_and_ci95

METHODS = {
    "maml": "theta_0 learned through SGD, second order",
    "fomaml": "the same, first order",
    "reptile": "theta_0 moves towards where SGD ends",
    "meta-sgd": "theta_0 and a rate for every parameter learned, second order",
    "meta-lstm": "theta_0 and gates that mix parameters and gradients, second order",
    "joint": "one network for all tasks together, then fine-tuned",
    "scratch": "not meta-trained: SGD from the initialisation",
}
PRESETS = {
    "demo": "--methods fomaml,joint --meta-steps 1000 --tuning-steps 200 --inits 2 "
    "--test-tasks 600"
}
_REFERENCE = "joint"
# 0.02 and 0.03 won trials of joint training and Reptile, and exploded on a few tasks
# when training went on
_INNER_RATES = (0.001, 0.003, 0.01)
_ADAM_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
_SCRATCH_RATES = tuple(1e-4 * 10 ** (k / 5) for k in range(12))  # to 0.016


class Config(StudyOptions, frozen=True, kw_only=True):
    methods: Names = ("maml", "fomaml", "reptile", "joint")
    """Which to compare, besides scratch, which is always there."""
    shot: Count = 10
    """Points of a task that a method adapts to in meta-training; as many more judge."""
    test_shots: tuple[Count, ...] = (10, 5)
    """Points that it adapts to at meta-test."""
    widths: tuple[Count, ...] = (40, 40)
    """Units of the hidden layers."""
    inner_steps: Count = 5
    """Updates in meta-training (reptile: --reptile-steps)."""
    reptile_steps: Count = 10
    """Reptile's updates, each on --shot of the task's points."""
    test_steps: Count = 10
    """Updates at meta-test."""
    hidden: Natural = 0
    """meta-lstm: units of its LSTM; 0: gates on features alone."""
    meta_steps: Count = 4_000
    """Meta-steps of a final run."""
    tuning_steps: Count = 500
    """Meta-steps of a trial of rates (joint: --meta-steps)."""
    tasks: Count = 25
    """Tasks of a meta-step."""
    inits: Pair = 5
    """Draws of theta_0's own initialisation."""
    test_tasks: Pair = 1_000
    validation_tasks: Pair = 200


def make_methods(config: Config) -> dict[str, Method]:
    learner, steps, shot = make_learner(config), config.inner_steps, config.shot
    options: dict[str, Any] = {"num_steps": steps, "task_mapping": "vmap"}
    # joint training and Reptile have no query loss: they see a task's points as one set
    pooled: dict[str, Any] = {"train_shots": 2 * shot, "task_mapping": "vmap"}

    def gates(rate: Any) -> UpdateRule:
        bias: Any = (jnp.log(rate / (1 - rate)),) * 2
        return rules.lstm_gates(
            hidden_size=config.hidden, forget_bias=(7.0, 7.0), input_bias=bias
        )

    def reptile(rate):
        return algorithms.reptile(
            learner,
            fixed_sgd(rate),
            num_steps=config.reptile_steps,
            batch_size=shot,
            **pooled,
        )

    def joint(rate):
        # the first gradient alone is that of the loss over all tasks at theta_0
        return algorithms.reptile(
            learner, fixed_sgd(rate), num_steps=1, gradient_weights=(1.0,), **pooled
        )

    def per_parameter(rate) -> UpdateRule:
        return rules.learned_sgd(rate, per="parameter")

    def method(build, rule=fixed_sgd, gradients=steps + 1, **changes) -> Method:
        adam = (config.tuning_steps, _INNER_RATES, _ADAM_RATES, optax.adam)
        return Method(build, rule, gradients, *adam)._replace(**changes)

    def learned(rule: Callable[[Any], UpdateRule]) -> Method:
        def build(rate):
            return algorithms.learned_init(
                learner, rule(rate), differentiation=second_order(), **options
            )

        return method(build, rule)

    all_methods = {
        "maml": method(lambda rate: algorithms.maml(learner, rate, **options)),
        "fomaml": method(lambda rate: algorithms.fomaml(learner, rate, **options)),
        "reptile": method(
            reptile,
            gradients=config.reptile_steps,
            inner_rates=(0.0025, 0.005, 0.01),
            outer_rates=(0.125, 0.25, 0.5, 1.0),  # 1: to where the tasks ended
            optimizer=optax.sgd,
        ),
        "meta-sgd": learned(per_parameter),
        "meta-lstm": learned(gates),
        # with one gradient a task, its whole length is no dearer than others' trials
        "joint": method(joint, gradients=1, tuning_steps=config.meta_steps),
    }
    scratch = Method(joint, fixed_sgd, 0, 0, _SCRATCH_RATES, (), optax.sgd)
    chosen = {n: all_methods[n] for n in config.methods if n != "scratch"}
    return chosen | {"scratch": scratch}


def run(config: Config, folder: Path) -> None:
    """Study what is not finished in ``folder`` yet; then write tables and figures."""
    methods = make_methods(config)
    print(
        f"sinusoids: {config.meta_steps:,} meta-steps of {config.tasks} tasks with "
        f"{2 * config.shot} points, {config.inits} initialisations, "
        f"{config.test_tasks:,} test tasks",
        flush=True,
    )
    found: dict[str, Found] = {}
    for name, method in methods.items():
        path = folder / "methods" / f"{name}.npz"
        if not path.exists():
            say = lambda text, name=name: print(f"{name:10} {text}", flush=True)  # noqa: E731
            regression.save(path, regression.study_method(method, config, say))
        found[name] = regression.load(path, config.test_shots)
    shots = {s: {n: f.errors[s] for n, f in found.items()} for s in config.test_shots}
    write_results(
        folder,
        config,
        [table for shot, errors in shots.items() for table in tables(shot, errors)]
        + [training_table(found, methods)],
        {"methods": {n: summary(f, methods[n]) for n, f in found.items()}},
        figures(found, shots, config),
    )


def figures(
    found: Mapping[str, Found],
    shots: Mapping[int, Mapping[str, np.ndarray]],
    config: Config,
) -> dict[str, Any]:
    first, steps = config.test_shots[0], sorted({0, 1, config.test_steps})
    spec, tasks = SinusoidSpec(first), []
    grid = np.asarray(regression.grid_of(spec))[:, 0]
    for index in range(len(next(iter(found.values())).functions)):
        key = episode_key(config.seed, "test", 0, index)
        support, truth = spec.sample(key).support, spec.curve(key, jnp.asarray(grid))
        x, y = (np.asarray(leaf)[:, 0] for leaf in support)
        tasks.append({"x": x, "y": y, "curve": np.asarray(truth)})
    functions = {n: one.functions for n, one in found.items() if n != "scratch"}
    return {
        "error_by_step.png": regression.error_figure(shots),
        "functions.png": regression.function_figure(tasks, grid, functions, steps),
        "spread.png": regression.spread_figure(shots[first], steps, shot=first),
    }


def _steps(errors: Mapping[str, np.ndarray]) -> list[int]:
    last = next(iter(errors.values())).shape[-1] - 1
    return sorted({step for step in (0, 1, 2, 3, 5, 10, last) if step <= last})


def tables(shot: int, errors: Mapping[str, np.ndarray]) -> list[Table]:
    """Error by step, its paired difference to joint training, spread over inits."""
    steps = _steps(errors)

    def of(caption: str, cell: Callable[..., str], *other: np.ndarray) -> Table:
        cells = [
            [name, *(cell(*(e[..., s] for e in (found, *other))) for s in steps)]
            for name, found in errors.items()
            if not any(found is one for one in other)
        ]
        return Table(caption, ["method", *map(str, steps)], cells)

    points = f"{shot} support points: mean squared error after as many updates"
    made = [of(points, _error)]
    if _REFERENCE in errors:
        caption = f"Paired difference to {_REFERENCE}, negative is better:"
        made.append(of(caption, _difference, errors[_REFERENCE]))
    spread = "Over initialisations of theta_0: lowest to highest mean (std):"
    return [*made, of(spread, _spread)]


def _error(found: np.ndarray) -> str:
    """The mean over tasks; with explosions, which have no mean, the median."""
    lost = int((~np.isfinite(found)).sum())
    if lost:
        return f"median {np.median(found):.3f}, {lost} of {found.size:,} diverged"
    mean, ci95 = mean_and_ci95(found.mean(0))
    return f"{mean:.3f} ± {ci95:.3f}"


def _difference(found: np.ndarray, reference: np.ndarray) -> str:
    if not np.isfinite([found, reference]).all():
        return "diverged"
    mean, ci95 = mean_and_ci95((found - reference).mean(0))
    return f"{mean:+.3f} ± {ci95:.3f}"


def _spread(found: np.ndarray) -> str:
    if not np.isfinite(found).all():
        return "diverged"
    means = found.mean(1)
    return f"{means.min():.3f} to {means.max():.3f} ({means.std(ddof=1):.3f})"


def training_table(found: Mapping[str, Found], methods: Mapping[str, Method]) -> Table:
    cells, edge = [], False
    for name, one in found.items():
        method, tuned = methods[name], one.tuned(methods[name])
        rates = [f"{tuned.best[a]:.3g}{tuned.mark(a)}" for a in ("inner", "outer")]
        if not method.outer_rates:
            rates[1] = ""
        edge = edge or any("*" in rate for rate in rates)
        cells.append(
            [
                name,
                *rates,
                str(tuned.scores.size),
                str(method.task_gradients),
                f"{one.meta_parameters:,}" if method.outer_rates else "0",
                f"{one.cpu_seconds:.0f}",
            ]
        )
    headings = (
        "method", "inner rate", "outer rate", "trials", "gradients on a task",
        "meta-learned numbers", "CPU seconds",
    )  # fmt: skip
    notes = ["* at the edge of the grid"] if edge else []
    return Table("", headings, cells, notes=notes)


def summary(found: Found, method: Method) -> dict[str, Any]:
    by_shot, tuned = {}, found.tuned(method)
    for shot, errors in found.errors.items():
        steps = range(errors.shape[-1])
        whole = [bool(np.isfinite(errors[..., s]).all()) for s in steps]
        pairs = [
            mean_and_ci95(errors[..., s].mean(0)) if whole[s] else (None, None)
            for s in steps
        ]
        by_shot[str(shot)] = {
            "mean": [mean for mean, _ in pairs],
            "ci95": [ci95 for _, ci95 in pairs],
            "median": np.median(errors, (0, 1)).tolist(),
            "diverged": (~np.isfinite(errors)).sum((0, 1)).tolist(),
            "mean_of_each_init": [
                [float(x) if np.isfinite(x) else None for x in means]
                for means in errors.mean(1)
            ],
        }
    return {
        "errors": by_shot,
        "inner_rate": tuned.best["inner"],
        "outer_rate": tuned.best["outer"] if method.outer_rates else None,
        "trials": [
            [float(inner), float(outer), score if np.isfinite(score) else None]
            for inner, row in zip(tuned.grid["inner"], tuned.scores, strict=True)
            for outer, score in zip(tuned.grid["outer"], map(float, row), strict=True)
        ],
        "task_gradients": method.task_gradients,
        "meta_parameters": found.meta_parameters,
        "meta_training_loss": found.losses.tolist(),
        "cpu_seconds": round(found.cpu_seconds, 1),
    }


def parse(arguments: list[str]) -> Config:
    """Read the flags.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    about = "; ".join(f"{name} ({what})" for name, what in METHODS.items())
    config = read(
        Config(),
        arguments,
        module="experiments.studies.sinusoids",
        description=f"{__doc__}\nMethods: {about}",
        presets=PRESETS,
    )
    check_names("--methods", config.methods, METHODS)
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    # each method has its own file in the run folder
    return run_study("sinusoids", parse, run, arguments, may_change=("methods",))


if __name__ == "__main__":
    sys.exit(main())
