"""kill -9 of training at random moments: it resumes as if nothing had happened."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

from .injection import in_child
from .outcomes import Outcome, require
from .scripts import Forked, Place, Script, preload, require_same


def kill(
    script: Script,
    folder: Path,
    *,
    kills: int,
    seed: int = 0,
    minutes: float = float("inf"),
) -> list[Outcome]:
    """Kill runs of ``script`` until it was done ``kills`` times, or ``minutes`` are up.

    A run is killed, resumed and killed again until it ends by itself; then it must be
    the run that was never killed. One kill in six comes at any moment after the start
    of the process, the others after it has taken its folder.
    """
    place, rng = Place(script, folder), random.Random(seed)
    whole = place.whole()  # compiles
    preload(script)
    begun = time.time()
    timed = place.fork(*place.new(folder / "timed"))
    said = timed.wait()
    require(timed.returncode == 0, said)
    start, work = _split_time(folder / "timed", begun, time.time())
    outcome = Outcome(
        f"kill -9 of {script.name} at a random moment",
        "it resumes; parameters, metrics and results are bit for bit those of the "
        f"undisturbed run; at most {script.save_every} {script.counter}s are lost",
    )
    most_lost, run, resumed = 0, 0, 0
    until = time.monotonic() + 60 * minutes
    while outcome.tried < kills and time.monotonic() < until:
        run += 1
        workdir = folder / f"run-{run}"
        in_this_run: list[str] = []
        while True:
            enough = outcome.tried >= kills or time.monotonic() > until
            process = place.fork(*place.go_on(workdir))
            early = rng.random() < 1 / 6
            # what is resumed ends sooner, and a run that has ended is not killed
            delay = rng.uniform(0, start if early else work / 2)
            if not enough:
                _wait(process, workdir, early, delay)
            if enough or process.poll() is not None:
                break
            process.kill()
            name = f"run {run}, {'start' if early else 'folder taken'} + {delay:.2f} s"
            with outcome.trial(name):
                in_this_run.append(name)
                lost = place.count(workdir) - place.saved(workdir)
                most_lost = max(most_lost, lost)
                require(lost <= script.save_every, f"{lost} {script.counter}s lost")
                resumed += place.saved(workdir) > 0
        said = process.wait()
        try:
            require(process.returncode == 0, f"it does not resume: {said[-500:]}")
            # in a child: to compute here would be to fork no more
            in_child(lambda w=workdir: require_same(script, w, whole), workdir)
        except Exception as error:
            # which of the kills it was cannot be told: all are lost
            outcome.lost += [f"{name}: {error}" for name in in_this_run]
        shutil.rmtree(workdir, ignore_errors=True)
    outcome.note = (
        f"{run} run{'s' * (run > 1)}, {resumed} kills with a checkpoint behind them, "
        f"at most {most_lost} {script.counter}s lost"
    )
    return [outcome]


def _split_time(workdir: Path, begun: float, ended: float) -> tuple[float, float]:
    """Seconds until a run has taken its folder, and from then to its end."""
    total = ended - begun
    work = ended - (workdir / "lock").stat().st_mtime
    return max(total - work, 0.1), max(work, 0.1)


def _wait(process: Forked, workdir: Path, early: bool, delay: float) -> None:
    """Until the moment of the kill, or the end of the process."""
    lock, pid = workdir / "lock", str(process.pid)
    while not early and process.poll() is None:
        if lock.exists() and lock.read_text() == pid:
            break
        time.sleep(0.01)
    until = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
