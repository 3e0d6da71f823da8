"""Train every method, test all on the same episodes, print, draw, write results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.common import report, tables
from experiments.common.run_folder import Metrics, refuse_other_data, write_json
from experiments.common.tables import Table, Tested
from experiments.few_shot import meta_testing
from experiments.few_shot.data import Source
from experiments.few_shot.meta_training import (
    Programs,
    Trained,
    curves,
    make_programs,
    meta_train,
)
from experiments.few_shot.methods import (
    METHODS,
    Spec,
    config_for,
    method_specs,
    pretrainings,
)
from experiments.few_shot.options import Config, to_json, with_flags
from metalstm import plots
from metalstm.base import PyTree
from metalstm.runtime import processes
from metalstm.runtime.files import atomic_write

Results = dict[str, Any]


def run_seed(
    config: Config,
    source: Source,
    folder: Path,
    programs: dict[str, Programs] | None = None,
) -> Results:
    """One seed, one folder. ``programs`` keeps what is compiled for the next seed."""
    write_config(config, source, folder)
    programs = {} if programs is None else programs
    if not programs:
        specs = specs_of(config, source)
        for name, spec in specs.items():
            programs[name] = make_programs(spec, config_for(config, name), source)
        for name, shared in pretrainings(config, specs)[0].items():
            programs[name] = make_programs(shared.spec, shared.config, source)
    metrics = Metrics(folder, tensorboard=config.run.tensorboard)
    try:
        found = _learn(config, source, folder, programs, metrics)
    finally:
        metrics.close()
    results, whole = _test(config, source, folder, programs, found)
    if not processes.is_main():
        return results
    files = ["results.json", *whole.write(folder)]
    files += _draw(config, source, folder, programs, found, results)
    write_json(folder / "results.json", results)
    print(report.ending(folder, files), flush=True)
    return results


def run_seeds(config: Config, source: Source, folder: Path) -> Results:
    """Repeat with several seeds of meta-training, and aggregate over them."""
    programs: dict[str, Programs] = {}
    write_config(config, source, folder)
    per_seed = {}
    for seed in range(config.run.seed, config.run.seed + config.run.seeds):
        print(f"seed {seed}")
        own = with_flags(config, seed=seed, seeds=1)
        per_seed[seed] = run_seed(own, source, folder / f"seed-{seed}", programs)
    results, whole = _over_seeds(config, per_seed)
    if not processes.is_main():
        return results
    print(whole)
    files = ["results.json", *whole.write(folder)]
    write_json(folder / "results.json", results)
    figure = _learning_curves(config, [folder / f"seed-{seed}" for seed in per_seed])
    name = report.save_figure(figure, folder / "learning_curve.png")
    print(report.ending(folder, [*files, name]), flush=True)
    return results


def _over_seeds(config: Config, per_seed: dict[int, Results]) -> tuple[Results, Table]:
    """Means over seeds of meta-training, their CI and that of paired differences."""
    names = config.methods.algorithms
    of = {name: [r["methods"][name] for r in per_seed.values()] for name in names}
    accuracies = {n: [r["accuracy"] for r in rows] for n, rows in of.items()}
    reference = tables.reference_of(names)
    methods, rows = {}, []
    for name in names:
        means, first = accuracies[name], of[name][0]
        mean, ci95 = meta_testing.over_seeds(means)
        difference = None
        if name != reference:
            to = accuracies[reference]
            difference = meta_testing.over_seeds(np.subtract(means, to).tolist())
        trained = [r["meta_training"] or {} for r in of[name]]
        episodes, seconds = (
            float(np.mean([t[key] for t in trained])) if key in trained[0] else None
            for key in ("episodes", "wall_seconds")
        )
        methods[name] = {
            "accuracy": mean,
            "ci95": ci95,
            "accuracies": means,
            "paired_difference": difference,
        }
        rows.append(
            tables.Row(
                name,
                mean,
                ci95,
                difference,
                first["batch_norm"],
                first["learned_parameters"],
                None if episodes is None else round(episodes),
                seconds,
                tables.published_beside(name, config, first["batch_norm"]),
            )
        )
    what = f"mean over {len(per_seed)} meta-training seeds, the CI over seeds"
    results = {
        "seeds": list(per_seed),
        "ci95_over": "seeds",
        "paired_difference_to": reference,
        "methods": methods,
    }
    return results, Table(tables.caption(what, reference), rows)


def specs_of(config: Config, source: Source) -> dict[str, Spec]:
    return method_specs(config, source.dataset.train.num_classes)


def write_config(config: Config, source: Source, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "config": to_json(config),
        "methods": specs_of(config, source),
        "data": source.describe(),
        "versions": report.versions(),
    }
    processes.on_main(lambda: refuse_other_data(folder, document["data"]))
    write_json(folder / "config.json", document)


class _Found(dict[str, PyTree]):
    """Meta-parameters by method, with how they were found."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: dict[str, Trained] = {}
        self.tuned: dict[str, meta_testing.Tuned] = {}


