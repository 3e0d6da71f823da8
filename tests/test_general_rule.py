"""The meta-training of the rule for ordinary training: resumed to the bit, exported."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experiments.learned_optimizer import general, general_training, meta_tasks
from metalstm import rules
from metalstm.learned_optimizers import problems

WORDS = [
    "--meta-steps", "6", "--burn-in", "1", "--unroll-steps", "2", "--horizon", "4", "8",
    "--validation-steps", "4", "--validation-instances", "2",
    "--validate-every", "3", "--save-every", "2", "--hidden-size", "2",
    "--backprop", "quadratics",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    quadratics = meta_tasks.Task("quadratics", problems.quadratics(2), (), 2)
    noisy = meta_tasks.Task("noisy", meta_tasks.noisy_quadratics(3), (), 2)
    monkeypatch.setattr(general_training, "training_tasks", lambda: (quadratics, noisy))
    monkeypatch.setattr(general_training, "validation_tasks", lambda: (quadratics,))


class PowerCutError(Exception):
    pass


def test_a_run_that_is_cut_resumes_to_the_bit_and_exports_its_best(
    tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert general.main(["--folder", str(whole), *WORDS]) == 0
    make = general_training.metalstm.make_mixture_loop

    def make_cut(parts, optimizer):
        loop = make(parts, optimizer)

        def run(state, pools):
            if int(state.step) == 5:
                raise PowerCutError
            return loop(state, pools)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(general_training.metalstm, "make_mixture_loop", make_cut)
        with pytest.raises(PowerCutError):
            general.main(["--folder", str(cut), *WORDS])
    assert not (cut / "gates.npz").exists()
    assert general.main(["--folder", str(cut), *WORDS]) == 0
    a, b = (rules.load_rule(folder / "gates.npz") for folder in (whole, cut))
    for name in ("hidden", "output"):
        for part in ("kernel", "bias"):
            np.testing.assert_array_equal(a.params[name][part], b.params[name][part])
    assert a.info["best_step"] == b.info["best_step"]
    assert a.spec == {"rule": "moment_gates", "hidden_size": 2}
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")
         if line] for folder in (whole, cut)
    ]  # fmt: skip
    scores = [
        {row["step"]: row["log_ratio"] for row in of if row["kind"] == "validation"}
        for of in rows
    ]
    assert scores[0] == scores[1]
    assert len(set(scores[0].values())) == 3
    assert set(scores[0]) == {0, 3, 6}
    (whole / "gates.npz").unlink()
    assert general.main(["--folder", str(whole), *WORDS, "--export"]) == 0
    assert (whole / "gates.npz").stat().st_size < 100_000


def test_an_ablation_is_a_flag(tmp_path, capsys):
    """Another rule, one family, no progress."""
    words = ["--rule", "moment_network", "--families", "noisy", "--tell-progress", "0"]
    words = [*WORDS, *words, "--backprop", "none", "--meta-steps", "2"]
    assert general.main(["--folder", str(tmp_path), *words]) == 0
    saved = rules.load_rule(tmp_path / "gates.npz")
    assert saved.spec == {"rule": "moment_network", "hidden_size": 2}
    assert saved.info["trained_on"] == "1 families of small problems"
    other = ["--folder", str(tmp_path / "x"), *WORDS, "--families", "nosuch"]
    assert general.main(other) == 2
    assert "--families nosuch: not known" in capsys.readouterr().err
