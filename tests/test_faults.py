"""A short form of `make faults`: some of every fault, and that it can tell a loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from faults import outcomes, run_folders, scripts

ROOT = Path(__file__).parents[1]


def run(program: str, *arguments: str) -> str:
    """What a fresh Python prints: only there nothing has been computed yet."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


STOPPED = """
import sys
from pathlib import Path
from tests.faults import outcomes, writers

def fragile(folder, version):  # neither whole nor atomic
    with open(folder / "results.json", "w") as file:
        file.write('{"version": %d, "text": "' % version)
        file.flush()
        file.write("x" * 5000 + '"}')

names = ("rule file", "decode cache", "results.json", "metrics.jsonl")
chosen = [w for w in writers.WRITERS if w.name in names]
chosen.append(writers.Writer("fragile", fragile, writers._read_results))
for i, writer in enumerate(chosen):
    for o in writers.stop_everywhere(writer, Path(sys.argv[1]) / str(i), every=3):
        print(writer.name, o.tried, len(o.lost), *o.lost, sep="|")
"""


def test_writers_survive_kills_and_full_disks(tmp_path):
    found: dict[str, list[list[str]]] = {}
    for line in run(STOPPED, str(tmp_path)).splitlines():
        name, *rest = line.split("|")
        found.setdefault(name, []).append(rest)
    fragile = found.pop("fragile")
    assert [int(lost) > 0 for _, lost, *_ in fragile] == [True, True]
    assert len(found) == 4
    for name, kinds in found.items():
        for tried, lost, *which in kinds:
            assert int(tried) >= 3, name
            assert int(lost) == 0, which


CHECKPOINTS = """
import sys
from pathlib import Path
from tests.faults import damage, writers

folder = Path(sys.argv[1])
writer = writers.WRITERS[0]
found = writers.stop_everywhere(writer, folder / "stopped", every=9)
(folder / "damaged").mkdir()
found += damage.damaged_checkpoints(folder / "damaged", 2, 0)
for o in found:
    print(o.tried, len(o.lost), *o.lost, sep="|")
"""


def test_checkpoints_survive_kills_full_disks_and_damage(tmp_path):
    lines = run(CHECKPOINTS, str(tmp_path)).splitlines()
    assert len(lines) == 3
    for line in lines:
        tried, lost, *which = line.split("|")
        assert int(tried) >= 6
        assert int(lost) == 0, which


KILLS = """
import os, shutil, sys
from pathlib import Path
from tests.faults import killed_runs, scripts

# not where they are: a kill can leave half a program there
compiled = Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
if compiled.exists():
    shutil.copytree(compiled, Path(sys.argv[1]) / "compiled")
for o in killed_runs.kill(scripts.LEARNED_OPTIMIZER, Path(sys.argv[1]), kills=2):
    print(o.tried, len(o.lost), *o.lost, sep="|")
"""


@pytest.mark.slow
def test_a_killed_learned_optimizer_goes_on_as_if_nothing_had_happened(tmp_path):
    tried, lost, *which = run(KILLS, str(tmp_path)).strip().split("|")
    assert int(tried) == 2
    assert int(lost) == 0, which


GROUPS = """
import os, sys
from pathlib import Path
from tests.faults.__main__ import in_a_process
from tests.faults.outcomes import Outcome

def computes(folder):
    import jax.numpy as jnp
    jnp.ones(2).block_until_ready()
    return [Outcome("computed", "it holds")]

def forks(folder):
    from jax._src import xla_bridge
    return [Outcome(str(xla_bridge.backends_are_initialized()), "it holds")]

print(*(in_a_process(group, Path())[0].fault for group in (computes, forks)))
try:
    in_a_process(lambda folder: os._exit(3), Path())
except RuntimeError as error:
    print(error)
"""


def test_a_group_of_faults_leaves_the_next_a_jax_that_has_not_computed():
    assert run(GROUPS).split("\n")[:2] == [
        "computed False",
        "the group ended with status 3",
    ]


def test_a_lost_trial_is_counted_and_named():
    outcome = outcomes.Outcome("a fault", "it holds")
    with outcome.trial("first"):
        outcomes.require(True, "fine")
    with outcome.trial("second"):
        outcomes.require(False, "gone")
    assert (outcome.tried, outcome.survived) == (2, 1)
    text = outcomes.table([outcome])
    assert "| a fault | it holds | 2 | 1 | 1 |" in text
    assert "| all | | 2 | 1 | 1 |" in text
    assert "- lost: a fault: second: AssertionError: gone" in text


def test_a_run_that_differs_is_told(tmp_path):
    """By its metrics, its results, or what it left behind."""
    from experiments.common.run_folder import Metrics
    from metalstm.runtime import checkpoints

    script = scripts.LEARNED_OPTIMIZER

    def make(name: str, loss: float, weight: float) -> Path:
        folder = tmp_path / name
        for which in ("state", "best"):
            path = folder / "checkpoints" / script.method / which
            checkpoints.save(path, {"w": weight}, step=3)
        metrics = Metrics(folder, counter="step")
        metrics.write(script.method, "train", 1, loss=loss, seconds=loss)
        (folder / "results.json").write_text("{}")
        import numpy as np

        np.savez(folder / "accuracies.npz", mine=np.float32(loss))
        return folder

    one = make("one", 1.0, 2.0)
    scripts.require_same(script, one, make("two", 1.0, 2.0))
    with pytest.raises(AssertionError, match=r"metrics\.jsonl differs"):
        scripts.require_same(script, one, make("three", 1.5, 2.0))
    with pytest.raises(AssertionError, match="the state differs"):
        scripts.require_same(script, one, make("four", 1.0, 2.5))
    (one / "checkpoints" / ".replaced-4").mkdir()
    with pytest.raises(AssertionError, match="left behind"):
        scripts.require_same(script, one, make("five", 1.0, 2.0))


def test_a_contradicting_option_is_refused_with_the_difference(tmp_path):
    """Before anything is loaded, so that a run's config is all there must be."""
    from experiments.common.run_folder import write_json
    from experiments.common.saved_options import to_json
    from experiments.learned_optimizer.command_line import parse

    script = scripts.LEARNED_OPTIMIZER
    whole = tmp_path / "whole"
    whole.mkdir()
    flags = scripts.Place(script, tmp_path).new(whole)
    write_json(whole / "config.json", {"config": to_json(parse(flags))})
    write_json(whole / "results.json", {})
    (outcome,) = run_folders.contradictions(script, tmp_path)
    assert outcome.tried == 2 * len(script.contradictions)
    assert not outcome.lost
