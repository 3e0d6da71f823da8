"""Validation of `general`, next to tuned AdamW; the export of a run's best rule.

Notation: I instances of a family.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.common import report
from experiments.common.cli import Names, check_names
from experiments.common.run_folder import Metrics, write_json
from experiments.common.saved_options import (
    flag,
    from_json,
    read_config,
    read_json,
    to_json,
)
from experiments.common.tables import Table
from experiments.learned_optimizer.general import MODULE, Config
from experiments.learned_optimizer.meta_tasks import (
    Task,
    training_tasks,
    validation_tasks,
)
from experiments.learned_optimizer.what_was_told import without_length
from metalstm import plots, rules
from metalstm.base import PyTree, UpdateRule
from metalstm.learned_optimizers import make_loss_curves, sweep
from metalstm.runtime import checkpoints
from metalstm.runtime.array_files import digest_of, named_leaves

NAME = "gates"
FRESH = "fresh"  # a rule that is not trained
_SEED = 1_000_003
_FLOOR = 0.02  # share of the first loss below which a last loss hardly counts
_RATES = tuple(10 ** (k / 2) for k in range(-8, 0))  # of AdamW: 1e-4 to 0.3

_LIMITS = (
    "tell it the number of updates (metalstm.rules.with_progress) or give a schedule: "
    "with neither its steps do not become smaller"
)
_COST = {  # python -m benchmarks.updates
    "moment_gates": "on one core an update takes 9 times AdamW's, a training step of "
    "an MLP of 1.07M parameters at batch 128 1.9 times; 16 bytes of state a parameter",
}

_ABOUT = ("method", "kind", "step", "cpu_seconds")  # of a row, not of the rule

Logs = dict[str, np.ndarray]  # of each family [I]: logs of last over first losses


def spec_of(config: Config) -> dict[str, Any]:
    spec = {"rule": config.rule, "hidden_size": config.hidden_size}
    spec |= {"orthogonal": True} if config.orthogonal else {}
    return spec | ({} if config.normalise else {"normalise": False})


def built(config: Config) -> UpdateRule:
    """The rule as it is meta-trained."""
    rule = rules.build_rule(spec_of(config))
    return rule if config.tell_length else without_length(rule)


def chosen_training(config: Config) -> list[Task]:
    return _named_tasks(
        "--families", config.families, training_tasks(config.noisy_data)
    )


def chosen_validation(config: Config) -> list[Task]:
    names = config.validation_families
    return _named_tasks("--validation-families", names, validation_tasks())


def _named_tasks(option: str, names: Names, tasks: Sequence[Task]) -> list[Task]:
    known = {task.name: task for task in tasks}
    check_names(option, names, known)
    return [known[name] for name in names or known]


# -- scores ----------------------------------------------------------------------------


class Mean(NamedTuple):
    """Over families, with the standard error over instances: the families are fixed."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.error:.3f}"


def mean_difference(mine: Logs, others: Logs) -> Mean:
    """Of the same instances, pair by pair."""
    pairs = [mine[name] - others[name] for name in others]
    of_means = [np.var(pair, ddof=1) / len(pair) for pair in pairs]
    mean = np.mean([pair.mean() for pair in pairs])
    return Mean(float(mean), math.sqrt(sum(of_means)) / len(pairs))


def make_score(
    config: Config, rule: UpdateRule, tasks: Sequence[Task]
) -> Callable[[PyTree], tuple[float, dict[str, float]]]:
    """Minus the mean log ratio of final losses to tuned AdamW's, and a row of it."""
    measure = make_measure(config, rule, tasks)
    reference = _kept(config, tasks, "adamw", lambda: _adamw(config, tasks))

    def score(params: PyTree) -> tuple[float, dict[str, float]]:
        logs = measure(params)
        found = mean_difference(logs, reference)
        each = {k: float((v - reference[k]).mean()) for k, v in logs.items()}
        row = {"log_ratio": found.mean, "standard_error": found.error, **each}
        return -found.mean, row | {"cpu_seconds": time.process_time()}

    return score


def make_measure(
    config: Config, rule: UpdateRule, tasks: Sequence[Task]
) -> Callable[[PyTree], Logs]:
    """Compile ``rule's parameters -> Logs``."""
    length = config.validation_steps if config.tell_progress else None
    told = UpdateRule(
        rule.init, lambda params: rules.with_progress(rule.bind(params), length)
    )
    runs = {
        task.name: make_loss_curves(task.family, told, **_options(config))
        for task in tasks
    }

    def measure(params: PyTree) -> Logs:
        return {
            task.name: _logs(runs[task.name](params, task.data, _SEED))
            for task in tasks
        }

    return measure


