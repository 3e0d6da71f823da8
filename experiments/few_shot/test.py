"""Meta-test: the same episodes for every method, of this run or of finished ones."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metalstm
from experiments.common import report
from experiments.common.devices import describe
from experiments.common.run_folder import write_json
from experiments.common.saved_options import read_json
from experiments.common.tables import Table
from experiments.few_shot import results
from experiments.few_shot.data import Source, load_source
from experiments.few_shot.heading import header
from experiments.few_shot.methods import Spec
from experiments.few_shot.options import Options
from experiments.few_shot.results import Tested
from experiments.few_shot.saved_runs import (
    SavedMethod,
    choose_methods,
    read_runs,
    refuse_other_images,
)
from experiments.few_shot.train import Found, Trainer, checkpoint_of
from metalstm.base import MetaParams, PyTree
from metalstm.meta.evaluation import Evaluation
from metalstm.run_file import load_params
from metalstm.runtime import processes, sharding
from metalstm.runtime.files import atomic_write
from metalstm.specs import COMPARING, build_algorithm, fixed_way
from metalstm.statistics import mean_and_ci95

Results = dict[str, Any]


def meta_test(run: Trainer, found: Mapping[str, Found]) -> tuple[Results, Table]:
    """Test every method of a run, print the table, keep the accuracies."""
    options, test, tested, seconds = run.options, run.options.test, [], {}
    for name, spec in run.specs.items():
        begun = time.monotonic()
        evaluation = run.programs[name].evaluate(
            found[name].params,
            run.source.dataset.test,
            num_episodes=test.test_episodes,
            seed=test.test_seed,
        )
        seconds[name] = time.monotonic() - begun
        batch_norm = results.batch_norm_of(spec, evaluation.query_norm)
        learned = count_parameters(found[name].params, spec)
        spent = found[name].meta_training
        tested.append(Tested(name, name, evaluation, batch_norm, learned, spent))
    what = f"meta-test, the same {test.test_episodes} episodes for every method"
    table, document = _compare(what, tested, options)
    print(table, flush=True)
    _save_accuracies(run.folder / "accuracies.npz", tested)
    for one in tested:
        document["methods"][one.name] |= {
            "episodes": test.test_episodes,
            "split": one.evaluation.split,
            "seed": options.run.seed,
            "test_seed": test.test_seed,
            "wall_seconds": round(seconds[one.name], 3),
            "episodes_per_second": round(test.test_episodes / seconds[one.name], 3),
        }
    return {
        "dataset": run.source.describe(),
        "way": options.data.way,
        "shot": options.data.shot,
        "versions": report.versions(),
        "device": jax.devices()[0].device_kind,
        **document,
    }, table


def over_seeds(
    options: Options, per_seed: Mapping[int, Results]
) -> tuple[Results, Table]:
    """Means over seeds of meta-training, their CI and that of paired differences."""
    tested = []
    for name in options.methods:
        of_seeds = [run["methods"][name] for run in per_seed.values()]
        means = np.array([row["accuracy"] for row in of_seeds])
        first, trained = of_seeds[0], [row["meta_training"] or {} for row in of_seeds]
        evaluation = Evaluation(
            means, *mean_and_ci95(means), first["batch_norm"], first["split"], 0
        )
        spent: dict[str, Any] = {}
        if "episodes" in trained[0]:
            spent["episodes"] = round(np.mean([t["episodes"] for t in trained]))
            spent["wall_seconds"] = np.mean([t["wall_seconds"] for t in trained])
        learned = first["learned_parameters"]
        norm = first["batch_norm"]
        tested.append(Tested(name, name, evaluation, norm, learned, spent))
    what = f"mean over {len(per_seed)} meta-training seeds, the CI over seeds"
    table, document = _compare(what, tested, options)
    for one in tested:
        accuracies = one.evaluation.accuracies.tolist()
        document["methods"][one.name]["accuracies"] = accuracies
    return {"seeds": list(per_seed), "ci95_over": "seeds", **document}, table


def _compare(
    what: str, tested: Sequence[Tested], options: Options
) -> tuple[Table, Results]:
    """The table, and what results.json has of the same methods."""
    reference = results.compared_with([one.name for one in tested])
    rows = results.rows_of(tested, options.data, lambda _: reference)
    methods = {
        one.name: {
            "accuracy": one.evaluation.mean,
            "ci95": one.evaluation.ci95,
            "paired_difference": difference,
            "batch_norm": one.batch_norm,
            "learned_parameters": one.learned,
            "meta_training": one.meta_training or None,
            "published": published and published.number._asdict(),
            "published_marks": published and published.marks,
        }
        for one, difference, published in rows
    }
    document = {"paired_difference_to": reference, "methods": methods}
    return results.table_of(what, reference, rows), document


def _save_accuracies(path: Path, tested: Sequence[Tested]) -> None:
    if processes.is_main():
        arrays: dict[str, Any] = {one.name: one.evaluation.accuracies for one in tested}
        with atomic_write(path) as part:
            np.savez(part, **arrays)


def count_parameters(params: PyTree, spec: Spec) -> int:
    """How many numbers were learned: theta_0 and the rule's."""
    if spec["algorithm"] in ("from_scratch", "nearest_neighbour"):
        return 0
    learned: PyTree
    if isinstance(params, MetaParams):
        learned = (params.learner.params, params.rule)
        if spec["algorithm"] == "fine_tuning" or not spec.get("trainable", True):
            learned = (params.learner.params, ())
    else:
        learned = params.params
        if not spec.get("train_learner", True):
            learned = {n: part for n, part in learned.items() if n != "embedding"}
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(learned))


