"""One run, one folder: its config, its lock, its metrics, its results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from experiments.common import devices
from experiments.common.saved_options import read_config, to_json


def free_folder(base: Path) -> Path:
    """``base``, or with the first number from 2 on under which there is nothing."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    if devices.is_one_of_several():
        from metalstm.runtime import processes

        return Path(processes.from_main(str(folder)))
    return folder


def refuse_other_runs(folder: Path, config: Any, ignore: Iterable[str]) -> None:
    """Check, without writing, that this run may use ``folder``.

    Of several processes the first does.

    Args:
      ignore: options in which this run may differ from the one in the folder.

    Raises:
      ConfigMismatch: the folder holds a run of another configuration.
      ValueError: another process is running there, or it holds something else.
    """

    def check() -> None:
        _check_contents(folder, config, ignore)
        with contextlib.suppress(FileNotFoundError), open(folder / "lock") as lock:
            _take(lock, folder)

    devices.on_main(check)


def _check_contents(folder: Path, config: Any, ignore: Iterable[str]) -> None:
    from metalstm.runtime.saved_config import ConfigMismatch, check_config

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
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another --workdir")
    elif folder.exists() and not all(map(_before_config, folder.iterdir())):
        raise ValueError(
            f"{folder} is not empty and holds no run: choose another --workdir"
        )


def _before_config(path: Path) -> bool:
    """Whether a run leaves it that is killed before it has written its config."""
    from metalstm.runtime.files import is_unfinished

    return path.name == "lock" or is_unfinished(path.name, "config.json")


def refuse_other_data(folder: Path, about: Mapping[str, Any]) -> None:
    """Check, before config.json is written again, that a run goes on with its data.

    Args:
      about: what config.json is to say of the data, with their checksum.

    Raises:
      ConfigMismatch: the run in ``folder`` began with other data.
    """
    from metalstm.runtime.saved_config import ConfigMismatch, check_config

    if not (folder / "config.json").exists():
        return
    saved = read_config(folder).get("data", {})
    # a field that was added since then is no contradiction
    shared = {name: value for name, value in about.items() if name in saved}
    try:
        check_config({name: saved[name] for name in shared}, shared)
    except ConfigMismatch as error:
        raise ConfigMismatch(
            f"{folder} began with other data: {error}".replace(
                "the saved config differs:", ""
            ).replace(
                "use the saved values, or another folder",
                "put the data back as they were, or choose another --workdir",
            )
        ) from None


@contextlib.contextmanager
def locked(
    folder: Path, config: Any = None, ignore: Iterable[str] = ()
) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when the process ends.

    Of several processes the first holds it for all.

    Args:
      config, ignore: as for `refuse_other_runs`, checked again once the folder is held:
        since the first time another run may have come and gone.

    Raises:
      ValueError: another process holds it, or another run has been there.
      OSError: the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        hold = _held(folder, config, ignore)
        devices.on_main(lambda: stack.enter_context(hold))
        yield


@contextlib.contextmanager
def _held(folder: Path, config: Any, ignore: Iterable[str]) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")  # noqa: SIM115 (its errors are not those below)
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): choose another --workdir"
        ) from error
    with lock:
        _take(lock, folder)
        if config is not None:
            _check_contents(folder, config, ignore)
        try:
            lock.truncate(0)
            # not buffered: a full disk would make closing it fail as well
            os.write(lock.fileno(), str(os.getpid()).encode())
        except OSError as error:
            raise OSError(
                f"{folder / 'lock'} cannot be written ({error.strerror}): free space "
                "on its disk, or choose another --workdir"
            ) from error
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
    """Write all of it or nothing; of several processes the first writes."""
    from metalstm.runtime import processes
    from metalstm.runtime.files import atomic_write

    if not processes.is_main():
        return
    text = json.dumps(value, indent=1) + "\n"
    with atomic_write(path) as part:
        part.write_text(text)


class Metrics:
    """Lines of metrics.jsonl, and TensorBoard when asked for.

    ``counter`` names what a row counts: episodes, or meta-steps.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool = False, counter: str = "episode"
    ):
        from metalstm.runtime import processes

        self.path, self.counter = folder / "metrics.jsonl", counter
        self.writes = processes.is_main()
        self._writer = None
        if tensorboard and self.writes:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, method: str, count: int) -> None:
        """Drop what a killed run wrote about ``method`` after ``count``."""
        from metalstm.runtime.files import atomic_write

        if not self.writes:
            return
        rows = [
            row
            for row in self.read()
            if row["method"] != method or row[self.counter] <= count
        ]
        with atomic_write(self.path) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, method: str, kind: str, count: int, **values: float) -> None:
        if not self.writes:
            return
        row = {"method": method, "kind": kind, self.counter: count, **values}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path} cannot be written ({error.strerror}): free space on its "
                "disk, or make its folder writable; then go on with --resume"
            ) from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{method}/{kind}/{name}", value, count)

    def read(self) -> list[dict[str, Any]]:
        """All rows but a half-written last one, and lines that are none."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):  # no JSON, or no UTF-8
                row = json.loads(line)
                if isinstance(row, dict) and {"method", "kind", self.counter} <= {*row}:
                    rows.append(row)
        return rows

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