def _options(config: Config) -> dict[str, Any]:
    return {
        "num_instances": config.validation_instances,
        "num_steps": config.validation_steps,
        "record_every": config.validation_steps,
        "eval_batch": 1_024,
        "task_mapping": "vmap",
    }


def _logs(losses: np.ndarray) -> np.ndarray:
    """Of last over first losses [I, 2], at most 10, plus the floor."""
    first, last = np.asarray(losses, np.float64).T
    relative = np.where(last < 10 * first, last / first, 10)  # NaN is not below
    return np.log(relative + _FLOOR)


def _adamw(config: Config, tasks: Sequence[Task]) -> Logs:
    """AdamW with a cosine at the best rate for these very runs."""

    def adamw(learning_rate):
        steps = config.validation_steps
        return optax.adamw(optax.cosine_decay_schedule(learning_rate, steps))

    found = {}
    for task in tasks:
        tried = sweep(
            task.family,
            rules.tunable(adamw, learning_rate=1e-3),
            {"learning_rate": _RATES},
            task.data,
            seed=_SEED,
            score="mean_log",
            **_options(config),
        )
        found[task.name] = _logs(tried.best_curves)
        where = "" if tried.inside["learning_rate"] else ", at the end of its grid"
        rate, score = tried.best["learning_rate"], found[task.name].mean()
        print(f"{task.name}: AdamW at {rate:.2g}{where}, {score:.3f}", flush=True)
    return found


