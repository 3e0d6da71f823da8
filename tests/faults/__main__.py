"""Try every fault, print the figures, write them as a table.

    make faults                                   # all of it
    python -m tests.faults --short                # some of each, a minute or two
    python -m tests.faults --only kill,checkpoint

The status is 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from . import damage, killed_runs, run_folders, writers
from .outcomes import Outcome, table
from .scripts import FEW_SHOT, LEARNED_OPTIMIZER, SCRIPTS
from .tests_of_faults import run_tests

Group = Callable[[Path], list[Outcome]]


def groups(*, short: bool, kills: int, seed: int, minutes: float) -> dict[str, Group]:
    """The faults by name."""
    found: dict[str, Group] = {}
    every = 5 if short else 1
    for writer in writers.WRITERS:
        found[f"write {writer.name}"] = partial(
            writers.stop_everywhere, writer, every=every
        )
    found["small disk"] = run_folders.small_disk
    found["damage"] = partial(
        damage.run, flips=4 if short else 64, cuts=2 if short else 12
    )
    found["bad input"] = lambda folder: run_tests()
    shares = {FEW_SHOT: (kills + 1) // 2, LEARNED_OPTIMIZER: kills // 2}
    for script in SCRIPTS:
        own = {
            "kill": partial(
                killed_runs.kill,
                script,
                kills=shares[script],
                seed=seed,
                minutes=minutes,
            ),
            "two at once": partial(
                run_folders.two_at_once, script, tries=1 if short else 6
            ),
            "read-only": partial(run_folders.read_only, script),
            "contradict": partial(run_folders.contradictions, script),
            "disk full": partial(
                run_folders.disk_full, script, limits=1 if short else 5
            ),
            "newest damaged": partial(
                run_folders.damaged_run, script, tries=1 if short else 4
            ),
        }
        found |= {f"{name} {script.name}": group for name, group in own.items()}
    return found


def in_a_process(group: Group, folder: Path) -> list[Outcome]:
    """What a group found; in a process of its own, where JAX has not computed yet.

    Its threads do not survive a fork, and groups fork.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(group(folder)))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        status = process.exitcode
        raise RuntimeError(f"the group ended with status {status}") from None
    finally:
        process.join()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--short", action="store_true", help="some of each fault")
    parser.add_argument("--only", default="", help="names of faults, or parts of them")
    parser.add_argument("--kills", type=int, help="of training scripts, in all")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="of killing each script"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--output", type=Path, help="write the table to this file")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    kills = options.kills or (4 if options.short else 60)
    wanted = [part for part in options.only.split(",") if part]
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        chosen = groups(
            short=options.short,
            kills=kills,
            seed=options.seed,
            minutes=options.minutes,
        )
        for number, (name, group) in enumerate(chosen.items()):
            if wanted and not any(part in name for part in wanted):
                continue
            started = time.monotonic()
            place = name.split()[-1] if "write" not in name else str(number)
            new = in_a_process(group, Path(folder) / place)
            outcomes += new
            for outcome in new:
                said = f"tried {outcome.tried}, survived {outcome.survived}, lost "
                said += f"{len(outcome.lost)}  ({time.monotonic() - started:.0f} s)"
                print(f"{outcome.fault}: {said} {outcome.note}", flush=True)
                for one in outcome.lost:
                    print(f"  lost: {one}", flush=True)
    text = table(outcomes)
    minutes = (time.monotonic() - begun) / 60
    print(f"\n{text}\n\n{minutes:.0f} minutes")
    if options.output:
        options.output.write_text(text + "\n")
    return 1 if any(outcome.lost for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
