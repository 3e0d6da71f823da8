"""What is done to a run's folder from outside, through the scripts themselves."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .damage import damages
from .outcomes import Outcome, require
from .scripts import (
    FEW_SHOT,
    ROOT,
    Place,
    Script,
    errors,
    listing,
    main_of,
    require_same,
)

# Permissions do not hold the superuser back: it gives up CAP_DAC_OVERRIDE and
# CAP_DAC_READ_SEARCH (prctl's PR_CAPBSET_DROP), which the next exec takes away.
_NO_SUPERUSER = """
import ctypes, os
if os.getuid() == 0:
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(24, capability)
"""
_AT_MOST = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


def two_at_once(script: Script, folder: Path, *, tries: int) -> list[Outcome]:
    """Start two processes with one folder, the second a little later or not."""
    place, rng = Place(script, folder), random.Random(0)
    whole = place.whole()
    outcome = Outcome(
        f"two runs of {script.name} in one folder at once",
        "one is refused, with the other's process, or resumes from what the other has "
        "finished; the result is that of one run",
    )
    refused = 0
    for n in range(tries):
        workdir = folder / f"both-{n}"
        with outcome.trial(f"try {n}"):
            first = place.start(*place.new(workdir))
            time.sleep(rng.uniform(0, 2) * (n % 2))
            second = place.start(*place.new(workdir))
            said = [p.communicate(timeout=900)[0] for p in (first, second)]
            codes = sorted(p.returncode for p in (first, second))
            require(codes in ([0, 0], [0, 2]), f"statuses {codes}: {said}")
            if codes == [0, 2]:
                refused += 1
                loser = said[0] if first.returncode else said[1]
                winner = second.pid if first.returncode else first.pid
                require(f"process {winner} is running in" in loser, loser)
            require_same(script, workdir, whole)
        shutil.rmtree(workdir, ignore_errors=True)
    outcome.note = f"{refused} refused"
    return [outcome]


def read_only(script: Script, folder: Path) -> list[Outcome]:
    """A new run below a folder that cannot be written, and resuming in one."""
    place = Place(script, folder)
    whole = place.whole()
    outcome = Outcome(
        f"read-only folder for {script.name}",
        "it is refused and named; nothing in it has changed",
    )
    closed = folder / "closed"
    shutil.copytree(whole, closed / "run")
    for path in [closed, *closed.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for name, line in (
        ("a new run", place.new(closed / "new")),
        ("resuming", ["--resume", str(closed / "run")]),
    ):
        before = listing(closed)
        with outcome.trial(name):
            code, said = place.finish(*line, before=_NO_SUPERUSER)
            require(code == 2, f"status {code}: {said}")
            (error,) = errors(said)
            require("cannot be written (Permission denied)" in error, error)
            require("choose another --workdir" in error, error)
            require(listing(closed) == before, "something was written")
    for path in [closed, *closed.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(closed)
    return [outcome]


def contradictions(script: Script, folder: Path) -> list[Outcome]:
    """Options and data that are not those of the run in the folder."""
    place = Place(script, folder)
    whole = place.whole()
    outcome = Outcome(
        f"{script.name} with options or data that contradict the run",
        "it is refused and the difference shown; nothing has changed",
    )
    before = listing(whole)
    for flag, name, value in script.contradictions:
        for line in (["--resume", str(whole)], place.new(whole)):
            with outcome.trial(f"{line[0]} {flag} {value}"):
                code, said = _in_process(script, [*line, flag, *value.split()])
                require(code == 2, f"status {code}: {said}")
                require(f"{name}: saved " in said, said)
                require(", now " in said, said)
                require(listing(whole) == before, "something was written")
    if script is FEW_SHOT:
        with outcome.trial("a picture was taken away"):
            picture = folder / "images" / "train" / "train0" / "0.png"
            content = picture.read_bytes()
            picture.unlink()
            try:
                code, said = place.finish("--resume", str(whole))
            finally:
                picture.write_bytes(content)
            require(code == 2, f"status {code}: {said}")
            require("began with other data" in said, said)
            require("checksum: saved " in said, said)
            after = listing(whole)
            require(_changed(before, after) <= {"lock"}, "something was written")
    return [outcome]


def _changed(before: dict, after: dict) -> set[str]:
    return {n for n in before.keys() | after.keys() if before.get(n) != after.get(n)}


def _in_process(script: Script, line: list[str]) -> tuple[int, str]:
    """Run the script's main here: it ends before it has computed anything."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main_of(script)(line)
    return code, said.getvalue()


