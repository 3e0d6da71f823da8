"""A study that is one file: its options, its run folder, its tables and figures.

A study's module ends with

    STUDY = Study("gates", Config(), run, __doc__)
    main = STUDY.main

where ``run(config, folder)`` does what is not in the run folder yet (`kept`), and
returns what is to be printed and written.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import optax

import metalstm
from experiments.common import cli, report
from experiments.common.compiled_programs import keep_compiled_programs
from experiments.common.run_folder import (
    free_folder,
    locked,
    refuse_other_data,
    write_json,
)
from experiments.common.saved_options import read_config, to_json, value_of
from experiments.common.script_end import exit_status
from experiments.common.tables import Table
from metalstm import data
from metalstm.data.cache import cached
from metalstm.meta.evaluation import Evaluation
from metalstm.runtime.array_files import digest_of, named_leaves
from metalstm.runtime.files import atomic_write

__all__ = [
    "CharacterOptions", "Made", "Study", "StudyOptions", "digest", "kept",
    "meta_train", "note_data", "tester",
]  # fmt: skip

Kept = TypeVar("Kept", bound=Any)


class StudyOptions(cli.Options, frozen=True, kw_only=True):
    """What every study has."""

    seed: cli.Natural = 0
    """Of all that is drawn: starts, tasks, episodes, pairs."""
    preset: str | None = None
    """Start from a named recipe; other flags override it."""
    workdir: Path | None = None
    """The run folder; default runs/NAME. What is finished there is kept."""
    debug: bool = False
    """Show tracebacks."""


class CharacterOptions(StudyOptions, frozen=True, kw_only=True):
    """Of a study on episodes of characters."""

    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """glyphs (needs no download) or omniglot on held-out alphabets."""
    data_dir: Path | None = None
    """Where TFDS keeps omniglot; also the environment's TFDS_DATA_DIR."""
    way: cli.Pair = 5
    shot: cli.Count = 5

    def load(self) -> data.Dataset:
        if self.dataset == "glyphs":
            return data.load_glyphs()
        return data.load_omniglot(self.data_dir or os.environ.get("TFDS_DATA_DIR"))


class Made(NamedTuple):
    """What a study has found."""

    tables: Sequence[Table]
    results: Any  # a mapping for results.json
    figures: Mapping[str, Any]  # by the names of their files


