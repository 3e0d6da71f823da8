"""The studies: each writes a table, a picture and its rows to the run folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common.cli import replace
from experiments.common.report import save_figure
from experiments.common.run_folder import write_json
from experiments.common.saved_options import from_json, read_config
from experiments.common.tables import Table
from experiments.learned_optimizer import tables
from experiments.learned_optimizer.measuring import (
    Bench,
    Choice,
    Optimizer,
    compete,
    saved_rules,
)
from experiments.learned_optimizer.options import Config, Problem
from experiments.learned_optimizer.problems import describe, variants
from metalstm import plots
from metalstm.inner import first_order, unroll
from metalstm.plots import Losses
from metalstm.rules import find_gates
from metalstm.runtime.files import atomic_write

Rows = list[dict[str, Any]]
Measured = tuple[dict[str, Losses], dict[str, Choice]]

COST_REPEATS = 101
_COST_SHAPES = {"w1": (784, 20), "b1": (20,), "w2": (20, 10), "b2": (10,)}
_GATE_PROBLEMS = 16  # of the plateau study


class Context(NamedTuple):
    """What every study gets."""

    config: Config
    rules: Sequence[Optimizer]
    folder: Path
    flags: Sequence[str] = ()  # that the study was made with, of an evaluation

    @property
    def reference(self) -> str:
        return self.rules[0].name

    @property
    def learned(self) -> list[str]:
        return [rule.name for rule in self.rules]

    @property
    def geometric(self) -> bool:
        """Whether losses differ by orders of magnitude between problems."""
        return self.config.problem.name == "quadratics"

    def bench(self, problem: Problem | None = None) -> Bench:
        test = self.config.test
        folder = test.curves or self.folder / "curves"
        return Bench(problem or self.config.problem, test, folder)

    def compete(
        self,
        problem: Problem | None = None,
        names: Sequence[str] | None = None,
        **options: Any,
    ) -> Measured:
        """The rules and ``names`` (default the few baselines) on one problem."""
        test = self.config.test
        names = test.few_baselines if names is None else names
        given = {"steps": test.steps, "instances": test.instances}
        given |= {"every": test.record_every} | options
        return compete(self.bench(problem), self.rules, names, **given)

    def protocol(self) -> str:
        test = self.config.test
        return (
            f"The same {test.instances} unseen problems for every optimizer, "
            f"{test.steps} updates; rates tuned on {test.tune_instances} others, by "
            f"the {self.bench().tune_for} of the last loss."
        )

    def write(self, study: str, *found: Table) -> str:
        """STUDY.md: the tables, and the command that makes them again."""
        text = "\n".join(table.markdown().strip() + "\n" for table in found)
        with atomic_write(self.folder / f"{study}.md") as part:
            part.write_text(f"{text}\n    {command(self, study)}\n")
        return f"{study}.md"


class _Panels:
    """Rows and curves of several problems under their titles."""

    def __init__(self, context: Context):
        self.context = context
        self.rows: Rows = []
        self.curves: dict[str, dict[str, Losses]] = {}

    def add(self, title: str, found: Measured, of: Context | None = None, **at) -> None:
        reference = (of or self.context).reference
        rows = tables.rows_of(*found, reference=reference, **at)
        self.rows += [{"problem": title, **row} for row in rows]
        self.curves[title] = found[0]

    def write(self, study: str, caption: str, **style: Any) -> tuple[Rows, list[str]]:
        context = self.context
        grid = tables.grid(
            self.rows, row="problem", column="optimizer", caption=caption
        )
        print(grid, flush=True)
        full = tables.table(self.rows, reference=context.reference, first="problem")
        figure = plots.loss_panels(self.curves, **style)
        picture = save_figure(figure, context.folder / f"{study}.png")
        return self.rows, [context.write(study, grid, full), picture]


def make_studies(context: Context) -> dict[str, Rows]:
    """Make what ``--study`` names; returns the rows of each."""
    makers = {
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
    title = describe(context.config.problem)
    measured, chosen = context.compete(names=context.config.test.baselines)
    rows = tables.rows_of(measured, chosen, reference=context.reference)
    caption = f"{title}. {context.protocol()}"
    shown = tables.table(rows, reference=context.reference, caption=caption)
    print(shown, flush=True)
    files = [context.write("comparison", shown)]
    figure = plots.loss_panels(
        {title: measured},
        geometric=[title] if context.geometric else [],
        learned=context.learned,
    )
    files.append(save_figure(figure, context.folder / "comparison.png"))
    if chosen:
        tune_for = context.bench().tune_for
        figure = plots.rate_sweeps(
            dict(_rate_sweep(choice) for choice in chosen.values()),
            ylabel=f"{tune_for} of the last loss",
            log=tune_for == "mean",
        )
        files.append(save_figure(figure, context.folder / "sweeps.png"))
    return rows, files


def _rate_sweep(choice: Choice) -> tuple[str, plots.Sweep]:
    name, tuned = choice.optimizer.name, choice.tuned
    scores = tuned.scores
    if choice.beta is not None:
        name += f" (beta {choice.beta:g})"
        scores = scores[:, list(tuned.grid["momentum"]).index(choice.beta)]
    return name, plots.Sweep(tuned.grid["learning_rate"], scores)


def _generalisation(context: Context) -> tuple[Rows, list[str]]:
    """Other widths, depths, activations, starts, data, and a longer horizon."""
    config, test = context.config, context.config.test
    panels = _Panels(context)
    panels.add("as in meta-training", context.compete())
    for title, problem in variants(config.problem).items():
        print(title, flush=True)
        panels.add(title, context.compete(problem))
    caption = (
        f"Rules trained on: {describe(config.problem)}. {context.protocol()} Baselines "
        "are tuned again on every problem."
    )
    if test.long_steps > test.steps:
        title = f"{test.long_steps:,} updates"
        print(title, flush=True)
        found = context.compete(
            names=[*test.few_baselines, "adam-cosine"],
            steps=test.long_steps,
            instances=test.long_instances,
            every=_divisor(test.steps, test.long_steps),
        )
        early = f"{title}, after {test.steps:,}"
        panels.add(early, found, at=test.steps)
        del panels.curves[early]
        panels.add(title, found)
        caption += f" {title}: {test.long_instances} problems."
    geometric = list(panels.curves) if context.geometric else []
    return panels.write(
        "generalisation", caption, geometric=geometric, learned=context.learned
    )


def _panels(context: Context) -> tuple[Rows, list[str]]:
    """Quadratics; 100 updates; the next 100; 40 units; two layers; ReLU."""
    config, test = context.config, context.config.test
    panels, learned = _Panels(context), set(context.learned)
    if config.run.quadratics_run is not None:
        other = _other_run(config.run.quadratics_run, context)
        names = test.few_baselines
        panels.add("quadratics", other.compete(names=names), of=other)
        learned |= set(other.learned)
    steps, cut = test.steps, test.steps // test.record_every
    twice, chosen = context.compete(steps=2 * steps, tune_steps=steps)
    family: Any = config.problem.family
    base = f"{config.problem.dataset}, {family.hidden[0]} {family.activation} units"
    panels.add(base, (_cut(twice, slice(cut + 1)), chosen))
    title = f"{base}, updates {steps} to {2 * steps}"
    panels.add(title, (twice, chosen))
    panels.curves[title] = _cut(twice, slice(cut, None))
    named = variants(config.problem)
    for name in (f"{2 * family.hidden[0]} units", "2 layers", "ReLU"):
        if name in named:
            print(name, flush=True)
            panels.add(name, context.compete(named[name], tune_steps=steps))
    caption = (
        "As figures 4 and 5 of Andrychowicz et al. (2016). Rules trained on: "
        f"{describe(config.problem)}. {context.protocol()} Baselines are tuned on "
        f"every problem for {steps} updates."
    )
    return panels.write(
        "panels", caption, geometric=["quadratics"], learned=sorted(learned)
    )


def _cut(measured: Mapping[str, Losses], part: slice) -> dict[str, Losses]:
    return {
        name: Losses(found.steps[part], found.values[:, part])
        for name, found in measured.items()
    }


def _other_run(folder: Path, context: Context) -> Context:
    """The run on quadratics, evaluated under its own settings."""
    config = from_json(Config, read_config(folder)["config"])
    test = replace(config.test, curves=context.config.test.curves)
    config = replace(config, test=test)
    return Context(config, saved_rules(config, folder), folder)


def _plateau(context: Context) -> tuple[Rows, list[str]]:
    """Who leaves a plateau, and what the forget gates do there."""
    test = context.config.test
    measured, chosen = context.compete()
    rows = tables.rows_of(measured, chosen, reference=context.reference)
    escaped, forget = {}, {}
    for row in rows:
        found = measured[row["optimizer"]]
        left = found.values < test.escape_below * found.values[:, :1]
        share = left.mean(0)
        escaped[row["optimizer"]] = found.steps, share
        half = np.flatnonzero(share >= 0.5)
        row["escaped"] = float(share[-1])
        row["updates_to_half"] = int(found.steps[half[0]]) if len(half) else None
    for row, rule in zip(rows, context.rules, strict=False):
        gates = forget_gates(context.bench(), rule, test.steps)
        if gates is not None:
            forget[rule.name] = gates
            row["mean_forget"] = float(gates.mean())
    caption = (
        f"{describe(context.config.problem)}. {context.protocol()} Escaped: a loss "
        f"below {test.escape_below:g} of the first."
    )
    headings = "optimizer", "escaped", "updates until half have", "mean f"
    cells = []
    for row in rows:
        when = _or(row["updates_to_half"], ",", "never")
        mean = _or(row.get("mean_forget"), ".4f", "")
        cells.append([row["optimizer"], f"{row['escaped']:.0%}", when, mean])
    shown = Table(caption, headings, cells)
    print(shown, flush=True)
    full = tables.table(rows, reference=context.reference)
    figure = plots.escape_curves(escaped, forget, learned=context.learned)
    picture = save_figure(figure, context.folder / "plateau.png")
    return rows, [context.write("plateau", shown, full), picture]


def forget_gates(bench: Bench, rule: Optimizer, steps: int) -> np.ndarray | None:
    """f over the updates of a few problems, [problems, steps, N]; None without gates.

    The problems must be without minibatches.
    """
    family, data = bench.source.test, bench.source.data

    def one(key: jax.Array) -> Any:
        task_key, init_key = jax.random.split(key)
        task = family.sample(task_key, data)
        _, trace = unroll(
            lambda params, stats, batch, key: (family.loss(params, task, ()), stats),
            rule.tx,
            (),
            family.init(init_key, task),
            num_steps=steps,
            differentiation=first_order(),
            observe=lambda state: find_gates(state.rule_state),
        )
        return trace.observed

    keys = jax.random.split(jax.random.key(bench.test.test_seed), _GATE_PROBLEMS)
    gates = jax.jit(jax.vmap(one))(keys)
    return np.asarray(gates["forget"]) if "forget" in gates else None


def _cost(context: Context) -> tuple[Rows, list[str]]:
    """Time and memory of one update of an MLP's parameters, optimizers in turn."""
    key = jax.random.key(0)
    params = {n: 0.01 * jax.random.normal(key, s) for n, s in _COST_SHAPES.items()}
    adam = optax.with_extra_args_support(optax.adam(1e-3))
    transforms = {"adam": adam} | {rule.name: rule.tx for rule in context.rules}
    states = {name: tx.init(params) for name, tx in transforms.items()}
    updates = {name: jax.jit(tx.update) for name, tx in transforms.items()}
    grads, loss = jax.tree.map(lambda p: 0.1 * p, params), jnp.float32(1)
    times: dict[str, list[float]] = {name: [] for name in transforms}
    for _ in range(COST_REPEATS + 2):
        for name, update in updates.items():
            begun = time.perf_counter()
            jax.block_until_ready(update(grads, states[name], params, value=loss))
            times[name].append(time.perf_counter() - begun)
    size, rows = sum(p.size for p in params.values()), []
    for name, state in states.items():
        # the first calls compile
        seconds = float(np.median(times[name][2:]))
        stored = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
        row = {"optimizer": name, "milliseconds": 1e3 * seconds}
        row["times_adam"] = seconds / float(np.median(times["adam"][2:]))
        rows.append(row | {"state_bytes_per_parameter": stored / size})
    caption = (
        f"One jitted update of a 784-20-10 MLP's {size:,} parameters, median of "
        f"{COST_REPEATS}, on {jax.devices()[0].device_kind}, in turn with Adam's."
    )
    headings = "optimizer", "one update, ms", "times Adam's", "state, bytes a parameter"
    styles = "", ".3g", ".1f", ".0f"
    cells = [
        [
            format(value, style)
            for value, style in zip(row.values(), styles, strict=True)
        ]
        for row in rows
    ]
    shown = Table(caption, headings, cells)
    print(shown, flush=True)
    return rows, [context.write("cost", shown)]


def command(context: Context, study: str) -> str:
    """What makes a study again: the run, and the flags of this evaluation."""
    line = ["--evaluate", str(context.folder), "--study", study, *context.flags]
    if study == "panels" and context.config.run.quadratics_run and not context.flags:
        line += ["--quadratics-run", str(context.config.run.quadratics_run)]
    return "python -m experiments.learned_optimizer " + shlex.join(line)


def _or(value: Any, style: str, nothing: str) -> str:
    return nothing if value is None else f"{value:{style}}"


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