# -- finished runs ---------------------------------------------------------------------


def evaluate_again(options: Options) -> Table:
    """Print and save one row for each method and mode; all share their episodes.

    The paired difference is to Meta-LSTM, or else the first row; with
    ``--query-norm all`` to the method's first mode.

    Raises:
      ValueError: a run cannot serve the way, or was trained on other images.
      FileNotFoundError: a method has no checkpoint yet.
    """
    data, test, folders = options.data, options.test, options.run.evaluate
    anew = options.retest
    runs = read_runs(folders)
    wanted = choose_methods(runs, options.run.algorithms)
    steps = anew.num_test_steps
    if steps and not any("num_test_steps" in _adapting(one.spec) for one in wanted):
        names = ", ".join(one.label for one in wanted)
        raise ValueError(f"--num-test-steps {steps}: {names} make no updates; drop it")
    for method in wanted:
        fixed = fixed_way(method.spec)
        if fixed not in (None, data.way):
            raise ValueError(
                f"--way {data.way}: {method.label} was trained with a head of {fixed} "
                f"classes; choose --way {fixed}, or train with --tied-head"
            )
    # no meta-training here, so its episodes need not be possible
    mesh = sharding.task_mesh(num_devices=options.devices.devices)
    source = load_source(data, {}).placed(mesh, options.devices.devices)
    refuse_other_images(runs, source)
    print(header(options, source, describe(mesh), anew.query_norm), flush=True)

    tested = list(_test_again(wanted, source, options))
    methods = [one.method for one in tested]
    first: dict[str, str] = {}
    for one in tested:
        first.setdefault(_without_mode(one), one.name)
    by_mode = anew.query_norm == "all"
    reference = tested[methods.index(results.compared_with(methods))].name
    rows = results.rows_of(
        tested, data, lambda one: first[_without_mode(one)] if by_mode else reference
    )
    what = f"meta-test, the same {test.test_episodes} episodes for every row"
    to = "the method's first mode" if by_mode else reference
    table = results.table_of(what, to, rows)
    print(table)
    if not processes.is_main():
        return table
    # a file may be the package's own: nothing is written next to it
    folder = options.run.workdir or next(
        (path for path in folders if path.is_dir()), Path("runs") / "few_shot"
    )
    folder.mkdir(parents=True, exist_ok=True)
    which = {
        "seed": test.test_seed,
        "episodes": test.test_episodes,
        "way": data.way,
        "shot": data.shot,
        "queries": data.queries,
        "num_test_steps": anew.num_test_steps,
        "evaluated": [path.name for path in folders],
    }
    records = [row.record() | which for row in rows]
    stem = _free(folder, _stem(folders, options), records)
    write_json(folder / f"{stem}.json", records)
    _save_accuracies(folder / f"{stem}.npz", tested)
    files = [f"{stem}.json", *table.write(folder, stem)]
    print(f"{', '.join(files)} in {folder}", flush=True)
    return table


