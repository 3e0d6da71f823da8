"""Test finished runs again, in one table: another way, shot, mode, other episodes."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path

import numpy as np

import metalstm
from experiments import meta_testing, report, table
from experiments.config import Config, with_flags
from experiments.devices import describe
from experiments.methods import Spec, config_for
from experiments.run_folder import write_json
from experiments.saved_methods import (
    SavedMethod,
    choose_methods,
    read_runs,
    refuse_other_images,
)
from experiments.sources import load_source
from experiments.table import Row, Table
from metalstm import distributed
from metalstm.files import whole_file
from metalstm.runs import COMPARING, any_way, build_algorithm, load_params

# Of the flags of a method, those that may be said anew for its test.
_SAID_ANEW = {"query_norm", "test_steps"}


def reevaluate(config: Config, said: Collection[str]) -> Table:
    """Print and save one row for each method and mode; all share their episodes.

    The paired difference is to Meta-LSTM, or else the first row; with
    ``--query-norm all`` to the method's first mode.

    Args:
      config: the first run's, with what was said on the command line.
      said: the options of the command line; they hold for every run.

    Raises:
      ValueError: a run cannot serve the way, or was trained on other images.
      FileNotFoundError: a method has no checkpoint yet.
    """
    runs = read_runs(config.run.evaluate)
    wanted = choose_methods(runs, config.methods.algorithms)
    for method in wanted:
        _check_way(method, config)
    # no meta-training here, so its episodes need not be possible
    mesh = distributed.task_mesh(num_devices=config.devices.devices)
    source = load_source(with_flags(config, algorithms=()))
    source = source.placed(mesh, config.devices.devices)
    refuse_other_images(runs, source)
    print(report.header(config, source, describe(mesh)), flush=True)

    every_mode = config.methods.query_norm == "all"
    anew = {name: getattr(config.methods, name) for name in _SAID_ANEW & set(said)}
    found: list[tuple[SavedMethod, Row]] = []
    evaluations: dict[str, metalstm.Evaluation] = {}
    first_modes: dict[str, str] = {}
    for method in wanted:
        own = config_for(with_flags(method.config, **anew), method.name)
        shape = source.dataset.image_shape
        params, message = load_params(method.folder, method.name, method.spec, shape)
        if message:
            print(f"note: {message}")
        for mode in modes(method.spec, own.methods.query_norm):
            changed = test_spec(method.spec, config.data.way, mode, own)
            evaluation = metalstm.evaluate(
                build_algorithm(changed),
                params,
                source.dataset.test,
                source.test,
                num_episodes=config.test.test_episodes,
                seed=config.test.test_seed,
                batch_size=config.test.test_batch,
                mesh=mesh,
            )
            label = f"{method.label} [{mode}]" if every_mode and mode else method.label
            first_modes.setdefault(method.label, label)
            evaluations[label] = evaluation
            row = Row(
                label,
                evaluation.mean,
                evaluation.ci95,
                None,
                mode,
                meta_testing.count_parameters(params, method.spec),
                method.meta_training.get("episodes"),
                method.meta_training.get("wall_seconds"),
                table.published_beside(method.name, config, mode),
            )
            found.append((method, row))

    names = [method.name for method, _ in found]
    reference = found[names.index(table.reference_of(names))][1].name
    rows = []
    for method, row in found:
        to = first_modes[method.label] if every_mode else reference
        if row.name != to:
            pair = evaluations[row.name], evaluations[to]
            row = row._replace(difference=metalstm.paired_difference(*pair))
        rows.append(row)
    what = f"meta-test, the same {config.test.test_episodes} episodes for every row"
    to = "the method's first mode" if every_mode else reference
    whole = Table(table.caption(what, to), rows)
    print(whole)
    if not distributed.is_main():
        return whole
    folder = config.run.workdir or config.run.evaluate[0]
    files = _write(folder, config, whole, evaluations)
    print(f"{', '.join(files)} in {folder}", flush=True)
    return whole


def test_spec(spec: Spec, way: int, mode: str | None, own: Config) -> Spec:
    """The spec for a test at ``way`` in a batch-norm mode.

    ``own``: the flags as the method reads them, of which the updates at the test count.
    """
    spec = copy.deepcopy(spec)
    spec["way"] = way
    options = spec["algorithm"].setdefault("options", {})
    if mode is not None and "query_norm" in options:
        options["query_norm"] = mode
    if "num_test_steps" in options:
        options["num_test_steps"] = own.methods.test_steps
    return spec


def _check_way(method: SavedMethod, config: Config) -> None:
    way, spec = config.data.way, method.spec
    if way != spec["way"] and not any_way(spec):
        raise ValueError(
            f"--way {way}: {method.label} was trained with a head of {spec['way']} "
            f"classes; choose --way {spec['way']}, or train with --tied-head"
        )


def modes(spec: Spec, query_norm: str) -> list[str | None]:
    """The batch-norm modes that make sense for a method, of those asked for."""
    name = spec["algorithm"]["name"]
    if table.batch_norm_of(spec, query_norm) is None:
        return [None]
    if name in (*COMPARING, "mann"):
        return ["frozen"]
    frozen = spec["algorithm"]["options"].get("train_query_norm") == "frozen"
    if query_norm != "all":
        return [query_norm]
    return ["support", "support+1", "transductive", *(["frozen"] if frozen else [])]


def _write(
    folder: Path,
    config: Config,
    whole: Table,
    evaluations: dict[str, metalstm.Evaluation],
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    data, norm = config.data, config.methods.query_norm
    stem = f"evaluation-{data.way}w{data.shot}s-{norm}-{config.test.test_seed}"
    tested = {"seed": config.test.test_seed, "episodes": config.test.test_episodes}
    rows = [row.values() | tested for row in whole.rows]
    write_json(folder / f"{stem}.json", rows)
    arrays = {label: e.accuracies for label, e in evaluations.items()}
    with whole_file(folder / f"{stem}.npz") as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    return [f"{stem}.json", *whole.write(folder, stem)]