def disk_full(script: Script, folder: Path, *, limits: int) -> list[Outcome]:
    """No file may grow beyond a size: first the config, later the metrics."""
    place = Place(script, folder)
    whole = place.whole()
    outcome = Outcome(
        f"disk full during {script.name}",
        "it stops and names the file and what to do; with space again it resumes to "
        "the undisturbed run's result",
    )
    sizes = {
        p.stat().st_size
        for p in whole.rglob("*")
        if p.suffix in (".json", ".jsonl", ".npz", "") and p.is_file()
    }
    chosen = sorted(sizes)[:: max(1, len(sizes) // limits)][:limits]
    for limit in chosen:
        workdir = folder / f"full-{limit}"
        with outcome.trial(f"files of at most {limit - 1} bytes"):
            line, limited = place.new(workdir), _AT_MOST.format(limit - 1)
            code, said = place.finish(*line, before=limited)
            if code != 0:  # no file grew as large
                require(code == 2, f"status {code}: {said}")
                require("cannot be written" in said, said)
                code, said = place.finish(*place.go_on(workdir))
            require(code == 0, f"it does not resume: {said[-500:]}")
            require_same(script, workdir, whole)
        shutil.rmtree(workdir, ignore_errors=True)
    return [outcome]


def damaged_run(script: Script, folder: Path, *, tries: int) -> list[Outcome]:
    """Damage a finished run's newest checkpoint and its best, and resume."""
    place, rng = Place(script, folder), random.Random(0)
    whole = place.whole()
    outcome = Outcome(
        f"newest checkpoint of {script.name} damaged, then --resume",
        "it falls back to the one before, says so, and ends as the undisturbed run",
    )
    for n in range(tries):
        workdir = folder / f"damaged-{n}"
        shutil.copytree(whole, workdir)
        which = ("state", "best")[n % 2]
        path = workdir / "checkpoints" / script.method / which
        newest = max((p for p in path.iterdir()), key=lambda p: int(p.name))
        victims = [p for p in newest.rglob("*") if p.is_file()]
        victim = max(victims, key=lambda p: (p.stat().st_size, p.name))
        if n >= 2:
            victim = newest / "_CHECKPOINT_METADATA"
        how, data = rng.choice(list(damages(victim.read_bytes(), 4, 4))[:4])
        victim.write_bytes(data)
        with outcome.trial(f"{which}: {victim.name} {how}"):
            code, said = place.finish("--resume", str(workdir))
            require(code == 0, f"it does not resume: {said[-500:]}")
            if which == "state":
                require("cannot be read" in said and "fell back" in said, said)
            require_same(script, workdir, whole)
        shutil.rmtree(workdir, ignore_errors=True)
    return [outcome]


def small_disk(folder: Path) -> list[Outcome]:
    """Checkpoints on a real file system with less and less room."""
    outcome = Outcome(
        "disk really full (a tmpfs) while writing a checkpoint",
        "it is refused and the one before is whole; with space again it is written",
    )
    folder.mkdir(parents=True, exist_ok=True)
    mount = f"mount -t tmpfs -o size=1m tmpfs {folder}"
    program = f"{mount} && exec {sys.executable} -m tests.faults.small_disk {folder}"
    line = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", program]
    try:
        done = subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, timeout=600
        )
    except FileNotFoundError:
        outcome.note = "not tried: there is no unshare here"
        return [outcome]
    if "tried" not in done.stdout:
        outcome.note = f"not tried: {done.stderr.strip().splitlines()[-1:]}"
        return [outcome]
    for text in done.stdout.splitlines():
        kind, _, what = text.partition(" ")
        if kind == "tried":
            outcome.tried = int(what)
        elif kind == "refused":
            outcome.note = f"{what} refused"
        elif kind == "lost":
            outcome.lost.append(what)
    return [outcome]
