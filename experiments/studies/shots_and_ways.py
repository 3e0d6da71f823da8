"""How does accuracy grow with the shots, and fall with the ways?

Claim: methods differ in how they use more examples and stand more classes than they
were meta-trained with (Snell et al., 2017; Chen et al., 2019). Every saved method is
tested as it is, without meta-training anew, on the same episodes.

    python -m experiments.studies.shots_and_ways RUN [RUN ...]
    python -m experiments.studies.shots_and_ways RUN --shots 1 5 20 --ways 5 20

On a CPU core some seconds a method and point. Expected: all methods gain from shots,
and those that compare with class means lose least with the ways.
docs/results/omniglot.md has a figure.

Writes shots_and_ways.json after each point, so that the same command resumes where it
was stopped, then accuracy_vs_shot.png and accuracy_vs_way.png. A head that fixes the
number of classes is omitted at other ways, and a point for which a class has too few
images, or the test too few classes, is omitted for all; both are said.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

import metalstm
from experiments.common import cli, report
from experiments.common.cli import Count, Names, Natural, Pair
from experiments.common.run_folder import write_json
from experiments.common.study import Study
from experiments.few_shot.data import Source, load_source
from experiments.few_shot.methods import METHODS
from experiments.few_shot.results import REFERENCE
from experiments.few_shot.saved_runs import (
    SavedMethod,
    choose_methods,
    names_in,
    read_runs,
    refuse_other_images,
)
from experiments.few_shot.test import load_saved, modes, spec_for_test
from metalstm import data, plots
from metalstm.data import EpisodeSpec
from metalstm.specs import build_algorithm, fixed_way

NAME = "shots_and_ways.json"


class Config(cli.Options, frozen=True):
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
    test_seed: Natural = 0
    """Which episodes."""
    data_dir: Path | None = None
    """Where the data set is; default: where it was in the first run."""
    workdir: Path | None = None
    """Where to write; default: the first run's folder."""
    debug: bool = False
    """Show tracebacks."""


def check(config: Config) -> None:
    if not config.runs:
        raise ValueError("name at least one run folder")


class Point(NamedTuple):
    way: int
    shot: int

    def __str__(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


def run(config: Config) -> None:
    """Test what is not tested yet, and draw."""
    runs = read_runs(config.runs)
    methods = choose_methods(runs, config.algorithms or names_in(runs))
    first = runs[0].options.data
    if config.data_dir is not None:
        first = cli.replace(first, data_dir=config.data_dir)
    source = load_source(first, {})
    refuse_other_images(runs, source)

    at_way, at_shot = config.at_way or first.way, config.at_shot or first.shot
    queries = config.queries or first.queries
    by_shot = [Point(at_way, shot) for shot in sorted(set(config.shots))]
    by_way = [Point(way, at_shot) for way in sorted(set(config.ways))]

    folder = config.workdir or config.runs[0]
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "runs": [str(path) for path in config.runs],
        "checksum": source.describe()["checksum"],
        "queries": queries,
        "test_episodes": config.test_episodes,
        "test_seed": config.test_seed,
    }
    found = _resumed(folder / NAME, settings)
    rows = found["points"]
    for point in dict.fromkeys([*by_shot, *by_way]):
        spec = _episodes(source, point, queries)
        tested = {row["method"] for row in rows if (row["way"], row["shot"]) == point}
        left = [method for method in methods if method.label not in tested]
        if isinstance(spec, str):
            print(f"{point} omitted: {spec}", flush=True)
            continue
        if spec.queries < queries:
            print(f"{point}: {spec.queries} queries a class, no more images")
        for method in left:
            way = fixed_way(method.spec)
            if way not in (None, point.way):
                about = f"its head has {way} classes"
                print(f"{point}, {method.label} omitted: {about}", flush=True)
                continue
            rows.append(_test(method, spec, source, config))
            write_json(folder / NAME, found)
    for axis, points in (("shot", by_shot), ("way", by_way)):
        chosen = [row for row in rows if (row["way"], row["shot"]) in points]
        if chosen:
            figure = _figure(axis, points, chosen)
            name = report.save_figure(figure, folder / f"accuracy_vs_{axis}.png")
            print(f"{name} in {folder}", flush=True)


def _resumed(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not path.exists():
        return {"settings": settings, "points": []}
    found = json.loads(path.read_text())
    other = [name for name in settings if found["settings"].get(name) != settings[name]]
    if other:
        name = other[0]
        raise ValueError(
            f"{path} holds points with {name} {found['settings'].get(name)}, not "
            f"{settings[name]}: give another --workdir, or remove it"
        )
    return found


def _test(
    method: SavedMethod, spec: EpisodeSpec, source: Source, config: Config
) -> dict[str, Any]:
    mode = modes(method, None)[0]
    params, _ = load_saved(method, source)
    evaluation = metalstm.evaluate(
        build_algorithm(spec_for_test(method.spec, mode)),
        params,
        source.dataset.test,
        spec,
        num_episodes=config.test_episodes,
        seed=config.test_seed,
        batch_size=config.test_batch,
    )
    print(f"{Point(spec.way, spec.shot)}, {method.label}: {evaluation}", flush=True)
    return {
        "method": method.label,
        "family": METHODS[method.name].family,
        "way": spec.way,
        "shot": spec.shot,
        "queries": spec.queries,
        "batch_norm": mode,
        "mean": evaluation.mean,
        "ci95": evaluation.ci95,
    }


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
    of_runs="the same command resumes from here",
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
