"""A run's folder: whole files, one process at a time, one config, one set of data."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.common import run_folder, study
from experiments.common.saved_options import read_config, to_json
from experiments.few_shot import heading
from experiments.few_shot.options import Common, Data
from experiments.learned_optimizer.measuring import Bench
from experiments.learned_optimizer.options import Config as OptimizerConfig
from metalstm.data import Dataset, make_pool
from metalstm.runtime.files import atomic_write
from metalstm.runtime.saved_config import ConfigMismatch


def write_config(folder: Path, config: Common, **more) -> Path:
    folder.mkdir(exist_ok=True)
    run_folder.write_json(folder / "config.json", {"config": to_json(config), **more})
    return folder


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "results.json"
    run_folder.write_json(path, [1])

    def stop_half_way():
        with atomic_write(path) as part:
            part.write_text("[2")
            assert part.suffix == ".json"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["results.json"]


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    run_folder.write_json(path, [1])

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(
            OSError, match=r"results\.json cannot be written \(No space "
        ):
            run_folder.write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    metrics = run_folder.Metrics(tmp_path / "missing")
    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written .*--resume"):
        metrics.write("maml", "train", 1, loss=1.0)


def test_a_run_killed_before_its_config_can_start_again(tmp_path):
    folder = tmp_path / "run"
    with run_folder.locked(folder):
        pass
    (folder / ".part-01234567-config.json").write_text('{"conf')
    run_folder.refuse_other_runs(folder, Common(), ())
    (folder / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no run: choose"):
        run_folder.refuse_other_runs(folder, Common(), ())
    with pytest.raises(ValueError, match=r"thesis\.tex is a file: choose another --w"):
        run_folder.refuse_other_runs(folder / "thesis.tex", Common(), ())


def test_the_config_is_checked_again_under_the_lock(tmp_path):
    """Another run may have come and gone since it was checked first."""
    folder = tmp_path / "run"
    run_folder.refuse_other_runs(folder, Common(), ())
    write_config(folder, Common(Data(way=7)))
    with (
        pytest.raises(ConfigMismatch, match=r"data\.way: saved 7, now 5"),
        run_folder.locked(folder, Common()),
    ):
        pytest.fail("the folder was given to a second run")


def test_of_two_processes_one_gets_the_folder(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from experiments.common import run_folder\n"
        "with run_folder.locked(Path(sys.argv[1])): print('mine', flush=True); input()"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1],
    )  # fmt: skip
    with first, contextlib.ExitStack() as at_end:  # `first` closes its pipes
        at_end.callback(first.kill)
        assert first.stdout.readline() == "mine\n"
        owner = rf"process {first.pid} is running in "
        with pytest.raises(ValueError, match=owner), run_folder.locked(tmp_path):
            pytest.fail("two processes hold one folder")
        with pytest.raises(ValueError, match=owner):
            run_folder.refuse_other_runs(tmp_path, Common(), ())
    with run_folder.locked(tmp_path):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"run cannot be written \(Not a dir.* --workdir"),
        run_folder.locked(tmp_path / "file" / "run"),
    ):
        pytest.fail("a folder inside a file")


def test_a_lock_on_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder.os, "write", full)
    with (
        pytest.raises(OSError, match=r"lock cannot be written \(No space .*--workdir"),
        run_folder.locked(tmp_path),
    ):
        pytest.fail("held without saying by whom")
    monkeypatch.undo()
    with run_folder.locked(tmp_path):  # it was let go of
        pass


@pytest.mark.fault("config.json or metrics.jsonl that is none")
@pytest.mark.parametrize("text", ["", '{"config": ', "[]", '{"config": 3}', "\xff"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is damaged \(.*put a copy of"):
        read_config(tmp_path)


def test_a_run_goes_on_with_its_own_data_only(tmp_path):
    about = {"name": "mine", "checksum": "0123"}
    run_folder.refuse_other_data(tmp_path, about)  # a new run
    write_config(tmp_path, Common(), data=about)
    run_folder.refuse_other_data(tmp_path, about | {"since_then": 1})
    with pytest.raises(ConfigMismatch, match='checksum: saved "0123", now "4567"') as e:
        run_folder.refuse_other_data(tmp_path, about | {"checksum": "4567"})
    assert "put the data back as they were" in str(e.value)


@pytest.mark.fault("config.json or metrics.jsonl that is none")
def test_lines_of_metrics_that_are_none_are_left_out(tmp_path):
    metrics = run_folder.Metrics(tmp_path)
    metrics.write("maml", "train", 10, loss=1.0)
    with open(metrics.path, "ab") as file:
        file.write(b'3\n{"method": "maml"}\n\xff\xfe\n')
    metrics.write("maml", "train", 20, loss=1.0)
    assert [row["episode"] for row in metrics.read()] == [10, 20]
    metrics.rewind("maml", 10)
    assert len(metrics.path.read_text().splitlines()) == 1


def test_a_damaged_curve_is_measured_again(tmp_path):
    config = OptimizerConfig()
    bench = Bench(config.problem, config.test, tmp_path)
    calls = []

    def measure():
        calls.append(1)
        return {"values": np.arange(6.0)}

    for _ in range(2):
        kept = bench._kept("curve", {"steps": 3}, measure)
        np.testing.assert_array_equal(kept["values"], np.arange(6.0))
    assert list(kept) == ["values"]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="is damaged .*building it again"):
        bench._kept("curve", {"steps": 3}, measure)
    assert len(calls) == 2


def test_what_is_omitted_is_said():
    pool = make_pool(np.zeros((1, 1, 2, 2, 1), np.uint8))
    info = {"skipped": 5, "skipped_files": list("abcde"), "unlabelled": 2}
    dataset = Dataset("mine", pool, pool, pool, {}, (2, 2, 1), "", info)
    source = type("Source", (), {"dataset": dataset})
    said = heading._about(source)
    assert "omitted: 5 corrupt files (a, b, c, ..), 2 images without a label" in said


def test_a_study_keeps_its_results_apart_from_other_data(tmp_path):
    run_folder.write_json(tmp_path / "config.json", {"config": {}})
    study.note_data(tmp_path, {"checksum": "0123", "parameters of a": "4567"})
    study.note_data(tmp_path, {"checksum": "0123", "parameters of b": "89"})  # one more
    for other in ({"checksum": "4567"}, {"parameters of a": "0123"}):
        with pytest.raises(ValueError, match="began with other data"):
            study.note_data(tmp_path, other)
    noted = {"checksum": "0123", "parameters of a": "4567", "parameters of b": "89"}
    assert read_config(tmp_path)["data"] == noted
