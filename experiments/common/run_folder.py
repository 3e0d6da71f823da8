"""One run, one folder: its options, its lock, its metrics, its results."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from experiments.common.saved_options import read_config, to_json

__all__ = [
    "Metrics",
    "free_folder",
    "locked",
    "refuse_other_data",
    "refuse_other_runs",
    "write_json",
]


def free_folder(base: Path) -> Path:
    """``base``, or with the first number from 2 on under which there is nothing."""
    folder, number = base, 1
    while folder.exists():
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    from metalstm.runtime import processes

    return Path(processes.from_main(str(folder)))


def refuse_other_runs(folder: Path, config: Any, may_change: Iterable[str]) -> None:
    """Check, without writing, that this run may use ``folder``.

    Of several processes the first does.

    Args:
      may_change: options in which this run may differ from the one in the folder.

    Raises:
      ConfigMismatch: the folder holds a run of another configuration.
      ValueError: another process is running there, or it holds something else.
    """

    from metalstm.runtime import processes

    def check() -> None:
        _check_contents(folder, config, may_change)
        if (folder / "lock").exists():
            _lock(folder).release()

    processes.on_main(check)


def _check_contents(
    folder: Path,
    config: Any,
    may_change: Iterable[str],
    flag: str = "--workdir",
    known: str = "lock",
) -> None:
    from metalstm.runtime.saved_config import check_config

    if (folder / "config.json").exists():
        check_config(
            read_config(folder)["config"],
            to_json(config),
            ignore=may_change,
            what=f"{folder} holds another run",
            remedy=f"give the same options, or another {flag}",
        )
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: choose another {flag}")
    elif folder.exists() and not all(
        path.match(known) or _before_config(path) for path in folder.iterdir()
    ):
        raise ValueError(
            f"{folder} is not empty and holds no run: choose another {flag}"
        )


def _before_config(path: Path) -> bool:
    """Whether a run leaves it that is killed before it has written its config."""
    from metalstm.runtime.files import is_unfinished

    return path.name == "lock" or is_unfinished(path.name, "config.json")


def refuse_other_data(folder: Path, about: Mapping[str, Any]) -> None:
    """Check, before config.json is written again, that a run resumes with its data.

    Args:
      about: what config.json is to say of the data, with their checksum.

    Raises:
      ConfigMismatch: the run in ``folder`` began with other data.
    """
    from metalstm.runtime.saved_config import check_config

    if not (folder / "config.json").exists():
        return
    saved = read_config(folder).get("data", {})
    # a field that was added since then is no contradiction
    common = about.keys() & saved.keys()
    check_config(
        {name: saved[name] for name in common},
        {name: about[name] for name in common},
        what=f"{folder} began with other data",
        remedy="put the data back as they were, or choose another --workdir",
    )


@contextlib.contextmanager
def locked(
    folder: Path,
    config: Any = None,
    may_change: Iterable[str] = (),
    *,
    flag: str = "--workdir",
    known: str = "lock",
) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when the process ends.

    Of several processes the first holds it for all.

    Args:
      config, may_change: as for `refuse_other_runs`, checked before anything is written
        there, and again once the folder is held: another run may have come and gone.
      flag: which names the folder.
      known: a pattern of files that may be there before config.json.

    Raises:
      ValueError: another process holds it, or another run has been there.
      OSError: the folder cannot be written.
    """
    from metalstm.runtime import processes

    with contextlib.ExitStack() as stack:

        def check() -> None:
            if config is not None:
                _check_contents(folder, config, may_change, flag, known)

        def hold() -> None:
            check()
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _cannot_be_written(folder, error, flag) from error
            stack.callback(_lock(folder, flag, held=True).release)
            check()

        processes.on_main(hold)
        yield


def _lock(folder: Path, flag: str = "--workdir", *, held: bool = False) -> Any:
    """Take the folder's lock; where it is ``held`` on, it says by which process."""
    from filelock import FileLock, Timeout

    def write_owner(handle: int) -> None:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())

    path = folder / "lock"
    lock = FileLock(path, timeout=0, on_acquired=write_owner if held else None)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"process {path.read_text() or 'unknown'} is running in {folder}: wait for "
            f"it, stop it, or choose another {flag}"
        ) from None
    except OSError as error:
        raise _cannot_be_written(path, error, flag) from error
    return lock


def _cannot_be_written(path: Path, error: OSError, flag: str) -> OSError:
    return OSError(
        f"{path} cannot be written ({error.strerror}): free space on its disk, or "
        f"choose another {flag}"
    )


def write_json(path: Path, value: Any) -> None:
    """Write all of it or nothing; of several processes the first writes.

    JSON has no infinities and no NaN: null stands for them.
    """
    from metalstm.runtime import processes
    from metalstm.runtime.files import atomic_write

    if not processes.is_main():
        return
    data = msgspec.json.encode(value, enc_hook=lambda scalar: scalar.item())
    text = msgspec.json.format(data, indent=1).decode() + "\n"
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
                "disk, or make its folder writable; then resume with --resume"
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

    def curve(self, method: str, kind: str, name: str) -> Any:
        """A method's values of one name, as `metalstm.plots` draws them."""
        import numpy as np

        from metalstm import plots

        mine = [
            (row[self.counter], row[name], row.get("ci95"))
            for row in self.read()
            if (row["method"], row["kind"]) == (method, kind) and name in row
        ]
        counts, values, ci95 = np.array(mine, float).reshape(-1, 3).T
        return plots.Curve(counts, values, None if kind == "train" else ci95)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
