"""The meta-training of the rule for ordinary training: resumed to the bit, exported."""

from __future__ import annotations

import json

import jax
import numpy as np
import optax
import pytest

from experiments.common.cli import parse
from experiments.common.run_folder import write_json
from experiments.common.saved_options import to_json
from experiments.learned_optimizer import (
    general,
    general_training,
    general_validation,
    meta_tasks,
)
from experiments.learned_optimizer.what_was_told import without_length
from metalstm import rules
from metalstm.learned_optimizers import problems
from metalstm.runtime import checkpoints

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
    validation = lambda: (quadratics, noisy)  # noqa: E731
    monkeypatch.setattr(general_validation, "training_tasks", training)
    monkeypatch.setattr(general_validation, "validation_tasks", validation)


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


def make_score(ratios):
    """Validation that finds these log ratios, one after the other."""

    def score(params):
        ratio = next(ratios)
        row = {"log_ratio": ratio, "standard_error": 0.1, "cpu_seconds": 1.0}
        return -float(ratio), row

    return lambda *_: score


def test_the_untrained_rule_may_remain_the_best(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(general_training, "make_score", make_score(iter(range(9))))
    words = [*WORDS, "--families", "quadratics,noisy", "--meta-steps", "3"]
    assert general.main(["--folder", str(tmp_path), *words]) == 0
    assert "the untrained rule, the best" in capsys.readouterr().out
    saved = rules.load_rule(tmp_path / "gates.npz")
    assert saved.info["best_step"] == 0
    assert saved.info["meta_steps"] == 3
    fresh = rules.moment_gates(hidden_size=2).init(jax.random.key(0), {})
    np.testing.assert_array_equal(
        saved.params["output"]["bias"], fresh["output"]["bias"]
    )
    assert "--families quadratics,noisy " in saved.info["command"]
    assert "folder" not in saved.info["config"]


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
def test_segments_are_an_estimator(estimator, tmp_path, monkeypatch):
    better = make_score(iter(range(9, 0, -1)))
    monkeypatch.setattr(general_training, "make_score", better)
    words = ["--estimator", estimator, "--segment", "2", "--learning-rate", "1"]
    assert general.main(["--folder", str(tmp_path), *WORDS, *words]) == 0
    saved = rules.load_rule(tmp_path / "gates.npz")
    fresh = rules.moment_gates(hidden_size=2).init(jax.random.key(0), {})
    moved = saved.params["step"]["kernel"] - fresh["step"]["kernel"]
    assert saved.info["best_step"] == 6
    assert 0.01 < abs(moved).max() <= 0.1 * 6


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
        bound = (without_length(rule) if hidden else rule).bind(params)
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


def test_a_run_is_validated_on_the_families_that_are_named(tmp_path, capsys):
    words = ["--folder", str(tmp_path), *WORDS, "--meta-steps", "3"]
    assert general.main([*words, "--validation-families", "nosy"]) == 2
    assert "--validation-families" in capsys.readouterr().err
    assert general.main([*words, "--validation-families", "noisy"]) == 0
    info = rules.load_rule(tmp_path / "gates.npz").info
    assert set(info["validation"]) == {"log_ratio", "standard_error", "noisy"}
    assert "--validation-families noisy" in info["command"]
    asked = ["--folder", str(tmp_path), "--evaluate", "fresh", *WORDS[9:13]]
    assert general.main([*asked, "--validation-families", "noisy"]) == 0
    assert "noisy" in (said := capsys.readouterr().out)
    assert "quadratics" not in said
    assert general.main(asked) == 2  # AdamW's losses there are of one family
    assert "other families" in capsys.readouterr().err


def test_evolution_learns_the_step_on_its_own_family(few_tasks):
    """A start whose steps are e^4 shorter: they grow, and runs end lower."""
    config = general.Config(
        meta_steps=30, linear_steps=30, learning_rate=1.0, num_pairs=4,
        horizon=(20, 20), hidden_size=2, families=("noisy",),
    )  # fmt: skip
    rule = rules.moment_gates(hidden_size=2)
    (task,) = general_validation.chosen_training(config)
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


# -- mistakes --------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(general_training, "run", lambda *_: None)


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path, no_training, capsys):
    files = {
        "config.json": '{"config": {"algorithms": ["maml"], "seed": 3}}',
        "metrics.jsonl": '{"method": "maml", "kind": "train", "episode": 1}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert general.main(["--folder", str(tmp_path), *WORDS]) == 2
    said = capsys.readouterr().err
    assert "holds another run" in said
    assert "or another --folder" in said
    assert all((tmp_path / name).read_text() == text for name, text in files.items())
    (tmp_path / "config.json").unlink()
    assert general.main(["--folder", str(tmp_path), *WORDS]) == 2
    assert "holds no run: choose another --folder" in capsys.readouterr().err


def test_a_run_starts_where_rules_were_evaluated(tmp_path, no_training):
    (tmp_path / "validation-2x4.json").write_text("{}")
    assert general.main(["--folder", str(tmp_path), *WORDS]) == 0


def test_the_config_is_there_before_anything_is_measured(tmp_path, monkeypatch):
    def cut(*args):
        raise PowerCutError

    monkeypatch.setattr(general_training, "make_score", cut)
    with pytest.raises(PowerCutError):
        general.main(["--folder", str(tmp_path), *WORDS])
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "words", ["--horizon 10 5", "--horizon 0 5", "--scaling 2.0 0.5"]
)
def test_a_range_is_refused_at_once(words, tmp_path, no_training, capsys):
    assert general.main(["--folder", str(tmp_path / "run"), *words.split()]) == 2
    assert f"{words}: choose 0 < low <= high" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture
def measured(monkeypatch):
    """The rules that were measured, AdamW's among them."""
    found = []

    def measure(name):
        found.append(name)
        return {task: np.full(2, float(len(found))) for task in ("quadratics", "noisy")}

    make = lambda told, rule, tasks: lambda params: measure(told.rule)  # noqa: E731
    monkeypatch.setattr(general_validation, "make_measure", make)
    monkeypatch.setattr(general_validation, "_adamw", lambda *_: measure("adamw"))
    return found


def test_a_kept_result_is_of_the_very_rule(tmp_path, measured):
    words = ["--folder", str(tmp_path), "--evaluate", "fresh"]
    flags = ([], ["--rule", "moment_lstm"], ["--hidden-size", "2"], ["--seed", "1"],
             ["--no-tell-length"], ["--tell-progress", "0"])  # fmt: skip
    for _ in range(2):
        for more in flags:
            assert general.main([*words, *more]) == 0
    rest = ["moment_gates"] * 4
    assert measured == ["adamw", "moment_gates", "moment_lstm", *rest]


def test_what_cannot_be_evaluated_is_named_before_adamw_is_tuned(
    tmp_path, measured, capsys
):
    file = tmp_path / "l2l.npz"
    params = rules.l2l().init(jax.random.key(0), {})
    rules.save_rule(file, {"rule": "l2l"}, params, info={})
    words = ["--folder", str(tmp_path), "--evaluate"]
    assert general.main([*words, str(file)]) == 2
    assert "l2l.npz: the file does not say what" in capsys.readouterr().err
    kept = tmp_path / "validation-2x2000.json"
    for text, message in (
        (
            '{"adamw": {"noisy": [0.1',
            "is damaged (Input data was truncated): delete it",
        ),
        ('{"adamw": {"noisy": [0.1]}}', "is of other families: delete it"),
    ):
        kept.write_text(text)
        assert general.main([*words, "fresh"]) == 2
        assert f"{kept} {message}" in capsys.readouterr().err
    assert measured == []


@pytest.mark.parametrize("text", ["", '{"method": "gates", "kind": "validation", '])
def test_an_export_without_its_validation_is_named(tmp_path, capsys, text):
    config = general.Config(hidden_size=2)
    write_json(tmp_path / "config.json", {"config": to_json(config)})
    params = general_validation.built(config).init(jax.random.key(0), {})
    checkpoints.save(tmp_path / "checkpoints/gates/best", params, step=3)
    (tmp_path / "metrics.jsonl").write_text(text)
    words = ["--folder", str(tmp_path), "--export", str(tmp_path / "x.npz")]
    assert general.main(words) == 2
    said = "metrics.jsonl has no validation of meta-step 3, the best: put a copy"
    assert said in capsys.readouterr().err