def _learn(
    config: Config,
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
    metrics: Metrics,
) -> _Found:
    found = _Found()
    names = config.methods.algorithms
    specs = specs_of(config, source)

    classifiers, uses = pretrainings(config, specs)

    def train(name: str, own: Config) -> Trained:
        trained = meta_train(name, programs[name], own, source, folder, metrics)
        print(
            f"{name}, best on validation: episode {trained.best_episode:,} "
            f"({100 * trained.best_mean:.1f} ± {100 * trained.best_ci95:.1f}%)",
            flush=True,
        )
        return trained

    shared: dict[str, Trained] = {}
    for name in (n for n in names if programs[n].algorithm.trainable):
        own = config_for(config, name)
        if name not in uses:
            found.trained[name] = train(name, own)
            found[name] = found.trained[name].params
            continue
        classifier = uses[name]
        if classifier not in shared:
            shared[classifier] = train(classifier, classifiers[classifier].config)
        found.trained[name] = shared[classifier]
        found[name] = shared[classifier].params
        _transfer(name, own, source, folder, programs, found)
    for name in (n for n in names if not programs[n].algorithm.trainable):
        algorithm, evaluate = programs[name].algorithm, programs[name].evaluate
        own = config_for(config, name)
        params = meta_testing.untrained_params(name, algorithm, own, source, found)
        if METHODS[name].rates:
            tuned = meta_testing.tune_rate(name, params, evaluate, own, source)
            params, found.tuned[name] = tuned.params, tuned
            print(f"{name}, best rate on validation: {tuned.rate:.3g}", flush=True)
            meta_testing.save_best(folder, name, params, rate=tuned.rate)
        found[name] = params
    return found


def _transfer(
    name: str,
    config: Config,
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
    found: _Found,
) -> None:
    """Put a floor's own rule beside the shared features, tuned on validation."""
    algorithm, evaluate = programs[name].algorithm, programs[name].evaluate
    own = meta_testing.untrained_params(name, algorithm, config, source, found)
    params = own._replace(learner=found[name].learner)
    kept: dict[str, Any] = {}
    if METHODS[name].rates:
        tuned = meta_testing.tune_rate(name, params, evaluate, config, source)
        params, found.tuned[name] = tuned.params, tuned
        kept = {"rate": tuned.rate, "steps": tuned.steps}
        print(
            f"{name}, best on validation: rate {tuned.rate:.3g}, {tuned.steps} steps",
            flush=True,
        )
    meta_testing.save_best(folder, name, params, **kept)
    found[name] = params


def _test(
    config: Config,
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
    found: _Found,
) -> tuple[Results, Table]:
    specs = specs_of(config, source)
    tested, methods = [], {}
    for name in config.methods.algorithms:
        begun = time.monotonic()
        evaluation = programs[name].evaluate(
            found[name],
            source.dataset.test,
            num_episodes=config.test.test_episodes,
            seed=config.test.test_seed,
        )
        seconds = time.monotonic() - begun
        one = Tested(
            name,
            name,
            evaluation,
            tables.batch_norm_of(specs[name], evaluation.query_norm),
            meta_testing.count_parameters(found[name], specs[name]),
            _meta_training(found, name) or {},
        )
        tested.append(one)
        methods[name] = _result(one, config, seconds)
    reference = tables.reference_of(config.methods.algorithms)
    rows = tables.rows_of(tested, config, lambda _: reference)
    for row in rows:
        marked = row.published
        methods[row.name] |= {
            "paired_difference": row.difference,
            "published": marked and marked.number._asdict(),
            "published_marks": marked and tables.marks_of(marked),
        }
    what = f"meta-test, the same {config.test.test_episodes} episodes for every method"
    whole = Table(tables.caption(what, reference), rows)
    print(whole, flush=True)
    arrays: dict[str, Any] = {one.name: one.evaluation.accuracies for one in tested}
    if processes.is_main():
        with atomic_write(folder / "accuracies.npz") as part:
            np.savez(part, **arrays)
    results = {
        "dataset": source.describe(),
        "way": config.data.way,
        "shot": config.data.shot,
        "versions": report.versions(),
        "device": jax.devices()[0].device_kind,
        "paired_difference_to": reference,
        "methods": methods,
    }
    return results, whole


