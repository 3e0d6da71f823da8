"""A run: meta-train what the flags name, export the rules, make the studies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import devices, report
from experiments.common.run_folder import (
    Metrics,
    free_folder,
    refuse_other_data,
    write_json,
)
from experiments.common.saved_options import to_json
from experiments.learned_optimizer.command_line import rule_names, trained_rules
from experiments.learned_optimizer.measuring import saved_rules
from experiments.learned_optimizer.options import Config, rule_spec
from experiments.learned_optimizer.problems import describe, load_source
from experiments.learned_optimizer.studies import Context, make_studies
from experiments.learned_optimizer.training import Trained, meta_train
from metalstm import plots, rules
from metalstm.runtime import processes

ROOT = Path("runs") / "learned_optimizer"


def choose_folder(config: Config) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    if config.run.resume is not None:
        return config.run.resume
    if config.run.workdir is not None:
        return config.run.workdir
    name = config.run.preset or config.problem.name
    return free_folder(ROOT / f"{name}-{config.run.seed}")


def run(config: Config, folder: Path) -> None:
    """Meta-train, or resume; then every study; then results.json."""
    source = load_source(config.problem)
    mesh = devices.mesh_for(config.devices, config.training.num_tasks, "--num-tasks")
    print(_header(config, devices.describe(mesh)), flush=True)
    specs = {
        name: rule_spec(name, config)
        for name in rule_names(config)
        if name not in trained_rules(config)
    }
    built = {name: rules.build_rule(spec) for name, spec in specs.items()}
    folder.mkdir(parents=True, exist_ok=True)
    document = {"config": to_json(config), "rules": specs, "data": source.about}
    refuse_other_data(folder, source.about)
    write_json(folder / "config.json", document | {"versions": report.versions()})
    metrics = Metrics(folder, counter="step")
    found: dict[str, Any] = {}
    for name, spec in specs.items():
        trained = meta_train(name, built[name], config, source, folder, metrics)
        if not processes.is_main():
            continue
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
        "studies": list(studies),
        "versions": report.versions(),
        "device": jax.devices()[0].device_kind,
    }
    write_json(folder / "results.json", results)
    print(
        f"{report.ending(folder, files)}\n"
        "studies again, or others: python -m experiments.learned_optimizer --evaluate "
        f"{folder} --study ...",
        flush=True,
    )


def evaluate(config: Config, flags: Sequence[str]) -> None:
    """Make the studies of a finished (or stopped) run again, with these flags.

    Raises:
      FileNotFoundError: the run has exported no rule yet.
    """
    folder = config.run.evaluate
    assert folder is not None
    print(_header(config, devices.describe(None)), flush=True)
    make_studies(Context(config, saved_rules(config, folder), folder, flags))


def _export(
    name: str, spec: dict[str, Any], trained: Trained, config: Config, folder: Path
) -> dict[str, Any]:
    """Write the rule's file; returns what results.json says about it."""
    learned = sum(int(np.size(x)) for x in jax.tree.leaves(trained.params))
    about = {
        "trained_on": describe(config.problem),
        "meta_steps": trained.meta_steps,
        "best_step": trained.best_step,
        "wall_seconds": round(trained.seconds, 1),
        "validation_mean_log_loss": trained.validation,
        "learned_parameters": learned,
        "seed": config.run.seed,
    }
    said = to_json(config)
    info = about | {name: said[name] for name in ("training", "budget")}
    path = folder / "rules" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    rules.save_rule(path, spec, trained.params, info=info)
    print(
        f"{name}: best on validation at meta-step {trained.best_step:,} of "
        f"{trained.meta_steps:,} (mean log-loss {trained.validation:.3f}), "
        f"{trained.seconds / 60:.1f} minutes, {learned:,} learned parameters",
        flush=True,
    )
    return about | {
        "spec": spec,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


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
    rows = metrics.read()

    def curve(name: str, kind: str, value: str) -> plots.Curve:
        mine = [r for r in rows if (r["method"], r["kind"]) == (name, kind)]
        mine = [r for r in mine if value in r]
        ci95 = np.array([r.get("ci95", np.nan) for r in mine])
        return plots.Curve(
            np.array([r["step"] for r in mine]),
            np.array([r[value] for r in mine]),
            None if kind == "train" else ci95,
        )

    return plots.meta_training_curves(
        {name: curve(name, "train", "loss") for name in names},
        {name: curve(name, "validation", "log_loss") for name in names},
    )
