"""The learned-optimizer command line: what it writes, refuses, and goes on with."""

from __future__ import annotations

import inspect
import json
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

import metalstm.learned_optimizers
from experiments.common.loop import Loop
from experiments.common.run_folder import Metrics
from experiments.common.saved_options import to_json
from experiments.learned_optimizer import (
    __main__ as learned_optimizer,
)
from experiments.learned_optimizer import (
    held_out_cells,
    measuring,
    options,
    problems,
    running,
    studies,
)
from experiments.learned_optimizer.command_line import parse, stages
from experiments.learned_optimizer.measuring import Measured, Optimizer
from experiments.learned_optimizer.options import (
    FAMILIES,
    RULES,
    Problem,
    Training,
    read_presets,
    rule_spec,
)
from metalstm import data, rules
from metalstm.learned_optimizers import curves
from metalstm.plots import Losses
from metalstm.runtime import checkpoints

TINY = (
    "--num-tasks 2 --unroll-steps 2 --horizon 4 "
    "--meta-steps 6 --validate-every 3 --save-every 2 --validation-instances 4 "
    "--steps 4 --instances 6 --tune-instances 2 --long-steps 8 --long-instances 3 "
    "--baselines sgd,momentum --few-baselines sgd"
).split()
DIM = ["--dim", "2"]
L2L = "--l2l.hidden-size 3 --l2l.num-layers 1".split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def grids_as_they_are(monkeypatch):
    """Tuning tries the rates of its first grid: of another size it compiles again."""
    real = measuring.tune
    monkeypatch.setattr(
        measuring, "tune", lambda score, grid, **grow: real(score, grid)
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One finished run of two rules with every study it can have."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    line = ["--rules", "l2l,gates", "--study", "comparison,generalisation,cost"]
    real = problems.variants
    with pytest.MonkeyPatch.context() as patch:
        # one variant: every one compiles each optimizer again
        patch.setattr(studies, "variants", lambda p: dict(list(real(p).items())[:1]))
        given = [*TINY, *DIM, *L2L, *line, "--workdir", str(folder)]
        assert learned_optimizer.main(given) == 0
    return folder


def arrays(folder: Path, which: str = "state", rule: str = "l2l") -> list[np.ndarray]:
    """All arrays of the newest checkpoint."""
    path = folder / "checkpoints" / rule / which
    return checkpoints.restore(path, None).state


def assert_same_run(left: Path, right: Path, rule: str = "l2l") -> None:
    for which in ("state", "best"):
        pairs = zip(arrays(left, which, rule), arrays(right, which, rule), strict=True)
        for a, b in pairs:
            np.testing.assert_array_equal(a, b)
    one, two = (
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in Metrics(folder, counter="step").read()
            if row["method"] == rule
        ]
        for folder in (left, right)
    )
    assert one == two


