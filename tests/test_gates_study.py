"""The study of gates: its table, its choice of rates, what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from test_reptile_gradients import tiny_dataset

from experiments.studies import gates
from metalstm import data, nn


def test_a_run_compares_gates_with_tuned_sgd(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "load_glyphs", lambda: tiny_dataset(16))
    monkeypatch.setattr(gates, "ABLATIONS", {"all parts": {}, "no LSTM": {}})
    monkeypatch.setattr(gates, "SGD_RATES", (0.1, 1.0))
    monkeypatch.setattr(gates, "learners", lambda config: {"mlp-3": nn.mlp(2, (3,))})
    line = "--way 2 --shot 1 --steps 1 --meta-steps 1 --meta-batch 1 --hidden 0"
    line += " --test-episodes 4 --validation-episodes 2 --workdir run"
    assert gates.main(line.split()) == 0
    rows = json.loads(Path("run/results.json").read_text())["rows"]
    found = [(row["part"], row["rule"]) for row in rows]
    assert found == [
        ("ablation", "all parts"),
        ("ablation", "no LSTM"),
        ("transfer", "learned gates"),
        ("transfer", "tuned SGD"),
    ]
    assert rows[0]["mean"] == rows[2]["mean"], "the same gates on the same episodes"
    assert rows[3]["rate"] in (0.1, 1.0)
    assert not rows[3]["rate_inside_grid"]
    assert "difference" in rows[1]
    assert "difference" not in rows[0]
    assert "(at the edge of the grid)" in Path("run/table.md").read_text()
    assert Path("run/gates.png").read_bytes()[1:4] == b"PNG"
    assert "tuned SGD" in capsys.readouterr().out
