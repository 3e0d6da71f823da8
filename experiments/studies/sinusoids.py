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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.cli import Count, Names, Natural, Pair, check_names
from experiments.common.study import Made, Study, StudyOptions, kept
from experiments.common.tables import Table
from experiments.studies import regression
from experiments.studies.regression import Found, Method, make_learner
from metalstm import algorithms, plots, rules
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
_REFERENCE, _ERROR = "joint", "mean squared error"
_DRAWN = 3  # tasks whose functions are drawn
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


def check(config: Config) -> None:
    check_names("--methods", config.methods, METHODS)


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


def run(config: Config, folder: Path) -> Made:
    """Study what is not finished in ``folder`` yet."""
    methods = make_methods(config)
    print(
        f"sinusoids: {config.meta_steps:,} meta-steps of {config.tasks} tasks with "
        f"{2 * config.shot} points, {config.inits} initialisations, "
        f"{config.test_tasks:,} test tasks",
        flush=True,
    )
    found: dict[str, Found] = {}
    for name, method in methods.items():
        say = lambda text, name=name: print(f"{name:10} {text}", flush=True)  # noqa: E731
        make = lambda m=method, say=say: regression.study_method(m, config, say)  # noqa: E731
        path = folder / "methods" / f"{name}.npz"
        found[name] = regression.without_explosions(kept(path, Found, make))
    shots = {
        shot: {name: one.errors[index] for name, one in found.items()}
        for index, shot in enumerate(config.test_shots)
    }
    made = [table for shot, errors in shots.items() for table in tables(shot, errors)]
    return Made(
        [*made, training_table(found, methods)],
        {"methods": {n: summary(f, methods[n], config) for n, f in found.items()}},
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
    for index in range(min(_DRAWN, config.test_tasks)):
        key = episode_key(config.seed, "test", 0, index)
        x, y = (np.asarray(leaf)[:, 0] for leaf in spec.sample(key).support)
        curve = np.asarray(spec.curve(key, jnp.asarray(grid)))
        tasks.append(plots.FittedTask(x, y, curve))
    functions = {n: one.functions for n, one in found.items() if n != "scratch"}
    # the band is the 95% CI over tasks of a task's mean over initialisations
    panels = {
        f"{shot} support points": {
            name: plots.Losses(np.arange(one.shape[-1]), one.mean(0))
            for name, one in errors.items()
        }
        for shot, errors in shots.items()
    }
    labels: Any = {"xlabel": "gradient steps on the new task", "ylabel": _ERROR}
    labels["over"] = "tasks"
    spread = f"{_ERROR}, {first} points"
    return {
        "error_by_step.png": plots.loss_panels(panels, learned=list(found), **labels),
        "functions.png": plots.function_fits(tasks, grid, functions, steps),
        "spread.png": plots.seed_spread(shots[first], steps, ylabel=spread),
    }


def tables(shot: int, errors: Mapping[str, np.ndarray]) -> list[Table]:
    """Error by step, its paired difference to joint training, spread over inits."""
    last = next(iter(errors.values())).shape[-1] - 1
    steps = sorted({step for step in (0, 1, 2, 3, 5, 10, last) if step <= last})

    def of(caption: str, cell: Callable[..., str], *other: np.ndarray) -> Table:
        cells = [
            [name, *(cell(*(e[..., s] for e in (found, *other))) for s in steps)]
            for name, found in errors.items()
            if not any(found is one for one in other)
        ]
        return Table(caption, ["method", *map(str, steps)], cells)

    made = [of(f"{shot} support points: {_ERROR} after as many updates", _error)]
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
    return f"{mean_and_ci95(found.mean(0)):.3f}"


def _difference(found: np.ndarray, reference: np.ndarray) -> str:
    if not np.isfinite([found, reference]).all():
        return "diverged"
    return f"{mean_and_ci95((found - reference).mean(0)):+.3f}"


def _spread(found: np.ndarray) -> str:
    if not np.isfinite(found).all():
        return "diverged"
    means = found.mean(1)
    return f"{means.min():.3f} to {means.max():.3f} ({means.std(ddof=1):.3f})"


def training_table(found: Mapping[str, Found], methods: Mapping[str, Method]) -> Table:
    cells = []
    for name, one in found.items():
        method, tuned = methods[name], one.tuned(methods[name])
        rates = {a: f"{tuned.best[a]:.3g}{tuned.mark(a)}" for a in tuned.best}
        learned = f"{one.meta_parameters:,}"
        if not method.outer_rates:
            rates["outer"], learned = "", "0"
        trials, gradients = str(tuned.scores.size), str(method.task_gradients)
        seconds = f"{one.cpu_seconds:.0f}"
        cells.append([name, *rates.values(), trials, gradients, learned, seconds])
    headings = (
        "method", "inner rate", "outer rate", "trials", "gradients on a task",
        "meta-learned numbers", "CPU seconds",
    )  # fmt: skip
    edge = any("*" in rate for row in cells for rate in row[1:3])
    return Table("", headings, cells, notes=["* at the edge of the grid"] * edge)


def summary(found: Found, method: Method, config: Config) -> dict[str, Any]:
    """For results.json; METHOD.npz has every task, trial and meta-training loss."""
    errors: dict[str, Any] = {}
    for shot, of_shot in zip(config.test_shots, found.errors, strict=True):
        with np.errstate(invalid="ignore"):  # an explosion is infinite
            mean, ci95 = zip(*map(mean_and_ci95, of_shot.mean(0).T), strict=True)
        errors[str(shot)] = {"mean": mean, "ci95": ci95}
        errors[str(shot)]["median"] = np.median(of_shot, (0, 1)).tolist()
    tuned = found.tuned(method)
    return {
        "errors": errors,
        "inner_rate": tuned.best["inner"],
        "outer_rate": tuned.best["outer"] if method.outer_rates else None,
        "task_gradients": method.task_gradients,
        "meta_parameters": int(found.meta_parameters),
        "cpu_seconds": round(float(found.cpu_seconds), 1),
    }


_ABOUT = "; ".join(f"{name} ({what})" for name, what in METHODS.items())
STUDY = Study(
    "sinusoids",
    Config(),
    run,
    f"{__doc__}\nMethods: {_ABOUT}",
    presets=PRESETS,
    check=check,
    may_change=("methods",),  # each has its own file in the run folder
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
