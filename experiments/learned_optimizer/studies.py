"""The studies: each makes rows, tables and figures for the run folder."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.common import report
from experiments.common.cli import replace
from experiments.common.run_folder import write_json
from experiments.common.saved_options import from_json, read_config
from experiments.common.study import Made
from experiments.common.tables import Table
from experiments.learned_optimizer import measuring
from experiments.learned_optimizer.measuring import (
    Bench,
    Measured,
    Optimizer,
    saved_rules,
)
from experiments.learned_optimizer.options import Config, Problem
from experiments.learned_optimizer.problems import describe, variants
from metalstm import plots
from metalstm.inner import first_order, unroll
from metalstm.rules import find_gates
from metalstm.runtime.files import atomic_write

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

    def bench(self, problem: Problem | None = None) -> Bench:
        test = self.config.test
        folder = test.curves or self.folder / "curves"
        return Bench(problem or self.config.problem, test, folder)

    def compete(
        self,
        title: str,
        problem: Problem | None = None,
        names: Sequence[str] | None = None,
        tune_steps: int | None = None,
        **options: int,
    ) -> Panel:
        """Measure rules and tuned baselines (default the few) on the same problems."""
        print(title, flush=True)
        bench, test = self.bench(problem), self.config.test
        settings = {"steps": test.steps, "instances": test.instances}
        settings |= {"every": test.record_every} | options
        names = test.few_baselines if names is None else names
        steps = tune_steps or settings["steps"]
        optimizers = *self.rules, *(bench.tune(name, steps=steps) for name in names)
        found = [Measured(one, bench.losses(one, **settings)) for one in optimizers]
        return Panel(title, self, found, found)

    def protocol(self) -> str:
        test = self.config.test
        return (
            f"The same {test.instances} unseen problems for every optimizer, "
            f"{test.steps} updates; rates tuned on {test.tune_instances} others, by "
            f"the {self.bench().tune_for} of the last loss."
        )

    def command(self, study: str) -> str:
        """What makes a study again: the run, and the flags of this evaluation."""
        line = ["--evaluate", str(self.folder), "--study", study, *self.flags]
        quadratics = self.config.run.quadratics_run
        if study == "panels" and quadratics and not self.flags:
            line += ["--quadratics-run", str(quadratics)]
        return "python -m experiments.learned_optimizer " + shlex.join(line)


class Panel(NamedTuple):
    """Optimizers on one problem: a part of the table, and of the figure."""

    title: str
    context: Context
    measured: list[Measured]
    drawn: list[Measured]  # in a panel of the figure; nothing: there is none

    def rows(self) -> list[dict[str, Any]]:
        return measuring.rows_of(self.measured, self.context.reference)

    def part(self, title: str, which: slice) -> Panel:
        """Some of the updates."""
        some = [one.part(which) for one in self.measured]
        return self._replace(title=title, measured=some, drawn=some)


def make_studies(context: Context) -> list[str]:
    """Make and write what ``--study`` names, and return these names."""
    makers = {
        "comparison": _comparison,
        "generalisation": _generalisation,
        "panels": _panels,
        "plateau": _plateau,
        "cost": _cost,
    }
    folder, names = context.folder, context.config.test.study
    for name in names:
        tables, rows, figures = makers[name](context)
        print(tables[0], flush=True)
        text = "\n".join(table.markdown().strip() + "\n" for table in tables)
        with atomic_write(folder / f"{name}.md") as part:
            part.write_text(f"{text}\n    {context.command(name)}\n")
        files = [f"{name}.json", f"{name}.md"]
        files += [report.save_figure(one, folder / f) for f, one in figures.items()]
        write_json(folder / f"{name}.json", rows)
        print(f"{name}: {report.ending(folder, files)}", flush=True)
    return [*names]


def _figure(panels: Sequence[Panel]) -> Any:
    curves = {
        panel.title: {optimizer.name: losses for optimizer, losses in panel.drawn}
        for panel in panels
        if panel.drawn
    }
    # between quadratics losses differ by orders of magnitude
    kinds = {panel.title: panel.context.config.problem.name for panel in panels}
    geometric = [title for title, kind in kinds.items() if kind == "quadratics"]
    learned = [name for panel in panels for name in panel.context.learned]
    return plots.loss_panels(curves, geometric=geometric, learned=learned)


def _side_by_side(study: str, caption: str, panels: Sequence[Panel], by: str) -> Made:
    """Several problems: a grid of mean losses, a full table, a figure of panels."""
    rows = [{"problem": panel.title, **row} for panel in panels for row in panel.rows()]
    grid = measuring.grid(rows, caption=caption)
    full = measuring.table(rows, reference=by, first="problem")
    return Made([grid, full], rows, {f"{study}.png": _figure(panels)})


def _comparison(context: Context) -> Made:
    title, tune_for = describe(context.config.problem), context.bench().tune_for
    panel = context.compete(title, names=context.config.test.baselines)
    rows, caption = panel.rows(), f"{title}. {context.protocol()}"
    table = measuring.table(rows, reference=context.reference, caption=caption)
    figures, sweeps = {"comparison.png": _figure([panel])}, {}
    for optimizer in (one.optimizer for one in panel.measured):
        name, tuned = optimizer.name, optimizer.tuned
        if tuned is not None:
            scores, beta = tuned.scores, tuned.best.get("momentum")
            if beta is not None:
                name += f" (beta {beta:g})"
                scores = scores[:, list(tuned.grid["momentum"]).index(beta)]
            sweeps[name] = plots.Sweep(tuned.grid["learning_rate"], scores)
    if sweeps:
        ylabel = f"{tune_for} of the last loss"
        figures["sweeps.png"] = plots.rate_sweeps(
            sweeps, ylabel=ylabel, log=tune_for == "mean"
        )
    return Made([table], rows, figures)


def _generalisation(context: Context) -> Made:
    """Other widths, depths, activations, starts, data, and a longer horizon."""
    config, test = context.config, context.config.test
    problems = {"as in meta-training": None} | variants(config.problem)
    panels = [context.compete(title, problem) for title, problem in problems.items()]
    caption = (
        f"Rules trained on: {describe(config.problem)}. {context.protocol()} Baselines "
        "are tuned again on every problem."
    )
    if test.long_steps > test.steps:
        title = f"{test.long_steps:,} updates"
        every = _divisor(test.steps, test.long_steps)
        found = context.compete(
            title,
            names=[*test.few_baselines, "adam-cosine"],
            steps=test.long_steps,
            instances=test.long_instances,
            every=every,
        )
        until = slice(test.steps // every + 1)
        early = found.part(f"{title}, after {test.steps:,}", until)
        panels += [early._replace(drawn=[]), found]
        caption += f" {title}: {test.long_instances} problems."
    return _side_by_side("generalisation", caption, panels, context.reference)


def _panels(context: Context) -> Made:
    """Quadratics; 100 updates; 100 more; 40 units; two layers; ReLU; 1,000 updates."""
    config, test = context.config, context.config.test
    panels = []
    if config.run.quadratics_run is not None:
        other = _other_run(config.run.quadratics_run, context)
        panels.append(other.compete("quadratics"))
    steps, long = test.steps, test.long_steps
    family: Any = config.problem.family
    base = f"{config.problem.dataset}, {family.hidden[0]} {family.activation} units"
    later = f"{base}, updates {steps} to {2 * steps}"
    panels.append(context.compete(base))
    # a run of its own, for rules that are told its length
    twice = context.compete(later, steps=2 * steps, tune_steps=steps)
    second = slice(steps // test.record_every, None)
    panels.append(twice._replace(drawn=twice.part(later, second).drawn))
    named = variants(config.problem)
    for name in (f"{2 * family.hidden[0]} units", "2 layers", "ReLU"):
        if name in named:
            panels.append(context.compete(name, named[name]))
    if long:
        for name, problem in ({base: None} | named).items():
            if name not in (base, "ReLU"):
                continue
            panel = context.compete(
                f"{name}, {long:,} updates",
                problem,
                steps=long,
                instances=test.long_instances,
                every=_divisor(steps, long),
            )
            panels.append(panel)
    caption = (
        "As figures 4 and 5 of Andrychowicz et al. (2016). Rules trained on: "
        f"{describe(config.problem)}. {context.protocol()} Baselines are tuned on "
        f"every problem, those of updates {steps} to {2 * steps} for {steps}."
    )
    return _side_by_side("panels", caption, panels, context.reference)


def _other_run(folder: Path, context: Context) -> Context:
    """The run on quadratics, evaluated under its own settings."""
    config = from_json(Config, read_config(folder)["config"])
    test = replace(config.test, curves=context.config.test.curves)
    config = replace(config, test=test)
    return Context(config, saved_rules(config, folder), folder)


def _plateau(context: Context) -> Made:
    """Who leaves a plateau, and what the forget gates do there."""
    test, title = context.config.test, describe(context.config.problem)
    panel = context.compete(title)
    rows, escaped, forget = panel.rows(), {}, {}
    for row, (optimizer, losses) in zip(rows, panel.measured, strict=True):
        left = losses.values < test.escape_below * losses.values[:, :1]
        share = left.mean(0)
        escaped[optimizer.name] = losses.steps, share
        half = np.flatnonzero(share >= 0.5)
        row["escaped"] = float(share[-1])
        row["updates_to_half"] = int(losses.steps[half[0]]) if len(half) else None
        gates = None
        if optimizer.tuned is None:
            gates = forget_gates(context.bench(), optimizer, test.steps)
        if gates is not None:
            forget[optimizer.name] = gates
            row["mean_forget"] = float(gates.mean())
    caption = (
        f"{title}. {context.protocol()} Escaped: a loss below {test.escape_below:g} of "
        "the first."
    )
    columns = {
        "optimizer": "{optimizer}",
        "escaped": "{escaped:.0%}",
        "updates until half have": "{half}",
        "mean f": "{mean_forget:.4f}",
    }
    halves = (row["updates_to_half"] for row in rows)
    said = ({"half": "never" if half is None else f"{half:,}"} for half in halves)
    records = (row | half for row, half in zip(rows, said, strict=True))
    shown = Table.of(caption, columns, records)
    full = measuring.table(rows, reference=context.reference)
    figure = plots.escape_curves(escaped, forget, learned=context.learned)
    return Made([shown, full], rows, {"plateau.png": figure})


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


def _cost(context: Context) -> Made:
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
    # the first calls compile
    medians = {name: float(np.median(seconds[2:])) for name, seconds in times.items()}
    size, rows = sum(p.size for p in params.values()), []
    for name, seconds in medians.items():
        stored = sum(np.asarray(x).nbytes for x in jax.tree.leaves(states[name]))
        row = {"optimizer": name, "milliseconds": 1e3 * seconds}
        row |= {"times_adam": seconds / medians["adam"]}
        rows.append(row | {"state_bytes_per_parameter": stored / size})
    caption = (
        f"One jitted update of a 784-20-10 MLP's {size:,} parameters, median of "
        f"{COST_REPEATS}, on {jax.devices()[0].device_kind}, in turn with Adam's."
    )
    columns = {
        "optimizer": "{optimizer}",
        "one update, ms": "{milliseconds:.3g}",
        "times Adam's": "{times_adam:.1f}",
        "state, bytes a parameter": "{state_bytes_per_parameter:.0f}",
    }
    return Made([Table.of(caption, columns, rows)], rows, {})


def _divisor(steps: int, long_steps: int) -> int:
    """How often to record a long run: some hundred times, and after ``steps``."""
    wanted = max(long_steps // 100, 1)
    return next(
        k for k in range(wanted, 0, -1) if steps % k == 0 and long_steps % k == 0
    )