@dataclass(frozen=True)
class Study:
    """The command line of a study.

    The same command with the same ``--workdir`` resumes a stopped run, as far as
    ``run`` kept what it had finished.
    """

    name: str  # of its module
    default: Any
    run: Callable[[Any, Path], Made]
    about: str | None
    presets: Mapping[str, str] = field(default_factory=dict)  # flags that come before
    check: Callable[[Any], None] = lambda config: None  # refuses what cannot be
    may_change: Sequence[str] = ()  # options that may differ when a run resumes

    def parse(self, arguments: Sequence[str]) -> Any:
        """Read the flags.

        Raises:
          ValueError: names the flag, its value and what would do.
        """
        module = f"experiments.studies.{self.name}"
        said: dict[str, Any] = {"module": module, "description": self.about}
        default, preset = self.default, value_of("--preset", arguments)
        if preset is not None:
            if not self.presets:
                raise ValueError(f"--preset {preset}: this study has none; drop it")
            cli.check_names("--preset", [preset], self.presets)
            default = cli.parse(default, self.presets[preset].split(), **said)
        config = cli.parse(default, arguments, **said)
        self.check(config)
        return config

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command line; return the exit status: 2 for a mistake."""
        folder: Path | None = None

        def body(arguments: list[str]) -> None:
            nonlocal folder
            config = self.parse(arguments)
            folder = config.workdir or free_folder(Path("runs") / self.name)
            changeable = (*self.may_change, "preset", "workdir", "debug", "data_dir")
            keep_compiled_programs()
            with locked(folder, config, changeable):
                kept_data = _data_of(folder)
                write_json(
                    folder / "config.json", {"config": to_json(config), **kept_data}
                )
                _write(folder, config, self.run(config, folder))

        def stopped() -> str:
            return f"stopped; to resume: the same with --workdir {folder}"

        return exit_status(body, arguments, stopped=stopped)


def note_data(folder: Path, about: Mapping[str, Any]) -> None:
    """Write into config.json what the kept results are of, before the first is used.

    Args:
      about: plain data, such as a checksum, by name.

    Raises:
      ConfigMismatch: the run in ``folder`` began with another.
    """
    refuse_other_data(folder, about)
    document = read_config(folder)
    noted = document.get("data", {}) | dict(about)
    write_json(folder / "config.json", document | {"data": noted})


def digest(params: Any) -> str:
    """Of the arrays of meta-parameters, for `note_data`."""
    arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}
    return digest_of({}, arrays)[:16]


def _data_of(folder: Path) -> dict[str, Any]:
    """What `note_data` wrote before this run was stopped."""
    if not (folder / "config.json").exists():
        return {}
    document = read_config(folder)
    return {"data": document["data"]} if "data" in document else {}


def kept(path: Path, kind: type[Kept], make: Callable[[], Kept]) -> Kept:
    """Read a NamedTuple of arrays; make and write it if it is not there."""
    arrays = cached(
        path,
        lambda: {name: np.asarray(value) for name, value in make()._asdict().items()},
        remedy="choose another --workdir",
    )
    return kind(**arrays)


def tester(
    algorithm: metalstm.MetaAlgorithm,
    spec: data.EpisodeSpec,
    dataset: data.Dataset,
    config: Any,
) -> Callable[..., Evaluation]:
    """Compile once ``(meta-parameters, split) -> Evaluation``.

    Every call sees the same ``config.SPLIT_episodes`` episodes.
    """
    evaluate = metalstm.make_evaluate(algorithm, spec, batch_size=10)

    def test(params: Any, split: str = "test") -> Evaluation:
        number, pool = getattr(config, f"{split}_episodes"), dataset.pool(split)
        return evaluate(
            params, pool, num_episodes=number, split=split, seed=config.seed
        )

    return test


def meta_train(
    algorithm: metalstm.MetaAlgorithm,
    optimizer: optax.GradientTransformation,
    spec: data.EpisodeSpec,
    pool: Any,
    *,
    num_steps: int,
    num_tasks: int,
    seed: int,
) -> Any:
    """Return the meta-parameters after ``num_steps``; say four times how it goes."""

    def say(step: int, means: Mapping[str, float]) -> None:
        loss, accuracy = means["loss"], means["accuracy"]
        print(f"  step {step:5d}  loss {loss:.3f}  acc {accuracy:.3f}", flush=True)

    episode = spec.sample(jax.random.key(0), pool)
    start = metalstm.init_train_state(algorithm, optimizer, seed, episode)
    state = metalstm.fit(
        metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=num_tasks),
        metalstm.init_fit_state(start),
        pool,
        num_steps=num_steps,
        report=say,
        report_every=max(num_steps // 4, 1),
    )
    return state.train.params


def _write(folder: Path, config: StudyOptions, made: Made) -> None:
    """Print the tables; write table.md, results.json and the figures."""
    text = "\n".join(table.markdown().lstrip() for table in made.tables)
    with atomic_write(folder / "table.md") as part:
        part.write_text(text)
    settings = to_json(config)
    for name in ("workdir", "data_dir", "debug"):  # they do not change the result
        settings.pop(name, None)
    document = {
        "config": settings,
        **made.results,
        "versions": report.versions(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    write_json(folder / "results.json", document)
    for name, figure in made.figures.items():
        report.save_figure(figure, folder / name)
    print(*made.tables, sep="\n\n")
    written = ["table.md", "results.json", *made.figures]
    print(textwrap.fill(report.ending(folder, written), break_on_hyphens=False))