def _kept(
    config: Config, tasks: Sequence[Task], name: str, make: Callable[[], Logs]
) -> Logs:
    """What the folder has under this name, else ``make()``, which it has then."""
    size = f"{config.validation_instances}x{config.validation_steps}"
    path = config.folder / f"validation-{size}.json"
    kind, again = dict[str, dict[str, list[float]]], "delete it, and run this again"
    known = read_json(path, kind, again) if path.exists() else {}
    if any({*logs} != {task.name for task in tasks} for logs in known.values()):
        raise ValueError(f"{path} is of other families: {again}")
    if name not in known:
        known[name] = {task: logs.tolist() for task, logs in make().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    return {task: np.array(logs) for task, logs in known[name].items()}


# -- commands --------------------------------------------------------------------------


def evaluate(config: Config) -> Table:
    """Rules next to AdamW and the first of them, on the validation families.

    A rule is told what it was told in meta-training. Results are kept in the folder.

    Raises:
      OSError, ValueError: a file that is none of a rule, or was not made by `export`.
    """
    tasks = chosen_validation(config)
    named = {name: _named(config, name) for name in config.evaluate}
    reference = _kept(config, tasks, "adamw", lambda: _adamw(config, tasks))
    found = {name: _logs_of(config, one, tasks) for name, one in named.items()}
    first = next(iter(found.values()))
    rows = [
        [
            "/".join(Path(name).with_suffix("").parts[-2:]),
            str(mean_difference(logs, reference)),
            "" if logs is first else str(mean_difference(logs, first)),
            *(f"{(logs[task] - reference[task]).mean():+.3f}" for task in reference),
        ]
        for name, logs in found.items()
    ]
    headings = ["rule", "log ratio to AdamW", f"- {rows[0][0]}", *reference]
    caption = (
        f"Mean log ratios of last losses, {config.validation_steps:,} updates, "
        f"{config.validation_instances} instances a family, ± standard error over them"
    )
    return Table(caption, headings, rows)


class _Named(NamedTuple):
    """What an evaluation measures, and ``key``, the name of all of it."""

    rule: UpdateRule
    params: PyTree
    told: Config
    key: str


def _named(config: Config, name: str) -> _Named:
    if name == FRESH:
        rule, spec, told = built(config), spec_of(config), config
        params = rule.init(jax.random.key(config.seed), {})
    else:
        rule, params, spec, info = rules.load_rule(name)
        if not isinstance(info.get("config"), dict):
            raise ValueError(
                f"--evaluate {name}: the file does not say what its rule was told in "
                "meta-training; give one that this command wrote"
            )
        told = _config_of(info["config"], name)
        rule = rule if told.tell_length else without_length(rule)
    arrays = named_leaves(jax.tree.map(np.asarray, params))
    digest = digest_of([spec, told.tell_progress > 0, told.tell_length], arrays)
    return _Named(rule, params, told, f"{Path(name).stem} {digest[:8]}")


def _logs_of(config: Config, named: _Named, tasks: Sequence[Task]) -> Logs:
    told = named.told.__replace__(
        validation_steps=config.validation_steps,
        validation_instances=config.validation_instances,
    )
    make = lambda: make_measure(told, named.rule, tasks)(named.params)  # noqa: E731
    return _kept(config, tasks, named.key, make)


def _config_of(saved: dict[str, Any], source: str) -> Config:
    return from_json(Config, saved | {"export": None, "evaluate": []}, source)


def export(folder: Path, path: Path) -> None:
    """Write the best rule of a run so far, with what is known about it.

    The run gets validation.png, of all rules that were validated.

    Raises:
      FileNotFoundError, ValueError: there is no run, or it has no validated rule yet.
    """
    config = _config_of(read_config(folder)["config"], f"{folder / 'config.json'}")
    where = folder / "checkpoints" / NAME / "best"
    if checkpoints.latest(where) is None:
        raise ValueError(f"{folder} has no validated rule yet: train it first")
    target = jax.eval_shape(lambda: built(config).init(jax.random.key(0), {}))
    best = checkpoints.restore(where, target)
    metrics = Metrics(folder, counter="step")
    rows = metrics.read()
    tested = [row for row in rows if row["kind"] == "validation"]
    if best.step not in (row["step"] for row in tested):
        raise ValueError(
            f"{metrics.path} has no validation of meta-step {best.step}, the best: put "
            "a copy of it back"
        )
    hours = core_hours([row["cpu_seconds"] for row in tested])
    row = next(row for row in tested[::-1] if row["step"] == best.step)
    validation = {k: v for k, v in row.items() if k not in _ABOUT}
    low, high = config.horizon
    which = ", ".join(config.families) or "the families of meta_tasks.py"
    info = {
        "trained_on": f"small networks of {low:,} to {high:,} updates: {which}",
        "limits": _LIMITS,
        "cost": _COST.get(config.rule, "not measured"),
        "command": command(config),
        "best_step": best.step,
        "meta_steps": max(row["step"] for row in rows),
        "core_hours": round(hours, 2),
        "validation": validation,
        "versions": report.versions(),
        "config": {k: v for k, v in to_json(config).items() if k != "folder"},
    }
    rules.save_rule(path, spec_of(config), best.state, info=info)
    report.save_figure(_figure(tested), folder / "validation.png")
    chosen = f"meta-step {best.step:,}" if best.step else "the untrained rule, the best"
    said = f"{chosen}, {hours:.1f} core-hours"
    ratio = math.exp(validation["log_ratio"])
    print(f"{path}: {said}, final losses {ratio:.3f} of tuned AdamW's")


def _figure(tested: Sequence[dict[str, Any]]) -> Any:
    """Draw last losses over tuned AdamW's against meta-steps, a line a family."""
    steps = np.array([row["step"] for row in tested])
    lines = {
        "mean of the logs" if name == "log_ratio" else name: plots.Losses(
            steps, np.exp([[row[name] for row in tested]])
        )
        for name in tested[0]
        if name not in (*_ABOUT, "standard_error")
    }
    return plots.loss_panels(
        {"validation": lines},
        learned=["mean of the logs"],
        xlabel="meta-steps",
        ylabel="last loss / tuned AdamW's",
    )


def core_hours(cpu_seconds: Sequence[float]) -> float:
    """Of all sessions: the counter begins again in each.

    >>> core_hours([1800.0, 3600.0, 900.0, 7200.0])
    3.0
    """
    after = [*cpu_seconds[1:], 0.0]
    ends = (now for now, then in zip(cpu_seconds, after, strict=True) if then < now)
    return sum(ends) / 3_600


def command(config: Config) -> str:
    """What meta-trains this rule: the flags that are not the default."""
    default = to_json(Config())
    words = ["python -m", MODULE]
    for name, value in to_json(config).items():
        if value == default[name] or name in ("folder", "export", "evaluate"):
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            values = value if isinstance(value, list) else [value]
            values = [",".join(values)] if name.endswith("families") else values
            words += [flag(name), *map(str, values)]
    return " ".join(words)
