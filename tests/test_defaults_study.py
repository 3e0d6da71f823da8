"""The study of the Meta-LSTM's defaults, as small as can be."""

from __future__ import annotations

import json

import numpy as np

from experiments.studies import defaults

LINE = (
    "--cells embeddings digits --shots 1 --seeds 2 --meta-steps 2 --test-episodes 4 "
    "--rates 0.1 1.0"
).split()


def test_its_table_and_what_it_keeps(tmp_path, capsys):
    folder = tmp_path / "run"
    assert defaults.main([*LINE, "--workdir", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "digits: omitted, --digits names no file" in said
    cell = json.loads((folder / "results.json").read_text())["cells"]["embeddings-1"]
    assert len(cell["meta_lstm"]) == len(cell["maml"]) == 2
    assert cell["rate"] == [0.1, 1.0][int(np.argmax(cell["validation"]))]
    kept = folder / "embeddings-1-meta_lstm.npz"
    before = kept.stat().st_mtime_ns
    assert defaults.main([*LINE, "--workdir", str(folder)]) == 0
    assert kept.stat().st_mtime_ns == before


def test_the_digits_are_split_by_digit(tmp_path):
    rows = np.zeros((20, 65))
    rows[:, -1] = np.arange(20) % 10
    rows[:, 0] = rows[:, -1]
    np.savetxt(tmp_path / "digits.csv", rows, delimiter=",")
    pools = defaults.pools("digits", tmp_path / "digits.csv")
    found = {s: set(np.asarray(p.images).max((1, 2, 3))) for s, p in pools.items()}
    assert found == {"train": {0, 1, 4, 6, 9}, "validation": {3, 7}, "test": {2, 5, 8}}
    assert [p.num_classes for p in pools.values()] == [10, 4, 6]
