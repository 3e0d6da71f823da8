"""Checkpoints: what is saved comes back, and a kill loses at most the newest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

from metalstm.runtime import checkpoint_format, checkpoints
from metalstm.runtime.saved_config import ConfigMismatch, check_config


class State(NamedTuple):
    step: jax.Array
    params: dict
    opt_state: tuple
    carry: tuple
    seed: int


def make_state(step: int) -> State:
    params = {
        "w": jnp.arange(6.0).reshape(2, 3) + step,
        "half": jnp.full((3,), step, jnp.bfloat16),
        "empty": {},
        "without_entries": jnp.zeros((0, 3)),
    }
    opt_state = optax.adam(1e-3).init(params)
    return State(jnp.int32(step), params, opt_state, (), seed=7)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        np.testing.assert_array_equal(a, b)


METADATA = "_CHECKPOINT_METADATA"  # orbax's name for a step's metadata


def truncate(step_dir: Path) -> None:
    """Cut the largest file of a checkpoint's arrays in half."""
    files = [p for p in (step_dir / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    state = make_state(3)
    checkpoints.save(tmp_path, state, step=3, metadata={"history": [0.1]})
    restored = checkpoints.restore(tmp_path, jax.eval_shape(lambda: make_state(0)))
    assert restored.step == 3
    assert restored.metadata == {"history": [0.1]}
    assert restored.message is None
    assert_equal(restored.state._replace(seed=7), state)
    concrete = checkpoints.restore(tmp_path, make_state(0)).state
    assert concrete.seed == 7
    assert type(concrete.seed) is int


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, score in [(1, 0.2), (2, 0.9), (3, None), (4, 0.4), (5, None)]:
        checkpoints.save(tmp_path, make_state(step), step=step, score=score, keep=2)
    assert checkpoints.steps(tmp_path) == [2, 4, 5]
    assert checkpoints.latest(tmp_path) == 5
    assert checkpoints.best(tmp_path) == 2
    target = make_state(0)
    assert checkpoints.restore(tmp_path, target).step == 5
    best = checkpoints.restore(tmp_path, target, which="best")
    assert_equal(best.state, make_state(2))
    assert checkpoints.restore(tmp_path, target, which=4).step == 4


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints.save(tmp_path, make_state(1), step=1, metadata={"try": 1})
    checkpoints.save(tmp_path, make_state(1), step=1, metadata={"try": 2})
    assert checkpoints.steps(tmp_path) == [1]
    assert checkpoints.read_metadata(tmp_path) == {"try": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


KILLED_BETWEEN_RENAMES = """
import os, sys
from metalstm.runtime import checkpoints

real_rename = os.rename
def killed(source, destination, **more):
    if str(destination) == sys.argv[1] + "/1":
        os._exit(9)
    real_rename(source, destination, **more)

os.rename = killed
checkpoints.save(sys.argv[1], {"w": 9.0}, step=1)
"""


def test_a_kill_between_the_two_renames_keeps_the_old_one(tmp_path):
    """Of a step that is saved again: the old one is set aside, the new one named."""
    checkpoints.save(tmp_path, {"w": 1.0}, step=1)
    line = [sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(tmp_path)]
    assert subprocess.run(line).returncode == 9
    assert ".replaced-1" in [p.name for p in tmp_path.iterdir()]
    assert checkpoints.restore(tmp_path, {"w": 0.0}).state == {"w": 1.0}
    checkpoints.save(tmp_path, {"w": 2.0}, step=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
    assert checkpoints.restore(tmp_path, {"w": 0.0}, which=1).state == {"w": 1.0}


def test_a_truncated_newest_falls_back_and_says_so(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, make_state(step), step=step)
    truncate(tmp_path / "2")
    restored = checkpoints.restore(tmp_path, make_state(0))
    assert restored.step == 1
    assert "2 cannot be read" in restored.message
    assert "fell back to step 1" in restored.message
    assert_equal(restored.state, make_state(1))
    damaged = r"2 cannot be read: its arrays are damaged .*; choose another step \(1\)"
    with pytest.raises(ValueError, match=damaged) as caught:
        checkpoints.restore(tmp_path, make_state(0), which=2)
    assert caught.value.__cause__ is not None
    truncate(tmp_path / "1")
    with pytest.raises(ValueError, match="start again in another folder"):
        checkpoints.restore(tmp_path, make_state(0))


def test_damaged_metadata_are_named(tmp_path):
    checkpoints.save(tmp_path, make_state(1), step=1)
    (tmp_path / "1" / METADATA).write_text("{")
    damaged = "1 cannot be read: its metadata are damaged .*no other one is left"
    for read in (
        lambda: checkpoints.read_metadata(tmp_path),
        lambda: checkpoints.restore(tmp_path, None, which="best"),
    ):
        with pytest.raises(ValueError, match=damaged) as caught:
            read()
        assert caught.value.__cause__ is not None


def test_arrays_that_changed_on_disk_are_noticed(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, make_state(step), step=step)
    path = tmp_path / "2" / METADATA
    stored = json.loads(path.read_text())
    document = stored["custom_metadata"]
    document["arrays"] = "0" * 64
    del document["digest"]
    document["digest"] = checkpoint_format.digest_of_json(document)
    path.write_text(json.dumps(stored))
    restored = checkpoints.restore(tmp_path, make_state(0))
    assert restored.step == 1
    assert "digest" in restored.message


def test_broken_metadata_falls_back(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, make_state(step), step=step, score=float(step))
    (tmp_path / "2" / METADATA).write_text('{"score": 2.0, ')
    assert checkpoints.best(tmp_path) == 1
    assert checkpoints.restore(tmp_path, make_state(0)).step == 1


def test_altered_metadata_falls_back_and_is_no_other_config(tmp_path):
    for step in (1, 2):
        metadata = {"config": {"way": 5}, "history": [0.5]}
        checkpoints.save(tmp_path, make_state(step), step=step, metadata=metadata)
    document = (tmp_path / "2" / METADATA).read_text()
    for altered in (
        document.replace('"way": 5', '"way": 7'), document.replace("0.5", "0.7"),
        document.replace("bfloat16", "float32"), "[]",
    ):  # fmt: skip
        assert altered != document
        (tmp_path / "2" / METADATA).write_text(altered)
        restored = checkpoints.restore(tmp_path, make_state(0), config={"way": 5})
        assert restored.step == 1
        assert "metadata" in restored.message.lower()
        assert checkpoints.best(tmp_path) is None


def test_another_format_is_refused_by_name(tmp_path):
    checkpoints.save(tmp_path, make_state(1), step=1)
    path = tmp_path / "1" / METADATA
    stored = json.loads(path.read_text())
    document = stored["custom_metadata"]
    assert document["format"] == checkpoint_format.FORMAT_VERSION
    document["format"] = checkpoint_format.FORMAT_VERSION + 1
    del document["digest"]
    document["digest"] = checkpoint_format.digest_of_json(document)
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"has format 3, and .* use the version that"):
        checkpoints.restore(tmp_path, make_state(0))


def test_without_a_target_the_arrays_come_as_a_list(tmp_path):
    checkpoints.save(tmp_path, {"b": jnp.ones(2), "a": 3}, step=1)
    three, ones = checkpoints.restore(tmp_path, None).state
    assert three == 3
    np.testing.assert_array_equal(ones, np.ones(2, np.float32))


def test_going_back_removes_what_is_later(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, make_state(step), step=step, score=step, keep=1)
    assert checkpoints.steps(tmp_path) == [2]
    truncate(tmp_path / "2")
    checkpoints.save(tmp_path, make_state(1), step=1, keep=1)
    assert checkpoints.steps(tmp_path) == [1]
    assert_equal(checkpoints.restore(tmp_path, make_state(0)).state, make_state(1))


def test_an_old_version_of_a_later_step_is_later_too(tmp_path):
    """A kill left it set aside; then training went back behind it."""
    for step in (1, 2):
        checkpoints.save(tmp_path, {"w": float(step)}, step=step)
    (tmp_path / "2").rename(tmp_path / ".replaced-2")
    assert checkpoints.latest(tmp_path) == 2
    checkpoints.save(tmp_path, {"w": 7.0}, step=1)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert checkpoints.restore(tmp_path, {"w": 0.0}).state == {"w": 7.0}


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, make_state(1), step=1)
    real_rename = os.rename

    def full(source, destination):
        if Path(destination).name == "2":
            raise OSError(errno.ENOSPC, "No space left on device")
        real_rename(source, destination)

    monkeypatch.setattr(checkpoints.os, "rename", full)
    with pytest.raises(OSError, match=r"2 cannot be written \(.*No space.* there: 1"):
        checkpoints.save(tmp_path, make_state(2), step=2)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    assert_equal(checkpoints.restore(tmp_path, make_state(0)).state, make_state(1))


def test_an_older_one_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    checkpoints.save(tmp_path, make_state(1), step=1)

    def refuse(self, step, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.training.Checkpointer, "delete", refuse)
    with pytest.raises(OSError, match=r"2 is written, but an older one cannot be rem"):
        checkpoints.save(tmp_path, make_state(2), step=2, keep=1)
    assert checkpoints.restore(tmp_path, make_state(0)).step == 2


@pytest.mark.parametrize("step", [1, 2])
def test_everything_is_on_disk_before_an_older_one_goes(tmp_path, monkeypatch, step):
    """Also when it is an older version of the same step."""
    checkpoints.save(tmp_path, make_state(1), step=1)
    real_sync, real_rmtree, synced, gone = os.fsync, shutil.rmtree, set(), []

    def sync(handle):
        synced.add(os.fstat(handle).st_ino)
        real_sync(handle)

    def rmtree(path, *args, **kwargs):
        old = Path(path)
        if old.parent == tmp_path and old.name.endswith("1") and old.exists():
            gone.append(old)
            written = [tmp_path, tmp_path / str(step)]
            written += (tmp_path / str(step)).rglob("*")
            assert len(written) > 5
            assert not [p for p in written if p.stat().st_ino not in synced]
        real_rmtree(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoints.save(tmp_path, make_state(step), step=step, keep=1)
    assert len(gone) == 1
    assert checkpoints.steps(tmp_path) == [step]


def test_a_different_config_is_refused_and_shown(tmp_path):
    config = {"way": 5, "rule": {"hidden_size": 20}, "episodes": 100, "sizes": (1, 2)}
    checkpoints.save(tmp_path, make_state(1), step=1, metadata={"config": config})
    same = checkpoints.restore(tmp_path, make_state(0), config=config)
    assert same.step == 1
    other = config | {"rule": {"hidden_size": 4}, "episodes": 200}
    with pytest.raises(
        ConfigMismatch, match=r"rule.hidden_size: saved 20, now 4"
    ) as info:
        checkpoints.restore(tmp_path, make_state(0), config=other, ignore=["episodes"])
    assert "episodes" not in str(info.value)
    with pytest.raises(ConfigMismatch, match="way: saved 5, now"):
        check_config({"way": 5}, {})


def test_another_shape_or_count_is_refused(tmp_path):
    checkpoints.save(tmp_path, {"w": jnp.zeros(3)}, step=1)
    with pytest.raises(ValueError, match=r"\['w'\] as \[\[3\], 'float32'\]"):
        checkpoints.restore(tmp_path, {"w": jnp.zeros(4)})
    with pytest.raises(ValueError, match="holds 1 arrays where 2 are expected"):
        checkpoints.restore(tmp_path, {"w": jnp.zeros(3), "b": jnp.zeros(3)})


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep=0"):
        checkpoints.save(tmp_path, {}, step=1, keep=0)
    with pytest.raises(ValueError, match="step=-1"):
        checkpoints.save(tmp_path, {}, step=-1)
    with pytest.raises(ValueError, match="metadata must be JSON"):
        checkpoints.save(tmp_path, {}, step=1, metadata={"a": object()})
    for which in ("latest", "best", 3):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoints.restore(tmp_path / "nowhere", {}, which=which)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.read_metadata(tmp_path)
    with pytest.raises(ValueError, match="which='newest': choose one of latest, best"):
        checkpoints.restore(tmp_path, {}, which="newest")


WRITER = """
import itertools, sys
import numpy as np
from metalstm.runtime import checkpoints
for step in itertools.count(1):
    state = {str(i): np.full((64, 64), step, np.float32) for i in range(20)}
    checkpoints.save(sys.argv[1], state, step=step, score=-abs(step - 2.0))
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05])
def test_kill_9_while_writing_loses_nothing_finished(tmp_path, delay):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        while (line := writer.stdout.readline()) and int(line) < 3:
            finished = int(line)
        finished = int(line)
        time.sleep(delay)  # the next save has begun
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    target = {str(i): np.zeros((64, 64), np.float32) for i in range(20)}
    restored = checkpoints.restore(tmp_path, target)
    assert restored.step >= finished
    assert restored.message is None
    np.testing.assert_array_equal(restored.state["0"], restored.step)
    assert checkpoints.best(tmp_path) == 2
    checkpoints.save(tmp_path, restored.state, step=restored.step + 1)
    assert not [p for p in tmp_path.iterdir() if not p.name.isdecimal()]


def test_a_score_that_is_nan_is_never_the_best(tmp_path):
    for step, score in enumerate((float("nan"), 0.5, 0.1), 1):
        checkpoints.save(tmp_path, {"w": np.zeros(1)}, step=step, score=score, keep=1)
    assert checkpoints.best(tmp_path) == 2


def test_a_step_that_is_no_whole_number_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"step=1\.5: choose a whole number"):
        checkpoints.save(tmp_path, {"w": np.zeros(1)}, step=1.5)
    assert not checkpoints.steps(tmp_path)


def test_a_step_of_numpy_is_a_step(tmp_path):
    checkpoints.save(tmp_path, {"w": np.zeros(1)}, step=np.int64(3))
    assert checkpoints.steps(tmp_path) == [3]


def test_a_relative_folder_is_read_without_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    checkpoints.save("run", {"w": np.zeros(1)}, step=1, metadata={"seconds": 3})
    assert checkpoints.read_metadata("run")["seconds"] == 3
    assert checkpoints.best("run") is None
    assert not caplog.records
