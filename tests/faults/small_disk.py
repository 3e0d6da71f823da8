"""Fill the disk at a folder and write checkpoints; see `run_folders.small_disk`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from .outcomes import Outcome, require
from .writers import _read_checkpoint, _write_checkpoint


def main(folder: Path) -> None:
    checkpoints, filler = folder / "checkpoints", folder / "filler"
    version, refused = 2, 0
    for first in (1, 2):
        _write_checkpoint(checkpoints, first)
    outcome = Outcome("", "")
    for room in range(0, 96 * 1024, 4096):
        _fill(filler, folder, room)
        with outcome.trial(f"{room} bytes free"):
            try:
                _write_checkpoint(checkpoints, version + 1)
                version += 1
            except OSError as error:
                refused += 1
                require("cannot be written" in str(error), str(error))
            require(_read_checkpoint(checkpoints) == version, "the newest is lost")
        filler.unlink()
        with outcome.trial(f"again, after {room} bytes"):
            _write_checkpoint(checkpoints, version + 1)
            version += 1
            require(_read_checkpoint(checkpoints) == version, "it is not written")
    print("tried", outcome.tried)
    print("refused", refused)
    for one in outcome.lost:
        print("lost", one)


def _fill(filler: Path, folder: Path, room: int) -> None:
    """Leave about ``room`` bytes."""
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    filler.write_bytes(bytes(max(0, free - room)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
