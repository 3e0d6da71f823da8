"""`benchmarks.turns` on checkouts whose only row notes when it is called."""

import pytest

from benchmarks.turns import seconds_in_turn

EPISODES = """
from pathlib import Path
from benchmarks import rows

ROWS = {"row": None}

def measure(name, seconds):
    def step():
        with Path("../calls").open("a") as file:
            file.write(Path.cwd().name + " ")
    rows.timed(step, seconds)
"""


def make_checkout(folder, episodes):
    package = folder / "benchmarks"
    package.mkdir(parents=True)
    for name in ("__init__", "learned_optimizers"):
        (package / f"{name}.py").touch()
    (package / "rows.py").write_text("timed = None\n")
    (package / "episodes.py").write_text(episodes)
    return folder


def test_checkouts_take_turns(tmp_path):
    checkouts = [make_checkout(tmp_path / name, EPISODES) for name in ("old", "new")]
    seconds = seconds_in_turn("row", checkouts, rounds=3)
    assert [len(calls) for calls in seconds] == [3, 3]
    assert all(s > 0 for calls in seconds for s in calls)
    warm, timed = ["old"] * 2 + ["new"] * 2, ["new", "old", "old", "new", "new", "old"]
    assert (tmp_path / "calls").read_text().split() == warm + timed


@pytest.mark.parametrize("broken", ["ROWS = {}", "ROWS = None +"])
def test_one_that_does_not_start_is_named(broken, tmp_path):
    checkout = make_checkout(tmp_path / "old", broken)
    with pytest.raises(SystemExit, match=f"row of {checkout} did not start"):
        seconds_in_turn("row", [checkout], rounds=1)
