"""How does accuracy grow with the shots, and fall with the ways?

Claim: methods differ in how they use more examples and stand more classes than they
were meta-trained with (Snell et al., 2017; Chen et al., 2019). Every saved method is
tested as it is, without meta-training anew, on the same episodes.

    python -m experiments.studies.shots_and_ways RUN [RUN ...]
    python -m experiments.studies.shots_and_ways RUN --shots 1 5 20 --ways 5 20 --at-shot 5

Writes shots_and_ways.json after each point, so that the same command goes on where it
was stopped, then accuracy_vs_shot.png and accuracy_vs_way.png. A head that fixes the
number of classes is omitted at other ways, and a point for which a class has too few
images, or the test too few classes, is omitted for all; both are said.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.script_end import exit_status

NAME = "shots_and_ways.json"


@dataclass(frozen=True)
class Config:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Folders of finished few_shot runs on one data set."""
    shots: tuple[int, ...] = (1, 2, 3, 5, 10, 20)
    """Support images of each class, at --at-way."""
    ways: tuple[int, ...] = (5, 10, 20, 50)
    """Classes of an episode, at --at-shot."""
    at_way: int | None = None
    """Default: the first run's."""
    at_shot: int | None = None
    """Default: the first run's."""
    queries: int | None = None
    """Query images of each class; fewer where a class has not so many. Default: the
    first run's."""
    algorithms: tuple[str, ...] = ()
    """Default: all methods of the runs."""
    test_episodes: int = 200
    """Episodes of each point, the same for every method."""
    test_batch: int = 8
    """Of these, how many at once."""
    test_seed: int = 0
    """Which episodes."""
    data_dir: Path | None = None
    """Where the data set is; default: where it was in the first run."""
    workdir: Path | None = None
    """Where to write; default: the first run's folder."""
    debug: bool = False
    """Show tracebacks."""


class Point(NamedTuple):
    way: int
    shot: int

    def __str__(self) -> str:
        return f"{self.way}-way {self.shot}-shot"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 2 for a mistake, 130 for Ctrl-C."""

    def body(arguments: list[str]) -> None:
        config = tyro.cli(
            Config,
            args=arguments,
            description=__doc__,
            prog="python -m experiments.studies.shots_and_ways",
        )
        check(config)
        keep_compiled_programs()
        run(config)

    said = "stopped; the same command goes on from here"
    return exit_status(body, arguments, stopped=lambda: said)


def check(config: Config) -> None:
    """Refuse what cannot work, whatever the runs hold.

    Raises:
      ValueError: names the flag, its value and what would do.
    """
    at_least = {
        "shots": 1, "ways": 2, "at_way": 2, "at_shot": 1, "queries": 1,
        "test_episodes": 2, "test_batch": 1, "test_seed": 0,
    }  # fmt: skip
    if not config.runs:
        raise ValueError("name at least one run folder")
    for name, low in at_least.items():
        value = getattr(config, name)
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None and one < low:
                raise ValueError(
                    f"--{name.replace('_', '-')} {one}: choose {low} or more"
                )


def run(config: Config) -> dict[str, Any]:
    """Test what is not tested yet, and draw."""
    from experiments.common.run_folder import write_json
    from experiments.few_shot.data import load_source
    from experiments.few_shot.saved_runs import (
        choose_methods,
        names_in,
        read_runs,
        refuse_other_images,
    )

    runs = read_runs(config.runs)
    methods = choose_methods(runs, config.algorithms or names_in(runs))
    first = runs[0].options.data
    if config.data_dir is not None:
        first = dataclasses.replace(first, data_dir=config.data_dir)
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
    found = _go_on(folder / NAME, settings)
    for point in dict.fromkeys([*by_shot, *by_way]):
        for row in _test(point, queries, methods, source, config, found["points"]):
            found["points"].append(row)
            write_json(folder / NAME, found)
    for name in _draw(folder, found["points"], by_shot, by_way):
        print(f"{name} in {folder}", flush=True)
    return found


def _go_on(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
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
    point: Point,
    queries: int,
    methods: Sequence[Any],
    source: Any,
    config: Config,
    known: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each method that has none at this point yet."""
    import metalstm
    from experiments.few_shot.methods import METHODS
    from experiments.few_shot.test import load_saved, modes, spec_for_test
    from metalstm.specs import build_algorithm, fixed_way

    done = {row["method"] for row in known if (row["way"], row["shot"]) == point}
    spec = _episodes(source, point, queries)
    if isinstance(spec, str):
        print(f"{point} omitted: {spec}", flush=True)
        return
    if spec.queries < queries:
        print(f"{point}: {spec.queries} queries a class, no more images", flush=True)
    for method in methods:
        if method.label in done:
            continue
        if fixed_way(method.spec) not in (None, point.way):
            fixed = f"its head has {fixed_way(method.spec)} classes"
            print(f"{point}, {method.label} omitted: {fixed}", flush=True)
            continue
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
        print(f"{point}, {method.label}: {evaluation}", flush=True)
        yield {
            "method": method.label,
            "family": METHODS[method.name].family,
            "way": point.way,
            "shot": point.shot,
            "queries": spec.queries,
            "batch_norm": mode,
            "mean": evaluation.mean,
            "ci95": evaluation.ci95,
        }


def _episodes(source: Any, point: Point, queries: int) -> Any:
    """The episodes of a point, with as many queries as there are, or why not."""
    from metalstm import data

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


def _draw(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    by_shot: Sequence[Point],
    by_way: Sequence[Point],
) -> Iterator[str]:
    from experiments.few_shot.results import REFERENCE
    from metalstm import plots

    families = {row["method"]: row["family"] for row in rows}
    for points, axis in ((by_shot, "shot"), (by_way, "way")):
        sweeps: dict[str, list[tuple[int, float, float]]] = {}
        for row in rows:
            if (row["way"], row["shot"]) in points:
                of_method = sweeps.setdefault(row["method"], [])
                of_method.append((row[axis], row["mean"], row["ci95"]))
        if not sweeps:
            continue
        fixed = f"{points[0].way}-way" if axis == "shot" else f"{points[0].shot}-shot"
        figure = plots.accuracy_sweep(
            {name: sorted(of_method) for name, of_method in sweeps.items()},
            families,
            xlabel=f"{axis}s",
            title=f"{fixed}, test episodes, 95% CI",
            chance=[(getattr(p, axis), 1 / p.way) for p in points],
            bold=[name for name in sweeps if name.split()[0] == REFERENCE],
        )
        figure.savefig(folder / f"accuracy_vs_{axis}.png")
        yield f"accuracy_vs_{axis}.png"


if __name__ == "__main__":
    sys.exit(main())
