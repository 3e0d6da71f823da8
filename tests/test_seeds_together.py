"""Several seeds of a run at the same time: each as alone, whatever the others do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import pytest
import tiny
from few_shot_runs import META_LSTM, command, read

import metalstm
from experiments.common import together
from experiments.common.script_end import Interrupted
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot import train
from metalstm.base import Array
from metalstm.meta.fitting import Call, drive


class State(NamedTuple):
    seed: Array
    value: Array


class Counting:
    """A train loop that adds the pool to the state, and counts its traces."""

    def __init__(self):
        self.traces = 0

    def __call__(self, state, pool):
        self.traces += 1
        return state._replace(value=state.value + pool), {"loss": state.value}


def seed(loops, start, num_steps, *, fails_at=None, pool=0.5):
    """So many steps of each loop; its losses, and the state in the end."""
    state, losses = State(jnp.uint32(start), jnp.float32(start)), []
    for loop in loops:
        for step in range(num_steps):
            if step == fails_at:
                raise Interrupted
            state, metrics = yield Call(loop, state, jnp.asarray(pool, jnp.float32))
            losses.append(float(metrics["loss"]))
    return float(state.value), losses


def test_seeds_of_unequal_length_end_as_alone():
    lengths = {0.0: 3, 10.0: 5, 20.0: 4}

    def runs(loops):
        return [seed(loops, start, n) for start, n in lengths.items()]

    loops = [Counting(), Counting()]
    found = together.drive_together(runs(loops), None)
    assert found == [drive(run) for run in runs([Counting(), Counting()])]
    assert found[1] == (15.0, [10.0 + k / 2 for k in range(10)])
    # of three seeds, two, and one, which is called as it is: two more steps each
    assert 3 <= loops[0].traces <= 6


def test_one_that_fails_leaves_the_others_to_their_end():
    ended = []

    def noted(run):
        ended.append((yield from run))

    loop = [Counting()]
    runs = [
        noted(seed(loop, 0.0, 4)),
        noted(seed(loop, 1.0, 4, fails_at=2)),
        noted(seed(loop, 2.0, 6)),
    ]
    with pytest.raises(Interrupted):
        together.drive_together(runs, None)
    assert [state for state, _ in ended] == [2.0, 5.0]


@pytest.mark.usefixtures("tiny_instead_of_glyphs")
def test_seeds_at_the_same_time_are_those_one_after_another(tmp_path, monkeypatch):
    line = [
        "--algorithms", "meta-lstm", "finetune-head", *META_LSTM, "--episodes", 4,
        "--validate-every", 2, "--seeds", 2,
    ]  # fmt: skip
    assert few_shot.main(command(*line, workdir=tmp_path / "one")) == 0
    monkeypatch.setattr(train, "gains_from_seeds", lambda: True)
    assert few_shot.main(command(*line, workdir=tmp_path / "both")) == 0
    for n in (0, 1):
        one, both = (
            metalstm.load_run(tmp_path / name / f"seed-{n}", method).params
            for name in ("one", "both")
            for method in ("meta-lstm",)
        )
        tiny.assert_close(one, both, rtol=1e-4, atol=1e-5)
    tables = (
        read(tmp_path / name / "results.json")["methods"] for name in ("one", "both")
    )
    assert len({str(sorted(table)) for table in tables}) == 1
    # as it was, there is nothing left to train
    assert few_shot.main(["--resume", str(tmp_path / "both")]) == 0


TWO_DEVICES = """
import jax.numpy as jnp, test_seeds_together as t
from experiments.common import together
from metalstm.meta.fitting import drive
from metalstm.runtime.sharding import place

mesh = together.seeds_mesh(3, None)
assert mesh.size == 2

def runs(mesh):
    loop = t.Counting()
    pool = place(jnp.float32(0.5), mesh)
    lengths = {0: 3, 10: 5, 20: 4}
    return [t.seed([loop], start, n, pool=pool) for start, n in lengths.items()]

alone = [drive(run) for run in runs(None)]
assert together.drive_together(runs(mesh), mesh) == alone
"""


def test_two_devices_share_three_seeds():
    """The mesh takes two of them, and the third is computed without it."""
    here = Path(__file__).parent
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
        "JAX_NUM_CPU_DEVICES": "2",
    }
    subprocess.run([sys.executable, "-c", TWO_DEVICES], env=env, check=True)
