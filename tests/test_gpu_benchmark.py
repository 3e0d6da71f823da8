"""`benchmarks.gpu`, tiny and on a CPU: what it measures, and what survives."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from benchmarks import gpu, gpu_rows

TINY = {"image": (16, 1), "shot": 1, "steps": 1, "rule": "compare", "filters": 2}
TINY |= {"downsample": "stride"}


def test_a_row_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    def fails():
        raise MemoryError("of 1 TiB\nand more")

    found = {"a": fails, "b": lambda: {"measured": 1.5, "of the peak": "3.0%"}}
    monkeypatch.setattr(gpu_rows, "rows_of", lambda part, small, peak: found)
    results = gpu.Results(tmp_path)
    gpu.measure(results, "limits", True, None)
    assert "| a | MemoryError: of 1 TiB |" in results.tables()
    assert "| b | 1.5 | 3.0% |" in (tmp_path / "tables.md").read_text()
    assert capsys.readouterr().out.count("\n") == 2
    found["a"] = lambda: pytest.fail("it was measured")
    gpu.measure(results, "limits", True, None)


def test_a_part_runs_on_after_a_row_that_ended_its_process(tmp_path):
    results = gpu.Results(tmp_path)
    code = f"""
import os, pathlib
from benchmarks.gpu import Results
results = Results(pathlib.Path({str(tmp_path)!r}))
for row in ("a", "b"):
    if row not in results.rows("speed"):
        results.add("speed", row)
        os._exit(9) if row == "a" else results.add("speed", row, compile=1)
"""
    gpu.run_part(results, "speed", [sys.executable, "-c", code], 60)
    why = {"failed": "the process ended with 9"}
    assert results.rows("speed") == {"a": why, "b": {"compile": 1}}
    gpu.run_part(results, "limits", [sys.executable, "-c", "raise SystemExit(3)"], 60)
    why = {"failed": "the process ended with 3"}
    assert results.rows("limits") == {"(the part)": why}
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    gpu.run_part(results, "numerics", sleeps, 0.2)
    assert "time was over" in results.tables()


def test_training_is_noted_with_what_it_reached(tmp_path, monkeypatch):
    done = SimpleNamespace(returncode=2, stdout="", stderr="error: no such preset\n")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *a, **k: done)
    results = gpu.Results(tmp_path)
    gpu.train(results, ["neither=here"], True, 1e12)
    assert "| neither=here | error: no such preset |" in results.tables()


def test_meta_gradients_are_compared_with_the_cpu_s():
    found = gpu_rows.compare(TINY, 1)
    assert float(found["float32"]) < 1e-5
    assert 1e-4 < float(found["bfloat16"]) < 0.5


def test_speeds_are_shares_of_a_peak():
    peak = gpu_rows.peak_of("NVIDIA H200")
    assert peak is not None
    assert peak.memory == 4800
    assert gpu_rows.peak_of("a toaster") is None
    row = gpu_rows._speed(TINY, 1, 2, "bfloat16", peak, True)
    share = float(row["of the peak"].rstrip("%")) / 100
    assert share == pytest.approx(row["TFLOP/s"] / peak.bfloat16, abs=1e-3)
    rate = 2 / row["seconds a call"]
    assert row["per s"] == pytest.approx(rate)
    names = gpu_rows.rows_of("speed", True, None)
    assert "mini-1shot, 2 seeds, bfloat16" in names
    assert "quadratics-pes, 1 seed, default" in names
    limits = gpu_rows.rows_of("limits", True, [1, 2, 3, 4])
    assert limits["copy"]()["of the peak"].endswith("%")
