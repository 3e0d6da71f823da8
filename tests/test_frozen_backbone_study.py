"""The study of heads on a frozen backbone, on features drawn in place."""

from __future__ import annotations

import json

import numpy as np

from experiments.studies import frozen_backbone as study
from metalstm.data.cache import Split, assemble
from metalstm.data.pools import SPLITS


def drawn_classes() -> object:
    rng = np.random.default_rng(0)
    splits = {}
    for split in SPLITS:
        centres = rng.normal(size=(12, 1, 8))
        features = (centres + 0.5 * rng.normal(size=(12, 9, 8))).astype(np.float32)
        counts = np.full(12, 9, np.int32)
        features = features.reshape(-1, 8)
        splits[split] = Split(features, counts, tuple(f"{split}{c}" for c in range(12)))
    return assemble("drawn", splits, {})


def test_the_study_measures_what_it_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.Config, "load", lambda config: drawn_classes())
    monkeypatch.setattr(study, "train_backbone", lambda dataset, config: lambda x: x)
    monkeypatch.setattr(study, "HEADS", {"ridge": study.HEADS["ridge"]})
    options = ["--way", "3", "--shot", "2", "--episodes", "200", "--fit-on", "test"]
    assert study.main([*options, "--workdir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "drawn, 3-way 2-shot, 3 unknown classes, 200 episodes" in said
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row[3] for row in rows] == ["1%", "2%", "5%", "10%", "20%", "30%"]
    for row in rows:
        asked = float(row[3].rstrip("%"))
        coverage, false_alarms = (float(row[k].split()[0]) for k in (4, 6))
        assert abs(100 - asked - coverage) < 4
        assert abs(asked - false_alarms) < 4
    assert (tmp_path / "run" / "confidence.png").exists()
