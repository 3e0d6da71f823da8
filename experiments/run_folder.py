"""One run, one folder: its config, its lock, its metrics, its results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from experiments.config import Config, read_config, to_json

ROOT = Path("runs") / "few_shot"


def choose_folder(config: Config) -> Path:
    """Where the run goes: as told, or a name that no other run has."""
    if config.run.resume is not None:
        return config.run.resume
    if config.run.workdir is not None:
        return config.run.workdir
    data = config.data
    dataset = data.dataset.replace("tfds:", "").replace("/", "-")
    return free_folder(ROOT / f"{dataset}-{data.way}w{data.shot}s-{config.run.seed}")


def free_folder(base: Path) -> Path:
    """``base``, or with the first number from 2 on under which there is nothing."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def refuse_other_runs(folder: Path, config: Any, ignore: Iterable[str]) -> None:
    """Check, without writing, that this run may use ``folder``.

    Args:
      ignore: options in which this run may differ from the one in the folder.

    Raises:
      ConfigMismatch: the folder holds a run of another configuration.
      ValueError: another process is running there, or it holds something else.
    """
    from metalstm.checkpoints import ConfigMismatch, check_config

    if (folder / "config.json").exists():
        saved = read_config(folder)["config"]
        try:
            check_config(saved, to_json(config), ignore=ignore)
        except ConfigMismatch as error:
            raise ConfigMismatch(
                f"{folder} holds another run: {error}".replace(
                    "use the saved values, or another folder",
                    "give the same options, or another --workdir",
                )
            ) from None
        with contextlib.suppress(FileNotFoundError), open(folder / "lock") as lock:
            _take(lock, folder)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no run: choose another --workdir"
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when the process ends.

    Raises:
      ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as lock:
        _take(lock, folder)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(lock: TextIO, folder: Path) -> None:
    import fcntl

    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read() or "unknown"
        raise ValueError(
            f"process {owner} is running in {folder}: wait for it, stop it, or choose "
            "another --workdir"
        ) from None


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


class Metrics:
    """Lines of metrics.jsonl, and TensorBoard when asked for.

    ``counter`` names what a row counts: episodes, or meta-steps.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool = False, counter: str = "episode"
    ):
        self.path, self.counter = folder / "metrics.jsonl", counter
        self._writer = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, method: str, count: int) -> None:
        """Drop what a killed run wrote about ``method`` after ``count``."""
        rows = [
            row
            for row in self.read()
            if row["method"] != method or row[self.counter] <= count
        ]
        temporary = self.path.with_name(self.path.name + ".part")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, self.path)

    def write(self, method: str, kind: str, count: int, **values: float) -> None:
        row = {"method": method, "kind": kind, self.counter: count, **values}
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{method}/{kind}/{name}", value, count)

    def read(self) -> list[dict[str, Any]]:
        """All rows but a half-written last one."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