def _free(folder: Path, stem: str, records: Sequence[Mapping[str, Any]]) -> str:
    """The stem, or the first with a number that no other test has."""
    same = ("name", "seed", "episodes", "queries", "evaluated")
    of = lambda rows: [{key: row.get(key) for key in same} for row in rows]  # noqa: E731
    for count in itertools.count(1):
        name = stem if count == 1 else f"{stem}-{count}"
        path = folder / f"{name}.json"
        remedy = "remove it, or give another --workdir"
        if not path.exists() or of(read_json(path, list[Any], remedy)) == of(records):
            return name
    raise AssertionError


def _stem(folders: Sequence[Path], options: Options) -> str:
    """Another for each test: files that are tested alone are named in it."""
    data, anew = options.data, options.retest
    parts = [
        *(path.stem for path in folders if not path.is_dir()),
        f"{data.way}w{data.shot}s",
        anew.query_norm,
        anew.num_test_steps and f"{anew.num_test_steps}steps",
        options.test.test_seed,
    ]
    return "-".join(["evaluation", *(str(part) for part in parts if part is not None)])


def _test_again(
    wanted: Sequence[SavedMethod], source: Source, options: Options
) -> Iterator[Tested]:
    """Test each method, in each mode that is asked for and makes sense."""
    anew = options.retest
    mesh = sharding.task_mesh(num_devices=options.devices.devices)
    for method in wanted:
        params, message = load_saved(method, source.dataset.image_shape)
        if message:
            print(f"note: {message}")
        learned = count_parameters(params, method.spec)
        for mode in modes(method, anew.query_norm):
            evaluation = metalstm.evaluate(
                build_algorithm(spec_for_test(method.spec, mode, anew.num_test_steps)),
                params,
                source.dataset.test,
                source.test,
                num_episodes=options.test.test_episodes,
                seed=options.test.test_seed,
                batch_size=options.test.test_batch,
                mesh=mesh,
            )
            several = anew.query_norm == "all" and mode is not None
            yield Tested(
                f"{method.label} [{mode}]" if several else method.label,
                method.name,
                evaluation,
                mode,
                learned,
                method.meta_training,
            )


def load_saved(
    method: SavedMethod, image_shape: Sequence[int]
) -> tuple[PyTree, str | None]:
    """The best parameters of a saved method, and what had to be skipped."""
    if method.folder.suffix == ".npz":
        return metalstm.load(method.folder).params, None
    checkpoint = method.folder / checkpoint_of(method.name)
    return load_params(checkpoint, method.spec, image_shape)


def _without_mode(one: Tested) -> str:
    return one.name.removesuffix(f" [{one.batch_norm}]")


def spec_for_test(
    spec: Spec, mode: str | None, num_test_steps: int | None = None
) -> Spec:
    """The spec for a test in a batch-norm mode, by so many updates if given."""
    spec = copy.deepcopy(spec)
    adapting = _adapting(spec)
    given = {"query_norm": mode, "num_test_steps": num_test_steps}
    for name, value in given.items():
        if value is not None and name in adapting:
            adapting[name] = value
    return spec


def _adapting(spec: Spec) -> dict[str, Any]:
    """The part of a spec that says how a task is adapted to."""
    return spec.get("of", spec)


def modes(method: SavedMethod, query_norm: str | None) -> list[str | None]:
    """The batch-norm modes that make sense for a method, of those asked for.

    Raises:
      ValueError: frozen, of a method that gathered no averages.
    """
    spec = method.spec
    query_norm = query_norm or getattr(method.options.method, "query_norm", "frozen")
    if results.batch_norm_of(spec, query_norm) is None:
        return [None]
    if spec["algorithm"] in (*COMPARING, "mann"):
        return ["frozen"]
    frozen = spec.get("of", spec).get("train_query_norm") == "frozen"
    if query_norm == "frozen" and not frozen:
        raise ValueError(
            f"--query-norm frozen: {method.label} was meta-trained with the support "
            "set's statistics and has no averages; choose support, support+1 or "
            "transductive"
        )
    if query_norm != "all":
        return [query_norm]
    return ["support", "support+1", "transductive", *(["frozen"] if frozen else [])]
