"""Evaluate a finished run again: another way, shot, batch-norm mode, other episodes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

import metalstm
from experiments import meta_testing, report
from experiments.config import Config, read_config, with_flags
from experiments.run_folder import write_json
from experiments.sources import load_source
from metalstm.runs import COMPARING, any_way, build_algorithm, load_params

Spec = dict[str, Any]


def reevaluate(config: Config) -> list[dict[str, Any]]:
    """Print and save one row for each method and mode; pairs share their episodes.

    The paired difference is to the first row, or with ``--query-norm all`` to the
    method's first mode.

    Raises:
      ValueError: the run cannot serve the way, or was trained on other images.
      FileNotFoundError: a method has no checkpoint yet.
    """
    folder = config.run.evaluate
    assert folder is not None
    saved = read_config(folder)
    every_mode = config.methods.query_norm == "all"
    wanted = [
        (name, spec)
        for name, spec in saved["methods"].items()
        if name in config.methods.algorithms
    ]
    for name, spec in wanted:
        _check_way(name, spec, config)
    # no meta-training here, so its episodes need not be possible
    source = load_source(with_flags(config, train_queries=None, train_way=None))
    if source.describe()["checksum"] != saved["data"]["checksum"]:
        print("note: the data differ from those of the run (another checksum)")
    print(report.header(config, source), flush=True)

    rows, accuracies = [], {}
    base: metalstm.Evaluation | None = None
    for name, spec in wanted:
        shape = source.dataset.image_shape
        params, message = load_params(folder, name, spec, shape)
        if message:
            print(f"note: {message}")
        if every_mode:
            base = None
        for mode in _modes(spec, config):
            algorithm = build_algorithm(_changed(spec, mode, config))
            evaluation = metalstm.evaluate(
                algorithm,
                params,
                source.dataset.test,
                source.test,
                num_episodes=config.test.test_episodes,
                seed=config.test.test_seed,
                batch_size=config.test.test_batch,
            )
            label = f"{name} [{mode}]" if mode else name
            difference = None
            if base is not None:
                difference = metalstm.paired_difference(evaluation, base)
            base = base or evaluation
            accuracies[label] = evaluation.accuracies
            rows.append(
                {
                    "name": label,
                    "mean": evaluation.mean,
                    "ci95": evaluation.ci95,
                    "difference": difference,
                    "learned": meta_testing.count_parameters(params, spec),
                    "batch_norm": mode,
                    "episodes": len(evaluation.accuracies),
                    "seed": evaluation.seed,
                    "split": evaluation.split,
                }
            )
    episodes = config.test.test_episodes
    caption = f"meta-test, the same {episodes} episodes for every row"
    print(report.table(rows, caption=caption))
    print(f"{_write(folder, config, rows, accuracies)} in {folder}", flush=True)
    return rows


def _check_way(name: str, spec: Spec, config: Config) -> None:
    if config.data.way != spec["way"] and not any_way(spec):
        raise ValueError(
            f"--way {config.data.way}: {name} was trained with a head of {spec['way']} "
            f"classes; choose --way {spec['way']}, or train with --tied-head"
        )


def _modes(spec: Spec, config: Config) -> list[str | None]:
    """The batch-norm modes that make sense for a method."""
    name = spec["algorithm"]["name"]
    if name == "nearest_neighbour":
        return [None]
    normless = spec["learner"]["name"] == "mlp"
    if normless or spec["learner"]["options"].get("norm", "batch") != "batch":
        return [None]
    if name in (*COMPARING, "mann"):
        return ["frozen"]
    frozen = spec["algorithm"]["options"].get("train_query_norm") == "frozen"
    if config.methods.query_norm != "all":
        return [config.methods.query_norm]
    return ["support", "support+1", "transductive", *(["frozen"] if frozen else [])]


def _changed(spec: Spec, mode: str | None, config: Config) -> Spec:
    spec = copy.deepcopy(spec)
    spec["way"] = config.data.way
    options = spec["algorithm"].setdefault("options", {})
    if mode is not None and "query_norm" in options:
        options["query_norm"] = mode
    if "num_test_steps" in options:
        options["num_test_steps"] = config.methods.test_steps
    return spec


def _write(
    folder: Path, config: Config, rows: list[dict[str, Any]], accuracies: dict
) -> str:
    data, norm = config.data, config.methods.query_norm
    name = f"evaluation-{data.way}w{data.shot}s-{norm}-{config.test.test_seed}"
    write_json(folder / f"{name}.json", rows)
    np.savez(folder / f"{name}.npz", **accuracies)
    return f"{name}.json"
