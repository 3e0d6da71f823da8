"""The scripts of experiments/examples run, at the smallest size, and stay short."""

from __future__ import annotations

import functools
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_reptile_gradients import tiny_dataset

import metalstm
from experiments.examples import (
    learned_optimizer,
    meta_train_meta_lstm,
    own_learner_on_devices,
)
from metalstm import data, nn

ROOT = Path(__file__).parents[1]
SCRIPTS = (learned_optimizer, meta_train_meta_lstm, own_learner_on_devices)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_can_be_read_in_a_sitting(script):
    lines = Path(str(script.__file__)).read_text().splitlines()
    assert 60 <= len(lines) <= 100
    assert len(inspect.signature(script.main).parameters) <= 5


@pytest.mark.smoke
def test_meta_train_meta_lstm(monkeypatch, capsys):
    monkeypatch.setattr(data, "load_glyphs", lambda: tiny_dataset(6))
    # of four blocks: XLA compiles each
    monkeypatch.setattr(nn, "conv4", functools.partial(nn.conv4, num_blocks=1))
    found = meta_train_meta_lstm.main(
        way=2, shot=1, meta_steps=2, filters=2, test_episodes=10
    )
    assert 0 <= found.mean <= 1
    printed = capsys.readouterr().out
    assert "step     2  loss" in printed
    assert "difference" in printed


def test_learned_optimizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses = learned_optimizer.main(meta_steps=2, unroll=2, steps=3)
    assert next(iter(losses)) == "learned"
    assert np.isfinite(list(losses.values())).all()
    saved = metalstm.load_rule("rule.npz")
    assert saved.spec == learned_optimizer.SPEC
    assert "meta-step     2" in capsys.readouterr().out


def test_own_learner_on_devices(tmp_path, capsys):
    """Two devices give the loss of one."""
    path = tmp_path / "x.npz"
    own_learner_on_devices.main(path, meta_steps=4, num_tasks=2)
    alone = capsys.readouterr().out.splitlines()
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=2"
    line = ["--data-file", str(path), "--meta-steps", "4", "--num-tasks", "2"]
    done = subprocess.run(
        [sys.executable, "-m", own_learner_on_devices.__name__, *line],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    together = done.stdout.splitlines()
    assert "1 devices, 2 tasks a meta-step" in alone[-1]
    assert "2 devices, 2 tasks a meta-step" in together[-1]
    assert len(alone) == 5
    assert alone[:-1] == together[:-1]
