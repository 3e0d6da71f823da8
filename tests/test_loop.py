"""The parts of a training loop: speed, progress, Ctrl-C, what is saved."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import progress
from experiments.common.progress import ProgressBar, Stopwatch
from experiments.common.saved_training import SavedTraining
from experiments.common.script_end import stops_on_ctrl_c
from metalstm.meta.fitting import FitState
from metalstm.meta.step import TrainState
from metalstm.runtime import checkpoints
from metalstm.runtime.saved_config import ConfigMismatch


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_speed_is_without_compilation_and_validation(clock):
    stopwatch = Stopwatch()
    clock[0] += 50  # compiles
    assert math.isnan(stopwatch.speed())
    stopwatch.report(10)
    assert math.isnan(stopwatch.speed())
    clock[0] += 4
    with stopwatch.excluding():
        clock[0] += 1000
    stopwatch.report(30)
    assert stopwatch.speed() == pytest.approx(20 / 4)


def test_a_bar_never_goes_beyond_its_end(capsys):
    for in_seconds, most in ((False, 10), (True, 9.99)):
        bar = ProgressBar("maml", "episode", total=10, done=12, in_seconds=in_seconds)
        assert bar._bar.n == 10
        bar.update(25, 3.0, "loss 1.0")
        assert bar._bar.n <= max(most, 10)
        assert bar._bar.unit == "3.00/s  loss 1.0"
        bar.close()


def test_the_first_ctrl_c_asks_and_the_second_stops(capsys):
    handler = signal.getsignal(signal.SIGINT)
    with stops_on_ctrl_c() as requested:
        assert not requested()
        signal.raise_signal(signal.SIGINT)
        assert requested()
        assert "once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_cluster_may_repeat_its_sigterm(capsys):
    with stops_on_ctrl_c() as requested:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            assert requested()
        assert capsys.readouterr().err.count("stopping after this step") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@dataclass(frozen=True)
class Options:
    way: int = 5
    minutes: int = 1


def state(step: int, best: int, score: float) -> FitState:
    train = TrainState(
        step=jnp.int32(step),
        seed=jnp.uint32(0),
        params=jnp.full(3, float(step)),
        opt_state=(),
        carry=(),
    )
    return FitState(
        train, jnp.full(3, float(best)), jnp.float32(score), jnp.int32(best)
    )


def test_a_damaged_best_is_written_again_from_the_state(tmp_path):
    def make() -> TrainState:
        return state(0, 0, -math.inf).train

    saved = SavedTraining(tmp_path, Options(), ["minutes"])
    assert saved.restore(make) is None
    saved.save(state(2, 0, -math.inf), [], 1.0)
    assert not (tmp_path / "best").exists()  # nothing was validated yet
    saved.save(state(4, 3, 0.5), [{"episode": 3, "accuracy": 0.5}], 2.0)
    (tmp_path / "best" / "3" / "_CHECKPOINT_METADATA").write_text("{")
    again = SavedTraining(tmp_path, Options(minutes=9), ["minutes"])
    resumed = again.restore(make)
    assert resumed is not None
    assert (resumed.history, resumed.seconds) == ([{"episode": 3, "accuracy": 0.5}], 2)
    assert int(resumed.state.train.step) == 4
    best = checkpoints.restore(tmp_path / "best", None)
    assert best.step == 3
    np.testing.assert_array_equal(best.state[0], np.full(3, 3.0))
    with pytest.raises(ConfigMismatch, match="way: saved 5, now 3"):
        SavedTraining(tmp_path, Options(way=3), ["minutes"]).restore(make)