def test_a_run_writes_its_folder(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["rules"]) == ["l2l", "gates"]
    about = results["rules"]["l2l"]
    saved = rules.load_rule(finished / "rules" / "l2l.npz")
    assert saved.spec == about["spec"]
    assert saved.spec["hidden_size"] == 3
    assert about["meta_steps"] == 6
    assert saved.info["trained_on"] == results["problem"]
    learned = sum(np.size(x) for x in jax.tree.leaves(saved.params))
    assert about["learned_parameters"] == learned
    for name in ("learning_curve", "comparison", "sweeps", "generalisation"):
        assert (finished / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    rows = Metrics(finished, counter="step").read()
    assert {row["kind"] for row in rows} == {"train", "validation"}
    assert [r["step"] for r in rows if r["kind"] == "validation"] == [3, 6, 3, 6]


def test_the_comparison_pairs_the_same_problems(finished):
    rows = json.loads((finished / "comparison.json").read_text())
    assert [r["optimizer"] for r in rows] == ["l2l", "gates", "sgd", "momentum"]
    assert {r["instances"] for r in rows} == {6}
    assert "log_difference" not in rows[0]
    curves = {}
    for path in (finished / "curves").glob("curve-*.npz"):
        with np.load(path) as saved:
            key = json.loads(str(saved["key"]))
            if key["family"]["dim"] == 2 and key["num_steps"] == 4:
                curves[json.dumps(key["optimizer"])] = saved["values"]
    sgd = next(v for o, v in curves.items() if '"sgd"' in o)
    assert sgd.shape == (6, 5)
    first = {v[:, 0].tobytes() for v in curves.values()}
    assert len(first) == 1, "every optimizer starts from the same points"
    row = rows[2]
    assert row["mean"] == pytest.approx(sgd[:, -1].mean(), rel=1e-5)
    for row in rows[2:]:
        assert isinstance(row["inside"], bool)
    table = (finished / "comparison.md").read_text()
    assert "| momentum " in table
    assert f"--evaluate {finished} --study comparison" in table


def test_the_generalisation_grid(finished):
    rows = json.loads((finished / "generalisation.json").read_text())
    found = list(dict.fromkeys(row["problem"] for row in rows))
    assert found == [
        "as in meta-training", "4 parameters", "8 updates, after 4", "8 updates",
    ]  # fmt: skip
    late = [r for r in rows if r["problem"] == "8 updates"]
    assert {r["updates"] for r in late} == {8}
    assert {r["instances"] for r in late} == {3}
    assert [r["optimizer"] for r in late] == ["l2l", "gates", "sgd", "adam-cosine"]


def test_cost_is_measured_beside_adam(finished):
    rows = {r["optimizer"]: r for r in json.loads((finished / "cost.json").read_text())}
    assert rows["adam"]["times_adam"] == 1
    assert 8 <= rows["adam"]["state_bytes_per_parameter"] < 8.01
    # hidden and cell of 3 units
    assert 24 <= rows["l2l"]["state_bytes_per_parameter"] < 24.1


def test_evaluate_measures_nothing_twice(finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    before = (folder / "comparison.md").read_text()
    (folder / "comparison.md").unlink()

    def never(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(measuring.curves, "loss_curves", never)
    monkeypatch.setattr(measuring.curves, "sweep", never)
    line = ["--evaluate", str(folder), "--study", "comparison"]
    assert learned_optimizer.main(line) == 0
    after = (folder / "comparison.md").read_text()
    assert after == before.replace(str(finished), str(folder))
    assert "log-loss − l2l" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="measured again"):
        learned_optimizer.main([*line, "--test-seed", "1"])
    assert learned_optimizer.main([*line, "--baselines", "momentum,sgd"]) == 0
    after = (folder / "comparison.md").read_text()
    assert after.rstrip().endswith("--study comparison --baselines momentum,sgd")


def test_a_trained_rule_is_compared_as_it_is(finished, capsys):
    path = finished / "rules" / "l2l.npz"
    line = [*TINY, *DIM, "--rules", f"mine={path}", "--study", "comparison"]
    line += ["--baselines", "sgd", "--curves", str(finished / "curves")]
    assert learned_optimizer.main([*line, "--workdir", "other"]) == 0
    capsys.readouterr()
    rows = json.loads(Path("other/comparison.json").read_text())
    theirs = json.loads((finished / "comparison.json").read_text())
    assert rows[0]["optimizer"] == "mine"
    assert rows[0]["mean"] == theirs[0]["mean"]
    assert not Path("other/checkpoints").exists()


@pytest.mark.usefixtures("grids_as_they_are")
def test_a_rule_that_was_told_its_progress_is_told_it_in_tests(tmp_path):
    folder = tmp_path / "run"
    line = [*TINY, *DIM, "--rules", "moment-gates", "--tell-progress", "1"]
    line += ["--moment-gates.hidden-size", "2", "--estimator", "pes"]
    line += ["--study", "comparison", "--baselines", "none", "--workdir", str(folder)]
    assert learned_optimizer.main(line) == 0
    (row,) = json.loads((folder / "comparison.json").read_text())
    tx = rules.load_rule(folder / "rules" / "moment-gates.npz").transform()
    family = problems.build_family(parse(line).problem, ())
    losses = [
        curves.loss_curves(family, one, (), num_instances=6, num_steps=4)[:, -1].mean()
        for one in (rules.with_progress(tx, 4), tx)
    ]
    assert row["mean"] == pytest.approx(losses[0], rel=1e-5)
    assert row["mean"] != pytest.approx(losses[1], rel=1e-3)


def tiny_images(name, data_dir=None, *, image_size=None) -> data.LabelledImages:
    """Noisy copies of a random picture a class."""
    size, rng = image_size or 4, np.random.default_rng(0)
    y = np.arange(40, dtype=np.int32) % 3
    x = rng.uniform(0, 255, (3, size, size, 1))[y] + rng.normal(
        0, 20, (40, size, size, 1)
    )
    images = data.ImageData(
        jnp.asarray(np.clip(x, 0, 255).astype(np.uint8)), jnp.asarray(y)
    )
    return data.LabelledImages(name, images, images, ("a", "b", "c"), f"tiny-{size}")


@pytest.mark.slow
@pytest.mark.usefixtures("grids_as_they_are")
def test_the_six_panels(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(problems, "load_image_data", tiny_images)
    real = problems.variants
    monkeypatch.setattr(studies, "variants", lambda p: {"ReLU": real(p)["ReLU"]})
    folder = tmp_path / "run"
    line = [*TINY, "--problem", "mlp", "--hidden", "2", "--train-image-size", "3"]
    # not the LSTM of `finished`, which would compile for each panel
    line += ["--rules", "learned-sgd", "--study", "panels", "--eval-batch", "8"]
    line += ["--batch-size", "5", "--instances", "3", "--workdir", str(folder)]
    line += ["--long-steps", "8", "--long-instances", "2"]
    assert learned_optimizer.main([*line, "--quadratics-run", str(finished)]) == 0
    rows = json.loads((folder / "panels.json").read_text())
    assert list(dict.fromkeys(row["problem"] for row in rows)) == [
        "quadratics", "glyphs, 2 sigmoid units",
        "glyphs, 2 sigmoid units, updates 4 to 8", "ReLU",
        "glyphs, 2 sigmoid units, 8 updates", "ReLU, 8 updates",
    ]  # fmt: skip
    sgd = [row for row in rows if row["optimizer"] == "sgd"]
    assert [row["updates"] for row in sgd] == [4, 4, 8, 4, 8, 8]
    assert [row["instances"] for row in sgd] == [6, 3, 3, 3, 2, 2]
    learned = [r["optimizer"] for r in rows if r["optimizer"] != "sgd"]
    assert learned == ["l2l", "gates", *["learned-sgd"] * 5]
    assert (folder / "panels.png").read_bytes()[:4] == b"\x89PNG"
    table = (folder / "panels.md").read_text()
    assert f"--study panels --quadratics-run {finished}" in table
    about = json.loads((folder / "config.json").read_text())["data"]
    assert (about["classes"], about["checksum"]) == (3, "tiny-4")
    assert "quadratics" in capsys.readouterr().out


@pytest.mark.usefixtures("grids_as_they_are")
def test_who_leaves_a_plateau(finished, tmp_path):
    folder = tmp_path / "run"
    trained = f"gates={finished / 'rules' / 'gates.npz'}"
    line = [
        *TINY,
        *DIM,
        "--problem",
        "plateau",
        "--rules",
        f"{trained},gates-f1",
        "--study",
    ]
    line += ["plateau", "--escape-below", "0.9", "--workdir", str(folder)]
    assert learned_optimizer.main(line) == 0
    rows = {
        r["optimizer"]: r for r in json.loads((folder / "plateau.json").read_text())
    }
    assert list(rows) == ["gates", "gates-f1", "sgd"]
    assert 0 <= rows["gates"]["escaped"] <= 1
    assert 0.9 < rows["gates"]["mean_forget"] < 1
    assert rows["gates-f1"]["mean_forget"] == 1, "its gate is fixed"
    assert "mean_forget" not in rows["sgd"]
    assert (folder / "plateau.png").read_bytes()[:4] == b"\x89PNG"


def test_ctrl_c_saves_and_going_on_is_the_same_run(
    finished, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)
    real, reports = Loop._report, []

    def report(self, step, means):
        real(self, step, means)
        reports.append(step)
        if len(reports) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Loop, "_report", report)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    line = [*TINY, *DIM, *L2L, "--study", "none", "--workdir", str(folder)]
    try:
        assert learned_optimizer.main(line) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"--resume {folder}" in capsys.readouterr().out
    assert not (folder / "results.json").exists()
    assert checkpoints.latest(folder / "checkpoints" / "l2l" / "state") == 3
    assert learned_optimizer.main(["--resume", str(folder)]) == 0
    assert "resuming at meta-step 3" in capsys.readouterr().out
    assert_same_run(finished, folder)


def test_more_meta_steps_and_more_rules_go_on(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    line = ["--resume", str(folder), "--meta-steps", "8", "--study", "none"]
    # how much is kept for a derivative changes none, so it may change too
    line += ["--rules", "l2l,learned-sgd", "--keep", "segments"]
    assert learned_optimizer.main(line) == 0
    results = json.loads((folder / "results.json").read_text())
    assert [r["meta_steps"] for r in results["rules"].values()] == [8, 8]


def test_a_staged_run_goes_on_as_if_never_stopped(tmp_path):
    def run(folder, *line):
        line = [*line, "--stages", "2:2,4:2", "--meta-steps", "6", "--study", "none"]
        line += ["--first-horizon", "2", "--stagger"]
        given = [*TINY, *DIM, "--rules", "learned-sgd", "--workdir", str(folder)]
        assert learned_optimizer.main([*given, *line]) == 0

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(whole)
    shutil.copytree(whole, stopped)
    # as killed after the checkpoint of the second stage
    for which in ("state", "best"):
        folder = stopped / "checkpoints" / "learned-sgd" / which
        for step in checkpoints.steps(folder):
            if step > 4:
                shutil.rmtree(folder / str(step))
    assert checkpoints.latest(stopped / "checkpoints/learned-sgd/state") == 4
    assert learned_optimizer.main(["--resume", str(stopped)]) == 0
    assert_same_run(whole, stopped, "learned-sgd")
    starts = [r["step"] for r in Metrics(whole, counter="step").read()]
    assert max(starts) == 6


def test_minutes_stop_and_evaluate_says_what_is_missing(tmp_path, capsys):
    folder = tmp_path / "run"
    line = [*TINY, *DIM, *L2L, "--minutes", "0.001", "--study", "none"]
    line += ["--workdir", str(folder)]
    assert learned_optimizer.main(line) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["rules"]["l2l"]["meta_steps"] >= 1
    # the time is over already
    assert learned_optimizer.main(["--resume", str(folder), "--minutes", "1e-4"]) == 0
    capsys.readouterr()
    assert learned_optimizer.main(["--evaluate", str(folder), "--rules", "v2"]) == 2
    assert "has no trained v2 yet" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, monkeypatch):
    real = problems.build_family

    def broken(problem, data):
        family = real(problem, data)
        return family._replace(loss=lambda *a: jnp.nan * family.loss(*a))

    monkeypatch.setattr(problems, "build_family", broken)
    folder = tmp_path / "run"
    line = [*TINY, *DIM, *L2L, "--workdir", str(folder)]
    assert learned_optimizer.main(line) == 2
    message = capsys.readouterr().err
    assert "not finite at step 1" in message
    assert "the state before that step is kept" in message
    assert checkpoints.latest(folder / "checkpoints" / "l2l" / "state") is not None
    state = [a for a in arrays(folder) if a.dtype.kind == "f" and a.size > 1]
    assert len(state) > 4
    # the losses at theta_0 are infinite until the first segment has computed them
    (first_loss,) = [a for a in state if not np.isfinite(a).all()]
    assert np.isposinf(first_loss).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset nmist-mlp", "did you mean mnist-mlp"),
        ("--rules l2l,v3", "--rules v3"),
        ("--rules l2l,l2l", "names l2l twice"),
        ("--rules mine=nowhere.npz", "there is no such file"),
        ("--rules adam=nowhere.npz", "a baseline has that name"),
        ("--rules ,", "--rules is empty"),
        ("--baselines adan", "did you mean adam"),
        ("--study comparision", "did you mean comparison"),
        ("--horizon 30", "is not a multiple of --unroll-steps 20"),
        ("--first-horizon 30", "--first-horizon 30 is not a multiple of"),
        ("--minutes 1 --schedule cosine", "need --meta-steps"),
        ("--stages 20", "give UNROLL:META_STEPS"),
        ("--stages 20:2000", "leave none of --meta-steps 2000"),
        ("--stages 20:7 --steps-per-call 2", "not a multiple of --steps-per-call 2"),
        ("--steps-per-call 7", "is not a multiple of --steps-per-call 7"),
        ("--record-every 7", "is not a multiple of --record-every 7: choose 98"),
        ("--scaling 2 1", "choose 0 < low <= high"),
        ("--escape-below 1.5", "--escape-below 1.5: choose 1 or less"),
        ("--num-tasks 0", "--num-tasks 0: choose 1 or more"),
        ("--learning-rate 0", "choose a number above 0"),
        ("--l2l.hidden-size 0", "hidden_size=0"),
        ("--l2l.shortcut 1", "features='moments'"),
        ("--resume nowhere", "is not a run folder"),
        ("--evaluate nowhere", "is not a run folder"),
        ("--resume a --workdir b", "is not a run folder"),
        ("--problem mlp --train-image-size 14", "image_size=14: glyphs are 28"),
        ("--problem mlp --dataset omniglott --data-dir .", "omniglott"),
        ("--study panels", "the six panels are of an mlp"),
        ("--problem sinusoids --study plateau", "choose --problem plateau"),
    ],
)
def test_a_mistake_is_one_line_with_its_remedy(line, message, capsys, monkeypatch):
    monkeypatch.setattr(running, "meta_train", None)
    assert learned_optimizer.main(line.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not list(Path().rglob("config.json")), "nothing was written"


def test_a_rule_of_the_package_needs_no_path(tmp_path):
    config = parse(["--rules", "mine=gates-v1", "--study", "none"])
    (rule,) = measuring.saved_rules(config, tmp_path)
    assert (rule.name, rule.told) == ("mine", True)


@pytest.mark.parametrize(
    "flags", ["--meta-steps 7", "--l2l.hidden-size 9", "--seed 4", "--workdir other"]
)
def test_an_evaluation_refuses_what_would_change_the_meta_training(
    finished, flags, capsys
):
    before = {path: path.read_bytes() for path in finished.glob("*.md")}
    line = ["--evaluate", str(finished), "--study", "comparison", *flags.split()]
    assert learned_optimizer.main(line) == 2
    assert "--evaluate" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_what_was_hidden_from_a_rule_stays_hidden(tmp_path):
    made = rules.moment_gates(hidden_size=2)
    weights, theta = made.init(jax.random.key(0), {}), {"w": jnp.ones(3)}
    spec, moves = {"rule": "moment_gates", "hidden_size": 2}, {}
    for name, trained in (
        ("all", {"tell_progress": 1.0}),
        ("length", {"tell_progress": 1.0, "tell_length": False}),
        ("progress", {"tell_progress": 0.0}),
    ):
        path = tmp_path / f"{name}.npz"
        rules.save_rule(path, spec, weights, info={"config": trained})
        for steps in (100, 2_000):
            tx = held_out_cells.gate_rule(path).make(1.0, steps)
            moves[name, steps] = tx.update(theta, tx.init(theta), theta)[0]["w"][0]
    assert moves["all", 100] != moves["all", 2_000]
    assert moves["length", 100] == moves["length", 2_000]
    assert moves["progress", 100] == moves["progress", 2_000]


def test_a_flag_that_another_rule_or_problem_has_is_not_known(capsys):
    for line in ("--v2.memory.p 5", "--problem plateau --init-std 1"):
        assert learned_optimizer.main(line.split()) == 2
        assert line.split()[-2] in capsys.readouterr().err


def test_help_shows_what_one_rule_needs_and_the_rest_by_topic(capsys):
    def shown(*line):
        with pytest.raises(SystemExit, match="0"):
            learned_optimizer.main([*line])
        lines = capsys.readouterr().out.splitlines()
        return {word for line in lines for word in line.strip("│ ").split()[:1]}

    flags = shown("--help")
    assert {"--dim", "--num-tasks"} <= flags
    assert not {"--l2l.hidden-size", "--hidden", "--instances"} & flags
    assert sum(flag.startswith("--") for flag in flags) <= 45
    of_rule = shown("--help", "rule")
    assert "--l2l.hidden-size" in of_rule
    assert "--v2.memory.p" not in of_rule
    assert "--v2.memory.p" in shown("--rules", "v2", "--help", "rule")
    assert "--hidden" in shown("--problem", "mlp", "--help")
    assert "--num-tasks" not in shown("--help", "test")
    assert "--instances" in shown("--help", "test")


def test_every_preset_and_every_rule_can_be_built():
    for name in read_presets():
        assert parse(["--preset", name]).run.preset == name
    params = {"conv": jnp.zeros((3, 3, 1, 2)), "dense": jnp.zeros((2, 2))}
    for separate in ("none", "conv-or-dense", "matrix-or-vector"):
        config = parse(["--separate", separate, "--gradient-factor", "2"])
        for name in RULES:
            rule = rules.build_rule(rule_spec(name, config))
            learned = jax.eval_shape(rule.init, jax.random.key(0), params)
            assert jax.tree.leaves(learned)


def test_options_are_the_constructors_arguments():
    """Names and defaults, so that flags can be passed on as they are."""
    kinds = [
        (options.L2L, rules.l2l, {}),
        (options.LstmGates, rules.lstm_gates, {"hidden_size": 20}),
        (options.Memory, rules.gradient_memory, {}),
        (options.LearnedSgd, rules.learned_sgd, {}),
        (Training, metalstm.learned_optimizers.learned_optimizer, {"num_tasks": 16}),
    ]
    for one in options.FAMILIES.values():
        make = getattr(metalstm.learned_optimizers.problems, to_json(one)["family"])
        kinds.append((type(one), make, {}))
    for kind, make, ours in kinds:
        arguments = inspect.signature(make).parameters
        for name, value in msgspec.structs.asdict(kind()).items():
            expected = ours.get(name, arguments[name].default)
            assert value == expected, f"{kind.__name__}.{name}"


def test_options_reach_into_a_composed_rule():
    config = parse(
        "--rules v2,v2-f1 --v2.memory.p 5 --v2.gates.p 7 --v2-f1.memory.p 3".split()
    )
    spec = rule_spec("v2", config)
    assert (spec["memory"]["hidden_size"], spec["memory"]["p"]) == (20, 5)
    assert (spec["gates"]["p"], spec["gates"]["forget"]) == (7, "gate")
    assert spec["gates"]["forget_bias"] == [4.0, 5.0]
    spec = rule_spec("v2-f1", config)
    assert (spec["gates"]["forget"], spec["memory"]["p"]) == ("one", 3)


def test_the_curriculum_doubles_in_the_first_half():
    line = "--meta-steps 80 --unroll-steps 20 --first-horizon 40 --horizon 200".split()
    config = parse(line)
    (stage,) = stages(config)
    horizon = running._horizon(config, stage)
    at = [int(horizon(step)) for step in (0, 9, 10, 19, 20, 29, 30, 79)]
    assert at == [40, 40, 80, 80, 160, 160, 200, 200]
    assert running._horizon(parse([*line, "--first-horizon", "200"]), stage) == 200
    staged = parse([*line, "--stages", "20:30,40:10"])
    found = [tuple(stage) for stage in stages(staged)]
    assert found == [(20, 20, 0, 30), (40, 40, 30, 40), (20, 200, 40, 80)]
    first, _, last = stages(staged)
    assert running._horizon(staged, first) == 20
    assert int(running._horizon(staged, last)(5)) == 80  # 20 meta-steps for four


def test_a_divergence_is_never_free():
    steps = np.array([0, 10])
    good = np.array([[1.0, 0.1]] * 10)
    bad = good.copy()
    bad[0, 1] = np.nan
    bad[1, 1] = 2e3  # finite, and far above its start
    bad[2:, 1] = 1e-6  # better everywhere else
    measured = [
        Measured(Optimizer(name, None, {}), Losses(steps, values))
        for name, values in (("good", good), ("bad", bad))
    ]
    one, two = measuring.rows_of(measured)
    assert (one["mean"], one["share_diverged"]) == (pytest.approx(0.1), 0)
    assert two["share_diverged"] == pytest.approx(0.2)
    assert np.isinf(two["mean"])
    assert np.isinf(two["p99"])
    assert two["median"] == pytest.approx(1e-6)
    logs = np.log([1e3, 1e3] + [1e-6] * 8)
    assert two["mean_log"] == pytest.approx(logs.mean())
    assert two["log_difference"][0] == pytest.approx((logs - np.log(0.1)).mean())
    assert "difference" not in two
    text = measuring.table([one, two], reference="good").markdown()
    assert "20% diverge" in text
    before = [one.part(slice(1)) for one in measured]
    assert measuring.rows_of(before)[1]["mean"] == 1


def test_a_grid_grows_until_it_brackets_the_best_rate(tmp_path, monkeypatch):
    config = parse(["--tune-instances", "3", "--tune-for", "mean"])
    bench = measuring.Bench(config.problem, config.test, tmp_path)
    calls = []

    def sweep(family, rule, grid, data, **options):
        rates = np.asarray(grid["learning_rate"])
        calls.append(rates)
        away = np.log10(rates)[:, None] - 2.6  # beyond sgd's grid
        betas = np.abs(np.asarray(grid.get("momentum", [0.0])) - 0.8)
        scores = (away**2 + betas).reshape(-1)
        return curves.Sweep({}, scores, np.zeros(0), {}, {})

    monkeypatch.setattr(measuring.curves, "sweep", sweep)
    assert bench.tune("momentum", steps=4).beta == 0.8
    calls.clear()
    sgd = bench.tune("sgd", steps=4)
    tuned = sgd.tuned
    assert tuned.inside == {"learning_rate": True}
    assert sgd.beta is None
    assert len(calls[0]) >= 15
    assert tuned.best["learning_rate"] == pytest.approx(10**2.5)
    rates = tuned.grid["learning_rate"]
    assert (np.diff(rates) > 0).all()
    assert len(rates) == sum(map(len, calls))
    assert bench.tune("sgd", steps=4).tuned.best == tuned.best
    before = len(calls)
    bench.tune("sgd", steps=8)
    assert len(calls) > before, "another budget is tuned for itself"


def test_letters_are_not_resized():
    small = Problem("mlp", FAMILIES["mlp"], dataset="mnist", train_image_size=14)
    assert problems.variants(small)["letters"].train_image_size is None
