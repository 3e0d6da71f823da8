"""The sinusoid study: every method, then tables and figures, from what is on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import report
from experiments.common.run_folder import write_json
from experiments.common.small_study import recipe
from experiments.studies.regression import figures
from experiments.studies.regression.methods import Method, make_methods
from experiments.studies.regression.training import Found, grid_of, study_method
from experiments.studies.sinusoids import Config
from metalstm.data import SinusoidSpec, episode_key
from metalstm.runtime.files import atomic_write
from metalstm.statistics import mean_and_ci95

_REFERENCE = "joint"
_DIVERGED = 1e3  # no target is beyond 5, so an error above this is an explosion


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
            _save(path, study_method(method, config, say))
        found[name] = _load(path, config)
    shots = {s: {n: f.errors[s] for n, f in found.items()} for s in config.test_shots}
    text = "\n\n".join(_tables(shot, errors) for shot, errors in shots.items())
    text += "\n\n" + _training_table(found, methods)
    with atomic_write(folder / "table.md") as part:
        part.write_text(text + "\n")
    write_json(
        folder / "results.json",
        {
            "config": recipe(config),
            "methods": {n: _summary(f, methods[n]) for n, f in found.items()},
            "versions": report.versions(),
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        },
    )
    written = _draw(found, shots, config, folder)
    print(text)
    print(f"table.md, results.json, {', '.join(written)} in {folder}")


def _draw(found, shots, config: Config, folder: Path) -> list[str]:
    first = config.test_shots[0]
    spec = SinusoidSpec(first)
    tasks, functions = [], {n: f.functions for n, f in found.items() if n != "scratch"}
    grid = np.asarray(grid_of(spec))[:, 0]
    for index in range(3):
        key = episode_key(config.seed, "test", 0, index)
        episode, truth = spec.sample(key), spec.curve(key, jnp.asarray(grid))
        support = jax.tree.map(lambda leaf: np.asarray(leaf)[:, 0], episode.support)
        tasks.append({"x": support.x, "y": support.y, "curve": np.asarray(truth)})
    drawn = {
        "error_by_step.png": figures.error_figure(shots),
        "functions.png": figures.function_figure(
            tasks, grid, functions, sorted({0, 1, config.test_steps})
        ),
        "spread.png": figures.spread_figure(
            shots[first], sorted({0, 1, config.test_steps}), shot=first
        ),
    }
    for name, figure in drawn.items():
        report.save_figure(figure, folder / name)
    return list(drawn)


def _steps(errors: dict[str, np.ndarray]) -> list[int]:
    last = next(iter(errors.values())).shape[-1] - 1
    return sorted({step for step in (0, 1, 2, 3, 5, 10, last) if step <= last})


def _tables(shot: int, errors: dict[str, np.ndarray]) -> str:
    """Error by step, its paired difference to joint training, spread over inits."""
    steps = _steps(errors)
    columns = " | ".join(f"{step}" for step in steps)
    bar = "|---" * (len(steps) + 1) + "|"
    lines = [f"{shot} support points: mean squared error after as many updates", ""]
    lines += [f"| method | {columns} |", bar]
    for name, found in errors.items():
        cells = [_error(found[..., s]) for s in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if _REFERENCE in errors:
        lines += ["", f"Paired difference to {_REFERENCE}, negative is better:", ""]
        lines += [f"| method | {columns} |", bar]
        for name, found in errors.items():
            if name == _REFERENCE:
                continue
            cells = [
                _difference(found[..., s], errors[_REFERENCE][..., s]) for s in steps
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Over initialisations of theta_0: lowest to highest mean (std):", ""]
    lines += [f"| method | {columns} |", bar]
    for name, found in errors.items():
        cells = [_spread(found[..., s]) for s in steps]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def _training_table(found: dict[str, Found], methods: dict[str, Method]) -> str:
    columns = (
        "method", "inner rate", "outer rate", "trials", "gradients on a task",
        "meta-learned numbers", "CPU seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, one in found.items():
        method = methods[name]
        inner, outer = (f"{rate:.3g}" for rate in one.rates)
        outer = outer if method.outer_rates else ""
        edges = _at_the_edge(one, method)
        learned = f"{one.meta_parameters:,}" if method.outer_rates else "0"
        lines.append(
            f"| {name} | {inner}{edges[0]} | {outer}{edges[1]} | {len(one.trials)} | "
            f"{method.task_gradients} | {learned} | {one.cpu_seconds:.0f} |"
        )
    if any(any(_at_the_edge(f, methods[n])) for n, f in found.items()):
        lines += ["", "\\* at the edge of the grid"]
    return "\n".join(lines)


def _at_the_edge(found: Found, method: Method) -> tuple[str, str]:
    def mark(rate, rates):
        ends = (rates[0], rates[-1]) if rates else ()
        return "*" if any(np.isclose(rate, end) for end in ends) else ""

    inner, outer = found.rates
    return mark(inner, method.inner_rates), mark(outer, method.outer_rates)


def _summary(found: Found, method: Method) -> dict[str, Any]:
    by_shot = {}
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
        "inner_rate": float(found.rates[0]),
        "outer_rate": float(found.rates[1]) if method.outer_rates else None,
        "trials": [
            [float(x) if np.isfinite(x) else None for x in trial]
            for trial in found.trials
        ],
        "task_gradients": method.task_gradients,
        "meta_parameters": found.meta_parameters,
        "meta_training_loss": found.losses.tolist(),
        "cpu_seconds": round(found.cpu_seconds, 1),
    }


def _save(path: Path, found: Found) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {f"errors_{s}": e for s, e in found.errors.items()}
    arrays |= {k: np.asarray(v) for k, v in found._asdict().items() if k != "errors"}
    with atomic_write(path) as part:
        np.savez(part, **arrays)


def _load(path: Path, config: Config) -> Found:
    with np.load(path) as saved:
        fields = {k: saved[k] for k in Found._fields if k != "errors"}
        errors = {shot: saved[f"errors_{shot}"] for shot in config.test_shots}
    errors = {s: np.where(e < _DIVERGED, e, np.inf) for s, e in errors.items()}
    whole = {"meta_parameters": int, "cpu_seconds": float}
    fields = {k: whole[k](v) if k in whole else v for k, v in fields.items()}
    return Found(errors=errors, **fields)
