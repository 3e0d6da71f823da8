"""The meta-training of the rule for ordinary training: resumed to the bit, exported."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

from experiments.common.cli import parse
from experiments.learned_optimizer import (
    general,
    general_training,
    general_validation,
    meta_tasks,
)
from metalstm import rules
from metalstm.learned_optimizers import problems

WORDS = [
    "--meta-steps", "6", "--linear-steps", "2", "--horizon", "2", "6",
    "--num-pairs", "2", "--validation-steps", "4", "--validation-instances", "2",
    "--validate-every", "3", "--save-every", "2", "--hidden-size", "2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch):
    quadratics = meta_tasks.Task("quadratics", problems.quadratics(2), ())
    noisy = meta_tasks.Task("noisy", meta_tasks.noisy_quadratics(3), (), costly=True)
    training = lambda with_noise: (quadratics, noisy)  # noqa: E731
    monkeypatch.setattr(general_training, "training_tasks", training)
    for module in (general_training, general_validation):
        monkeypatch.setattr(module, "validation_tasks", lambda: (quadratics, noisy))


class PowerCutError(Exception):
    pass


def test_a_run_that_is_cut_resumes_to_the_bit_and_exports_its_best(
    tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert general.main(["--folder", str(whole), *WORDS]) == 0
    make = general_training.make_meta_step

    def make_cut(*args):
        loop = make(*args)

        def run(state, pools):
            if int(state.step) == 5:
                raise PowerCutError
            return loop(state, pools)

        return run

    with monkeypatch.context() as patch:
        patch.setattr(general_training, "make_meta_step", make_cut)
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
    words = a.info["command"].split()
    assert words[:3] == ["python", "-m", "experiments.learned_optimizer.general"]
    read = lambda words: parse(general.Config(), words, module="", description="")  # noqa: E731
    assert read(words[3:]) == read(WORDS)
    assert a.info["validation"]["log_ratio"] == scores[0][a.info["best_step"]]
    file = tmp_path / "v1.npz"
    assert general.main(["--folder", str(whole), "--export", str(file)]) == 0
    assert (whole / "validation.png").exists()
    assert file.stat().st_size < 100_000
    again = rules.load_rule(file)
    assert {**again.info, "core_hours": 0} == {**a.info, "core_hours": 0}


def test_an_ablation_is_a_flag(tmp_path, capsys):
    """Another rule, one family, no progress."""
    words = ["--rule", "moment_network", "--families", "noisy", "--tell-progress", "0"]
    words = [*WORDS, *words, "--meta-steps", "2"]
    assert general.main(["--folder", str(tmp_path), *words]) == 0
    saved = rules.load_rule(tmp_path / "gates.npz")
    assert saved.spec == {"rule": "moment_network", "hidden_size": 2}
    assert "--families noisy --" in saved.info["command"]
    assert saved.info["trained_on"] == "small networks of 2 to 6 updates: noisy"
    other = ["--folder", str(tmp_path / "x"), *WORDS, "--families", "nosuch"]
    assert general.main(other) == 2
    assert "--families nosuch: not known" in capsys.readouterr().err


ABLATIONS = ["--no-tell-length", "--no-noisy-data", "--no-antithetic"]


@pytest.mark.parametrize("estimator", ["pes", "backprop"])
def test_segments_are_an_estimator(estimator, tmp_path):
    words = ["--estimator", estimator, "--segment", "2", "--learning-rate", "1"]
    assert general.main(["--folder", str(tmp_path), *WORDS, *words]) == 0
    saved = rules.load_rule(tmp_path / "gates.npz")
    fresh = rules.moment_gates(hidden_size=2).init(jax.random.key(0), {})
    moved = saved.params["step"]["kernel"] - fresh["step"]["kernel"]
    assert 0.01 < abs(moved).max() <= 0.1 * saved.info["best_step"]


def test_rules_are_compared_on_the_same_instances(tmp_path, capsys):
    """By hand: means of pairs, their standard error, each rule told what it was."""
    for name, flags in (("a", []), ("b", ABLATIONS)):
        words = ["--folder", str(tmp_path / name), *WORDS, *flags]
        assert general.main(words) == 0
    files = [str(tmp_path / name / "gates.npz") for name in "ab"]
    words = ["--folder", str(tmp_path / "e"), "--evaluate", ",".join(["fresh", *files])]
    words += ["--validation-instances", "3", "--validation-steps", "4"]
    capsys.readouterr()
    assert general.main(words) == 0
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "e" / "validation-3x4.json").read_text())
    adamw, fresh, a, b = (kept[name] for name in kept)
    assert np.shape(b["noisy"]) == (3,)
    pairs = [np.subtract(b[task], adamw[task]) for task in ("quadratics", "noisy")]
    mean = np.mean(pairs)
    error = np.sqrt(sum(pair.std(ddof=1) ** 2 / 3 for pair in pairs)) / 2
    assert f"{mean:+.3f} ± {error:.3f}" in said
    assert f"{pairs[1].mean():+.3f}" in said
    assert a != fresh != b != a
    row = json.loads((tmp_path / "a/metrics.jsonl").read_text().splitlines()[-1])
    assert row["standard_error"] > 0
    assert general.main(words) == 0  # nothing is measured again
    assert said.endswith(capsys.readouterr().out)
    assert general.main(["--evaluate", str(tmp_path / "none.npz")]) == 2


def test_a_rule_without_the_length_is_told_its_progress():
    rule = rules.moment_gates(hidden_size=2)
    params = rule.init(jax.random.key(0), {})
    theta = {"w": jax.numpy.ones(3)}
    moves = {}
    for hidden in (False, True):
        bound = (general_validation.without_length(rule) if hidden else rule).bind(
            params
        )
        for steps in (100, 2_000):
            tx = rules.with_progress(bound, steps)
            moves[hidden, steps] = tx.update(theta, tx.init(theta), theta)[0]["w"][0]
    assert moves[True, 100] == moves[True, 2_000]
    assert moves[False, 100] != moves[False, 2_000]


def test_the_hidden_units_stay_while_the_linear_part_is_trained():
    config = general.Config(linear_steps=3, std=0.1)
    params = rules.moment_gates(hidden_size=2).init(jax.random.key(0), {})
    early, late = (
        general_training.perturbations(config, params, step) for step in (2, 3)
    )
    assert early["output"] == {"kernel": 0.0, "bias": 0.1}
    assert early["step"] == {"kernel": 0.1}
    assert early["hidden"] == {"kernel": 0.0, "bias": 0.0}
    assert late["hidden"] == {"kernel": 0.05, "bias": 0.05}


def test_evolution_learns_the_step_on_its_own_family(few_tasks):
    """A start whose steps are e^4 shorter: they grow, and runs end lower."""
    config = general.Config(
        meta_steps=30, linear_steps=30, learning_rate=1.0, num_pairs=4,
        horizon=(20, 20), hidden_size=2, families=("noisy",),
    )  # fmt: skip
    rule = rules.moment_gates(hidden_size=2)
    (task,) = general_training._chosen(config)
    optimizer = optax.adam(config.learning_rate, b2=0.99)
    state = general_training.init_state(config, rule, optimizer)
    state.params["output"]["bias"] = state.params["output"]["bias"].at[0].add(-4.0)
    step = general_training.make_meta_step(config, rule, [task], optimizer)
    losses = []
    before = float(state.params["output"]["bias"][0])
    for _ in range(30):
        state, metrics = step(state, [task.data])
        losses.append(float(metrics["loss"][0]))
    assert state.params["output"]["bias"][0] > before + 0.5
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert int(state.step) == 30