def _result(one: Tested, config: Config, seconds: float) -> dict[str, Any]:
    """What results.json has of a method on its own."""
    evaluation = one.evaluation
    return {
        "accuracy": evaluation.mean,
        "ci95": evaluation.ci95,
        "episodes": len(evaluation.accuracies),
        "batch_norm": one.batch_norm,
        "split": evaluation.split,
        "seed": config.run.seed,
        "test_seed": evaluation.seed,
        "learned_parameters": one.learned,
        "wall_seconds": round(seconds, 3),
        "episodes_per_second": round(len(evaluation.accuracies) / seconds, 3),
        "meta_training": one.meta_training or None,
    }


def _meta_training(found: _Found, name: str) -> dict[str, Any] | None:
    chosen: dict[str, Any] = {}
    if name in found.tuned:
        tuned = found.tuned[name]
        chosen = {
            "rate": tuned.rate,
            "tried": {str(k): v for k, v in tuned.tried.items()},
        }
        if tuned.tried_steps is not None:
            tried = {str(k): v for k, v in tuned.tried_steps.items()}
            chosen |= {"steps": tuned.steps, "tried_steps": tried}
    if name not in found.trained:
        return chosen or None
    trained = found.trained[name]
    speed = trained.episodes_per_second
    return chosen | {
        "episodes": trained.episodes,
        "wall_seconds": round(trained.seconds, 3),
        "episodes_per_second": round(speed, 3) if math.isfinite(speed) else None,
        "best_episode": trained.best_episode,
        "validation_accuracy": trained.best_mean,
    }


def _draw(
    config: Config,
    source: Source,
    folder: Path,
    programs: Mapping[str, Programs],
    found: _Found,
    results: Results,
) -> list[str]:
    """Draw what applies, add what the gates did to the results; return file names."""
    files = []
    if found.trained:
        figure = _learning_curves(config, [folder])
        files.append(report.save_figure(figure, folder / "learning_curve.png"))
    if "meta-lstm" in found:
        algorithm = programs["meta-lstm"].algorithm
        gates = meta_testing.observe_gates(algorithm, found["meta-lstm"], source)
        if gates is not None:
            summary = gates.summary()
            results["methods"]["meta-lstm"]["gates"] = summary
            print(report.gate_line(summary), flush=True)
            figure = plots.gate_curves(gates.forget, gates.input, gates.layers)
            files.append(report.save_figure(figure, folder / "gates.png"))
    name, spec = next(iter(specs_of(config, source).items()))
    picture = meta_testing.one_episode(
        spec, programs[name].algorithm, found[name], source
    )
    if picture is not None:
        figure = plots.episode_picture(*picture)
        files.append(report.save_figure(figure, folder / "episode.png"))
    bars = {n: (r["accuracy"], r["ci95"]) for n, r in results["methods"].items()}
    chance = 1 / config.data.way
    figure = plots.accuracy_bars(bars, chance=chance, title=folder.name)
    files.append(report.save_figure(figure, folder / "accuracy.png"))
    return files


def _learning_curves(config: Config, folders: list[Path]) -> Any:
    rows = [Metrics(folder).read() for folder in folders]
    names = dict.fromkeys(row["method"] for of_seed in rows for row in of_seed)

    def by_method(kind: str, value: str) -> dict[str, list[plots.Curve]]:
        return {n: [curves(r, n, kind, value) for r in rows] for n in names}

    return plots.learning_curves(
        by_method("train", "loss"),
        by_method("train", "accuracy"),
        by_method("validation", "accuracy"),
        title=f"{config.data.dataset}, {config.data.way}-way {config.data.shot}-shot",
        chance=1 / config.data.way,
    )
