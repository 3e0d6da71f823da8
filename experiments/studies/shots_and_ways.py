"""How does accuracy grow with the shots, and fall with the ways?

Claim: methods differ in how they use more examples and stand more classes than they
were meta-trained with (Snell et al., 2017; Chen et al., 2019). Every saved method is
tested as it is, without meta-training anew, on the same episodes.

    python -m experiments.studies.shots_and_ways RUN [RUN ...]
    python -m experiments.studies.shots_and_ways RUN --shots 1 5 20 --ways 5 20

On a CPU core some seconds a method and point. Expected: all methods gain from shots,
and those that compare with class means lose least with the ways.
docs/results/omniglot.md has a figure.

Each point is kept, so that the same command with the same --workdir resumes, and one
with more runs or points adds them. A head that fixes the number of classes is omitted
at other ways, and a point for which a class has too few images, or the test too few
classes, is omitted for all; both are said.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tyro

import metalstm
from experiments.common.cli import Count, Names, Pair, check_names, replace
from experiments.common.study import Made, Study, StudyOptions, digest, kept, note_data
from experiments.common.tables import Table
from experiments.few_shot import saved_runs
from experiments.few_shot.data import Source, load_source
from experiments.few_shot.methods import METHODS
from experiments.few_shot.results import REFERENCE
from experiments.few_shot.test import load_saved, modes, spec_for_test
from metalstm import data, plots
from metalstm.data import EpisodeSpec
from metalstm.specs import build_algorithm, fixed_way
from metalstm.statistics import mean_and_ci95


class Config(StudyOptions, frozen=True, kw_only=True):
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of finished few_shot runs on one data set."""
    shots: tuple[Count, ...] = (1, 2, 3, 5, 10, 20)
    """Support images of each class, at --at-way."""
    ways: tuple[Pair, ...] = (5, 10, 20, 50)
    """Classes of an episode, at --at-shot."""
    at_way: Pair | None = None
    """Default: the first run's."""
    at_shot: Count | None = None
    """Default: the first run's."""
    queries: Count | None = None
    """Query images of each class; fewer where a class has not so many. Default: the
    first run's."""
    algorithms: Names = ()
    """Default: all methods of the runs."""
    test_episodes: Pair = 200
    """Episodes of each point, the same for every method."""
    test_batch: Count = 8
    """Of these, how many at once."""
    data_dir: Path | None = None
    """Where the data set is; default: where it was in the first run."""


class Point(NamedTuple):
    way: int
    shot: int

    def __str__(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


class Tested(NamedTuple):
    accuracies: np.ndarray  # [episodes]


def check(config: Config) -> None:
    if not config.runs:
        raise ValueError("name at least one run folder")
    names = saved_runs.names_in(saved_runs.read_runs(config.runs))
    check_names("--algorithms", config.algorithms, names)


def _methods(config: Config) -> list[saved_runs.SavedMethod]:
    runs = saved_runs.read_runs(config.runs)
    names = config.algorithms or saved_runs.names_in(runs)
    return saved_runs.choose_methods(runs, names)


def run(config: Config, folder: Path) -> Made:
    """Test what is not tested yet, and draw."""
    runs, methods = saved_runs.read_runs(config.runs), _methods(config)
    first = runs[0].options.data
    source = load_source(replace(first, data_dir=config.data_dir or first.data_dir), {})
    saved_runs.refuse_other_images(runs, source)

    at_way, at_shot = config.at_way or first.way, config.at_shot or first.shot
    queries = config.queries or first.queries
    by_shot = [Point(at_way, shot) for shot in sorted(set(config.shots))]
    by_way = [Point(way, at_shot) for way in sorted(set(config.ways))]
    params = {
        one.label: load_saved(one, source.dataset.image_shape)[0] for one in methods
    }
    note_data(
        folder,
        {"checksum": source.dataset.checksum, "queries": queries}
        | {f"parameters of {label}": digest(one) for label, one in params.items()},
    )
    rows: list[dict[str, Any]] = []
    for point in dict.fromkeys([*by_shot, *by_way]):
        spec = _episodes(source, point, queries)
        if isinstance(spec, str):
            print(f"{point} omitted: {spec}", flush=True)
            continue
        if spec.queries < queries:
            print(f"{point}: {spec.queries} queries a class, no more images")
        for method in methods:
            way = fixed_way(method.spec)
            if way not in (None, point.way):
                about = f"its head has {way} classes"
                print(f"{point}, {method.label} omitted: {about}", flush=True)
                continue
            mode = modes(method, None)[0]

            def test(method=method, mode=mode, spec=spec) -> Tested:
                evaluation = metalstm.evaluate(
                    build_algorithm(spec_for_test(method.spec, mode)),
                    params[method.label],
                    source.dataset.test,
                    spec,
                    num_episodes=config.test_episodes,
                    seed=config.seed,
                    batch_size=config.test_batch,
                )
                print(f"{spec.way}-way {spec.shot}-shot, {method.label}: {evaluation}")
                return Tested(evaluation.accuracies)

            file = f"{point} {method.label}".replace("/", "-")
            found = kept(folder / "points" / f"{file}.npz", Tested, test)
            row: dict[str, Any] = {
                "method": method.label,
                "family": METHODS[method.name].family,
            }
            row |= {**point._asdict(), "queries": spec.queries, "batch_norm": mode}
            mean, ci95 = mean_and_ci95(found.accuracies)
            rows.append(row | {"mean": mean, "ci95": ci95})
    figures = {}
    for axis, points in (("shot", by_shot), ("way", by_way)):
        chosen = [row for row in rows if (row["way"], row["shot"]) in points]
        if chosen:
            figures[f"accuracy_vs_{axis}.png"] = _figure(axis, points, chosen)
    return Made([_table(rows)], {"points": rows}, figures)


def _episodes(source: Source, point: Point, queries: int) -> EpisodeSpec | str:
    """The episodes of a point, with as many queries as there are, or why not."""
    why = ""
    for fewer in range(queries, 0, -1):
        spec = dataclasses.replace(source.test, **point._asdict(), queries=fewer)
        try:
            data.validate(spec, source.dataset, "test")
        except ValueError as error:
            why = str(error)
        else:
            return spec
    return why


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    points = dict.fromkeys(Point(row["way"], row["shot"]) for row in rows)
    cells: dict[str, dict[Point, str]] = {}
    for row in rows:
        text = f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}"
        cells.setdefault(row["method"], {})[Point(row["way"], row["shot"])] = text
    lines = [[name, *(own.get(p, "") for p in points)] for name, own in cells.items()]
    return Table("accuracy, % (95% CI)", ["method", *map(str, points)], lines)


def _figure(axis: str, points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> Any:
    sweeps: dict[str, list[tuple[int, float, float]]] = {}
    for row in sorted(rows, key=lambda row: row[axis]):
        point = row[axis], row["mean"], row["ci95"]
        sweeps.setdefault(row["method"], []).append(point)
    fixed = f"{points[0].way}-way" if axis == "shot" else f"{points[0].shot}-shot"
    return plots.accuracy_sweep(
        sweeps,
        {row["method"]: row["family"] for row in rows},
        xlabel=f"{axis}s",
        title=f"{fixed}, test episodes, 95% CI",
        chance=[(getattr(p, axis), 1 / p.way) for p in points],
        bold=[name for name in sweeps if name.split()[0] == REFERENCE],
    )


STUDY = Study(
    "shots_and_ways",
    Config(),
    run,
    __doc__,
    check=check,
    may_change=(
        "runs",
        "algorithms",
        "shots",
        "ways",
        "at_way",
        "at_shot",
        "test_batch",
    ),
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
