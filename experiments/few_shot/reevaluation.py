"""Test finished runs again, in one table: another way, shot, mode, other episodes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

import metalstm
from experiments.common import report, tables
from experiments.common.devices import describe
from experiments.common.run_folder import write_json
from experiments.common.tables import Table, Tested
from experiments.few_shot import meta_testing
from experiments.few_shot.data import Source, load_source
from experiments.few_shot.methods import Spec, config_for
from experiments.few_shot.options import Config, with_flags
from experiments.few_shot.saved_methods import (
    SavedMethod,
    choose_methods,
    read_runs,
    refuse_other_images,
)
from metalstm.runs import COMPARING, any_way, build_algorithm, load_params
from metalstm.runtime import processes, sharding
from metalstm.runtime.files import atomic_write

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
    mesh = sharding.task_mesh(num_devices=config.devices.devices)
    source = load_source(with_flags(config, algorithms=()))
    source = source.placed(mesh, config.devices.devices)
    refuse_other_images(runs, source)
    print(report.header(config, source, describe(mesh)), flush=True)

    tested = list(_test_again(wanted, source, config, said))
    methods = [one.method for one in tested]
    to = reference = tested[methods.index(tables.reference_of(methods))].name
    rows = tables.rows_of(tested, config, lambda _: reference)
    if config.methods.query_norm == "all":
        to = "the method's first mode"
        first: dict[str, str] = {}
        for one in tested:
            first.setdefault(_without_mode(one), one.name)
        rows = tables.rows_of(tested, config, lambda one: first[_without_mode(one)])
    what = f"meta-test, the same {config.test.test_episodes} episodes for every row"
    whole = Table(tables.caption(what, to), rows)
    print(whole)
    if not processes.is_main():
        return whole
    folder = config.run.workdir or config.run.evaluate[0]
    files = _write(folder, config, whole, tested)
    print(f"{', '.join(files)} in {folder}", flush=True)
    return whole


def _test_again(
    wanted: Sequence[SavedMethod],
    source: Source,
    config: Config,
    said: Collection[str],
) -> Iterator[Tested]:
    """Test each method, in each mode that is asked for and makes sense."""
    mesh = sharding.task_mesh(num_devices=config.devices.devices)
    anew = {name: getattr(config.methods, name) for name in _SAID_ANEW & set(said)}
    for method in wanted:
        own = config_for(with_flags(method.config, **anew), method.name)
        shape = source.dataset.image_shape
        params, message = load_params(method.folder, method.name, method.spec, shape)
        if message:
            print(f"note: {message}")
        learned = meta_testing.count_parameters(params, method.spec)
        for mode in modes(method.spec, own.methods.query_norm):
            evaluation = metalstm.evaluate(
                build_algorithm(test_spec(method.spec, config.data.way, mode, own)),
                params,
                source.dataset.test,
                source.test,
                num_episodes=config.test.test_episodes,
                seed=config.test.test_seed,
                batch_size=config.test.test_batch,
                mesh=mesh,
            )
            several = own.methods.query_norm == "all" and mode is not None
            yield Tested(
                f"{method.label} [{mode}]" if several else method.label,
                method.name,
                evaluation,
                mode,
                learned,
                method.meta_training,
            )


def _without_mode(one: Tested) -> str:
    return one.name.removesuffix(f" [{one.batch_norm}]")


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
    if tables.batch_norm_of(spec, query_norm) is None:
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
    tested: Sequence[Tested],
) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    data, norm = config.data, config.methods.query_norm
    stem = f"evaluation-{data.way}w{data.shot}s-{norm}-{config.test.test_seed}"
    which = {"seed": config.test.test_seed, "episodes": config.test.test_episodes}
    rows = [row.values() | which for row in whole.rows]
    write_json(folder / f"{stem}.json", rows)
    arrays = {one.name: one.evaluation.accuracies for one in tested}
    with atomic_write(folder / f"{stem}.npz") as part:
        np.savez(part, **arrays)  # type: ignore[arg-type]
    return [f"{stem}.json", *whole.write(folder, stem)]
