"""The studies: each writes a table, a picture and its rows to the run folder."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common.report import save_figure
from experiments.common.run_folder import write_json
from experiments.few_shot.options import from_json, groups, read_config
from experiments.learned_optimizer import cost, plateau, tables
from experiments.learned_optimizer.measuring import Bench, Optimizer, Tuned, compete
from experiments.learned_optimizer.options import Config, Problem
from experiments.learned_optimizer.problems import describe, variants
from metalstm import plots
from metalstm.plots import Losses
from metalstm.runtime.files import atomic_write

Rows = list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Context:
    """What every study gets."""

    config: Config
    rules: Sequence[Optimizer]
    folder: Path

    @property
    def curves(self) -> Path:
        return self.config.test.curves or self.folder / "curves"

    @property
    def reference(self) -> str:
        return self.rules[0].name

    def bench(self, problem: Problem | None = None) -> Bench:
        problem = self.config.problem if problem is None else problem
        return Bench(problem, self.config.test, self.curves)

    @property
    def few(self) -> list[str]:
        """Baselines of the studies that tune them again on every problem."""
        return list(self.config.test.few_baselines)

    def learned(self) -> list[str]:
        return [rule.name for rule in self.rules]


def make_studies(context: Context) -> dict[str, Rows]:
    """Make what ``--study`` names; returns the rows of each."""
    makers: dict[str, Callable[[Context], tuple[Rows, list[str]]]] = {
        "comparison": _comparison,
        "generalisation": _generalisation,
        "panels": _panels,
        "plateau": _plateau,
        "cost": _cost,
    }
    found = {}
    for name in context.config.test.study:
        rows, files = makers[name](context)
        write_json(context.folder / f"{name}.json", _finite(rows))
        found[name] = rows
        print(f"{name}: {', '.join([f'{name}.json', *files])}", flush=True)
    return found


def _comparison(context: Context) -> tuple[Rows, list[str]]:
    config, bench = context.config, context.bench()
    test, quadratic = config.test, config.problem.problem == "quadratics"
    measured, tuned = compete(
        bench,
        context.rules,
        test.baselines,
        steps=test.steps,
        instances=test.instances,
        every=test.record_every,
    )
    rows = tables.rows_of(measured, tuned, reference=context.reference)
    caption = _caption(context, bench)
    print(tables.text(rows, caption=caption, reference=context.reference), flush=True)
    files = [
        _write(context, "comparison", caption, tables.markdown(
            rows, reference=context.reference
        ))
    ]  # fmt: skip
    figure = plots.loss_panels(
        {describe(config.problem): measured},
        geometric=[describe(config.problem)] if quadratic else [],
        learned=context.learned(),
    )
    files.append(save_figure(figure, context.folder / "comparison.png"))
    if tuned:
        figure = plots.rate_sweeps(
            {_with_beta(t): t.sweep for t in tuned.values()},
            ylabel=f"{bench.tune_for} of the last loss",
            log=bench.tune_for == "mean",
        )
        files.append(save_figure(figure, context.folder / "sweeps.png"))
    return rows, files


def _generalisation(context: Context) -> tuple[Rows, list[str]]:
    """Other widths, depths, activations, starts, data, and a longer horizon."""
    test = context.config.test
    rows: Rows = []
    panels: dict[str, dict[str, Losses]] = {}

    def add(title: str, measured, tuned, at: int | None = None) -> None:
        found = tables.rows_of(measured, tuned, at=at, reference=context.reference)
        rows.extend({"problem": title, **row} for row in found)
        panels[title] = measured

    def run(problem: Problem) -> tuple[dict[str, Losses], dict[str, Tuned]]:
        return compete(
            context.bench(problem),
            context.rules,
            context.few,
            steps=test.steps,
            instances=test.instances,
            every=test.record_every,
        )

    add("as in meta-training", *run(context.config.problem))
    for title, problem in variants(context.config.problem).items():
        print(title, flush=True)
        add(title, *run(problem))
    if test.long_steps > test.steps:
        print(f"{test.long_steps:,} updates", flush=True)
        measured, tuned = compete(
            context.bench(),
            context.rules,
            [*context.few, "adam-cosine"],
            steps=test.long_steps,
            instances=test.long_instances,
            every=_divisor(test.steps, test.long_steps),
        )
        title = f"{test.long_steps:,} updates"
        add(f"{title}, after {test.steps:,}", measured, tuned, at=test.steps)
        del panels[f"{title}, after {test.steps:,}"]
        add(title, measured, tuned)
    caption = (
        f"Rules trained on: {describe(context.config.problem)}. "
        + _protocol(context, context.bench())
        + " Baselines are tuned again on every problem."
    )
    if test.long_steps > test.steps:
        caption += f" {test.long_steps:,} updates: {test.long_instances} problems."
    table = tables.markdown(rows, reference=context.reference, first="problem")
    grid = tables.grid(rows, row="problem", column="optimizer")
    print(caption, grid, sep="\n", flush=True)
    files = [_write(context, "generalisation", caption, f"{grid}\n\n{table}")]
    quadratic = context.config.problem.problem == "quadratics"
    figure = plots.loss_panels(
        panels,
        geometric=list(panels) if quadratic else [],
        learned=context.learned(),
    )
    files.append(save_figure(figure, context.folder / "generalisation.png"))
    return rows, files


def _panels(context: Context) -> tuple[Rows, list[str]]:
    """Quadratics; 100 updates; the next 100; 40 units; two layers; ReLU."""
    config, test = context.config, context.config.test
    rows: Rows = []
    panels: dict[str, dict[str, Losses]] = {}

    def add(title: str, measured, tuned, of: Context = context) -> None:
        found = tables.rows_of(measured, tuned, reference=of.reference)
        rows.extend({"problem": title, **row} for row in found)
        panels[title] = measured

    if config.run.beside is not None:
        other = _beside(config.run.beside, context)
        of = other.config.test
        found = compete(
            other.bench(), other.rules, context.few, steps=of.steps,
            instances=of.instances, every=of.record_every,
        )  # fmt: skip
        add("quadratics", *found, of=other)
    steps, every = test.steps, test.record_every

    def run(problem: Problem, updates: int) -> Any:
        return compete(
            context.bench(problem), context.rules, context.few, steps=updates,
            instances=test.instances, every=every, tune_steps=steps,
        )  # fmt: skip

    where, activation = config.problem.dataset, config.problem.activation
    base = f"{where}, {config.problem.widths[0]} {activation} units"
    twice, tuned = run(config.problem, 2 * steps)
    first = {k: Losses(v.steps[: steps // every + 1], v.values[:, : steps // every + 1])
             for k, v in twice.items()}  # fmt: skip
    add(base, first, tuned)
    title = f"{base}, updates {steps} to {2 * steps}"
    add(title, twice, tuned)
    panels[title] = {
        k: Losses(v.steps[steps // every :], v.values[:, steps // every :])
        for k, v in twice.items()
    }
    named = variants(config.problem)
    for name in (f"{2 * config.problem.widths[0]} units", "2 layers", "ReLU"):
        if name in named:
            print(name, flush=True)
            add(name, *run(named[name], steps))
    caption = (
        "As figures 4 and 5 of Andrychowicz et al. (2016). Rules trained on: "
        f"{describe(config.problem)}. {_protocol(context, context.bench())} Baselines "
        f"are tuned on every problem for {steps} updates."
    )
    table = tables.markdown(rows, reference=context.reference, first="problem")
    grid = tables.grid(rows, row="problem", column="optimizer")
    print(caption, grid, sep="\n", flush=True)
    files = [_write(context, "panels", caption, f"{grid}\n\n{table}")]
    names = {rule.name for rule in context.rules}
    if config.run.beside is not None:
        names |= {rule.name for rule in other.rules}
    figure = plots.loss_panels(panels, geometric=["quadratics"], learned=sorted(names))
    files.append(save_figure(figure, context.folder / "panels.png"))
    return rows, files


def _beside(folder: Path, context: Context) -> Context:
    """The run on quadratics, evaluated under its own settings."""
    config = from_json(read_config(folder)["config"], Config())
    from experiments.learned_optimizer.running import saved_rules

    test = dataclasses.replace(config.test, curves=context.config.test.curves)
    config = dataclasses.replace(config, test=test)
    return Context(config, saved_rules(config, folder), folder)


def _plateau(context: Context) -> tuple[Rows, list[str]]:
    config, test = context.config, context.config.test
    bench = context.bench()
    measured, tuned = compete(
        bench, context.rules, context.few, steps=test.steps,
        instances=test.instances, every=test.record_every,
    )  # fmt: skip
    escaped = {
        name: (losses.steps, plateau.share_escaped(losses, test.escape_below))
        for name, losses in measured.items()
    }
    rows = tables.rows_of(measured, tuned, reference=context.reference)
    for row in rows:
        steps, share = escaped[row["optimizer"]]
        row["escaped"] = float(share[-1])
        half = np.flatnonzero(share >= 0.5)
        row["updates_to_half"] = int(steps[half[0]]) if len(half) else None
    forget = {
        rule.name: gates
        for rule in context.rules
        if (gates := plateau.forget_gates(bench, rule, test.steps)) is not None
    }
    for row in rows:
        if row["optimizer"] in forget:
            row["mean_forget"] = float(forget[row["optimizer"]].mean())
    caption = (
        f"{describe(config.problem)}. {_protocol(context, bench)} Escaped: a loss "
        f"below {test.escape_below:g} of the first."
    )
    table = plateau.markdown(rows)
    print(caption, table, sep="\n", flush=True)
    table += "\n\n" + tables.markdown(rows, reference=context.reference)
    files = [_write(context, "plateau", caption, table)]
    figure = plots.escape_curves(escaped, forget, learned=context.learned())
    files.append(save_figure(figure, context.folder / "plateau.png"))
    return rows, files


def _cost(context: Context) -> tuple[Rows, list[str]]:
    rows = cost.measure(context.rules)
    caption = (
        "One jitted update of a 784-20-10 MLP's 15,910 parameters, median of "
        f"{cost.REPEATS}, on {jax.devices()[0].device_kind}, in turn with Adam's."
    )
    table = cost.markdown(rows)
    print(caption, table, sep="\n", flush=True)
    return rows, [_write(context, "cost", caption, table)]


def _caption(context: Context, bench: Bench) -> str:
    return f"{describe(context.config.problem)}. {_protocol(context, bench)}"


def _protocol(context: Context, bench: Bench) -> str:
    test = context.config.test
    return (
        f"The same {test.instances} unseen problems for every optimizer, {test.steps} "
        f"updates; rates tuned on {test.tune_instances} others, by the "
        f"{bench.tune_for} of the last loss."
    )


def command(context: Context, study: str) -> str:
    """What makes a study again: the run, and the flags that it was not made with."""
    line = ["--evaluate", str(context.folder), "--study", study]
    beside = context.config.run.beside
    if beside and study == "panels":
        line += ["--beside", str(beside)]
    saved = from_json(read_config(context.folder)["config"], Config())
    for group in sorted(groups(saved) - {"run"}):
        for name, value in vars(getattr(context.config, group)).items():
            if value == getattr(getattr(saved, group), name) or name == "study":
                continue
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                line.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                values = value if isinstance(value, tuple) else (value,)
                line += [f"--{flag}", *map(str, values)]
    return "python -m experiments.learned_optimizer " + shlex.join(line)


def _write(context: Context, study: str, caption: str, table: str) -> str:
    path = context.folder / f"{study}.md"
    lines = [caption, "", table, "", f"    {command(context, study)}"]
    with atomic_write(path) as part:
        part.write_text("\n".join(lines) + "\n")
    return path.name


def _with_beta(tuned: Tuned) -> str:
    name = tuned.optimizer.name
    return name if tuned.beta is None else f"{name} (beta {tuned.beta:g})"


def _divisor(steps: int, long_steps: int) -> int:
    """How often to record a long run: some hundred times, and after ``steps``."""
    wanted = max(long_steps // 100, 1)
    return next(
        k for k in range(wanted, 0, -1) if steps % k == 0 and long_steps % k == 0
    )


def _finite(value: Any) -> Any:
    """JSON has no infinities: null stands for them."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
