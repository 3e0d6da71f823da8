"""The methods of finished run folders, to be tested again in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.saved_options import located, read_config
from experiments.few_shot.data import Source
from experiments.few_shot.methods import (
    Spec,
    options_of,
    pretrainings,
    specs_of,
)
from experiments.few_shot.options import Options
from metalstm.runtime import checkpoints


class SavedMethod(NamedTuple):
    label: str  # its name, and of which run where several have it
    name: str
    folder: Path
    spec: Spec
    options: Any  # its own
    meta_training: Mapping[str, Any]  # may be empty


class SavedRun(NamedTuple):
    folder: Path
    options: Options
    specs: dict[str, Spec]
    data: dict[str, Any]


def read_runs(folders: Sequence[Path]) -> list[SavedRun]:
    """Read what the folders hold, or the files of trained methods.

    Raises:
      FileNotFoundError: one is no run folder, or holds a run for each of several seeds.
      ValueError: one is named twice, or damaged.
    """
    runs: list[SavedRun] = []
    for folder in map(located, folders):
        if folder.resolve() in [run.folder.resolve() for run in runs]:
            raise ValueError(f"--evaluate names {folder} twice: drop one")
        saved, options = read_config(folder), options_of(folder)
        seeds = sorted(path.name for path in folder.glob("seed-*"))
        if seeds:
            raise FileNotFoundError(
                f"{folder} holds a run for each of several seeds: give "
                + " or ".join(str(folder / seed) for seed in seeds)
            )
        try:
            specs = specs_of(options, saved["data"]["classes"]["train"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / 'config.json'} is damaged ({type(error).__name__}: {error} "
                "of its data): put a copy of it back"
            ) from None
        if folder.suffix == ".npz" and len(specs) != 1:
            raise ValueError(
                f"{folder} holds one method, and its config has {', '.join(specs)}: "
                "save it with the options of the one"
            )
        runs.append(SavedRun(folder, options, specs, saved["data"]))
    return runs


def choose_methods(runs: Sequence[SavedRun], names: Sequence[str]) -> list[SavedMethod]:
    """The named methods of the runs, run by run.

    A method that several runs have is labelled with the run's folder.

    Raises:
      ValueError: no run has any of them.
    """
    short = short_names([run.folder for run in runs])
    in_runs = [name for run in runs for name in run.specs]
    found = []
    for run, folder in zip(runs, short, strict=True):
        for name in (n for n in run.specs if n in names):
            label = name if in_runs.count(name) == 1 else f"{name} ({folder})"
            own, trained = run.options.methods[name], _meta_training(run, name)
            found.append(
                SavedMethod(label, name, run.folder, run.specs[name], own, trained)
            )
    if not found:
        have = ", ".join(dict.fromkeys(in_runs))
        raise ValueError(f"--algorithms {', '.join(names)}: the runs have {have}")
    return found


def _meta_training(run: SavedRun, name: str) -> Mapping[str, Any]:
    """What was spent on a method, by its checkpoint; it may still be in training."""
    _, uses = pretrainings(run.options, run.specs)
    if run.folder.suffix == ".npz":
        return read_config(run.folder).get("meta_training", {})
    state = run.folder / "checkpoints" / uses.get(name, name) / "state"
    step = checkpoints.latest(state)
    if step is None:
        return {}
    seconds = round(checkpoints.read_metadata(state)["seconds"], 3)
    training = run.options.methods[name].training
    return {"episodes": step * training.meta_batch, "wall_seconds": seconds}


def names_in(runs: Sequence[SavedRun]) -> tuple[str, ...]:
    """The methods that any of the runs has."""
    return tuple(dict.fromkeys(name for run in runs for name in run.specs))


def short_names(folders: Sequence[Path]) -> list[str]:
    """As many of each path's last parts as tell the folders apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(of_one[-depth:]) for of_one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def refuse_other_images(runs: Sequence[SavedRun], source: Source) -> None:
    """Check that one source can serve all runs.

    Raises:
      ValueError: a run was trained on images of another shape or normalisation.
    """
    now = source.describe()
    for run in runs:
        for name in ("image_shape", "normalise"):
            if run.data.get(name) != now[name]:
                raise ValueError(
                    f"{run.folder} was trained with {name} {run.data.get(name)}, and "
                    f"the test has {now[name]}: evaluate it apart"
                )
        if run.data["checksum"] != now["checksum"]:
            print(f"note: the data differ from those of {run.folder} (checksum)")
