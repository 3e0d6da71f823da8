"""The sinusoid study: what it measures, tabulates, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from experiments.common.study import kept
from experiments.studies import regression, sinusoids
from experiments.studies.regression import Found
from metalstm import algorithms
from metalstm.data import SinusoidSpec, episode_key

TINY = (
    "--methods joint --shot 3 --test-shots 3 --widths 4 --test-steps 2 --meta-steps 4 "
    "--tuning-steps 2 --tasks 2 --inits 2 --test-tasks 6 --validation-tasks 4"
).split()


@pytest.fixture(autouse=True)
def in_an_empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_a_trajectory_ends_where_prediction_does_and_starts_unadapted():
    config = sinusoids.Config(widths=(6,))
    learner = regression.make_learner(config)
    episode = SinusoidSpec(4, queries=7).sample(jax.random.key(3))
    maml = algorithms.maml(learner, 0.02, num_steps=3)
    params = maml.init(jax.random.key(0), episode)
    tx = sinusoids.fixed_sgd(0.02).bind(())

    @tiny.quick_jit
    def both(params):
        path = regression.trajectory(learner, tx, params.learner, episode.support, 3)
        state = params.learner._replace(params=jax.tree.map(lambda p: p[-1], path))
        outputs, _ = learner.apply(state, episode.query.x, norm="batch")
        key = jax.random.key(1)
        predicted = maml.predict(
            params, key, episode.support, episode.query.x, num_classes=None
        )
        return path, outputs, predicted

    path, outputs, predicted = both(params)
    np.testing.assert_allclose(outputs, predicted, rtol=1e-5, atol=1e-6)
    first = jax.tree.map(lambda p: p[0], path)
    tiny.assert_equal(first, params.learner.params)


def test_a_run_writes_what_it_found_and_goes_on_where_it_was(capsys):
    line = [*TINY, "--workdir", "run"]
    assert sinusoids.main(line) == 0
    printed = capsys.readouterr().out
    assert "Paired difference to joint" in printed
    results = json.loads(Path("run/results.json").read_text())
    joint = results["methods"]["joint"]
    with np.load("run/methods/scratch.npz") as saved:
        assert saved["scores"].size == 12
    with np.load("run/methods/joint.npz") as saved:
        assert saved["scores"].size == 12
        assert saved["losses"].shape == (2, 2)
        of_inits = saved["errors"][0].mean(1)
    assert of_inits.shape == (2, 3)
    found = joint["errors"]["3"]
    np.testing.assert_allclose(of_inits.mean(0), found["mean"], rtol=1e-5)
    assert (of_inits[0] != of_inits[1]).all(), "initialisations differ"
    for name in ("error_by_step.png", "functions.png", "spread.png", "table.md"):
        assert Path("run", name).read_bytes()
    before = Path("run/methods/joint.npz").read_bytes()
    assert sinusoids.main(line) == 0
    assert "rates" not in capsys.readouterr().out, "nothing was trained again"
    assert Path("run/methods/joint.npz").read_bytes() == before
    assert sinusoids.main([*line, "--seed", "1"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_tasks_are_the_same_whatever_the_initialisation():
    """A task is a function of (seed, split, i); only theta_0 reads the other seed."""
    config = sinusoids.Config(
        methods=("joint",), shot=3, widths=(4,), tuning_steps=1, meta_steps=1, tasks=2
    )
    joint = sinusoids.make_methods(config)["joint"]
    # an outer rate of 0: the loss of one meta-step is that of theta_0 on its tasks
    trainer = regression.Trainer(joint, config)
    params, (loss,) = trainer.train((0.01, 0.0), 5, 1)
    again, (same,) = trainer.train((0.01, 0.0), 5, 1)
    other, (different,) = trainer.train((0.01, 0.0), 6, 1)
    assert loss == same != different
    tiny.assert_equal(params, again)
    assert tiny.max_difference(params, other) > 0.01
    spec = regression.train_spec(config)
    total = 0.0
    for task in range(2):
        key = episode_key(config.seed + regression._TRAIN_SEED, "train", 0, task)
        support = joint.build(0.01).train_sampler(spec).sample(key).support
        outputs, _ = regression.make_learner(config).apply(
            other.learner, support.x, norm="batch"
        )
        total += float(jnp.square(outputs - support.y).mean()) / 2
    np.testing.assert_allclose(total, different, rtol=1e-5)


def test_every_method_takes_a_meta_step_from_state_to_state():
    names = tuple(name for name in sinusoids.METHODS if name != "scratch")
    config = sinusoids.Config(
        methods=names, shot=2, widths=(3,), inner_steps=1, reptile_steps=1, tasks=2
    )
    rate = jnp.float32(0.01)
    for name, method in sinusoids.make_methods(config).items():
        trainer = regression.Trainer(method, config)
        state = jax.eval_shape(trainer._start, rate, jnp.uint32(0))
        after, metrics = jax.eval_shape(trainer._advance, state, rate, rate, rate)
        assert after == state, name
        assert metrics["loss"].shape == (trainer.call,), name
        learns_rule = name in ("meta-sgd", "meta-lstm")
        assert bool(jax.tree.leaves(state.params.rule)) == learns_rule, name


def rows_of(tables) -> dict[str, list[list[str]]]:
    """The cells of each method, table by table."""
    found: dict[str, list[list[str]]] = {}
    for name, *cells in (row for table in tables for row in table.cells):
        found.setdefault(name, []).append(cells)
    return found


def test_tables_by_hand():
    joint = np.zeros((2, 3, 2)) + np.array([1.0, 0.8])
    maml = np.zeros((2, 3, 2)) + np.array([2.0, 0.5])
    maml[1, :, 1] += 0.2  # the second initialisation
    maml[:, 2, 0] += 0.3  # a hard task, before
    rows = rows_of(sinusoids.tables(10, {"maml": maml, "joint": joint}))
    spread = 1.96 * np.std([2.0, 2.0, 2.3], ddof=1) / np.sqrt(3)
    assert rows["maml"] == [
        [f"2.100 ± {spread:.3f}", "0.600 ± 0.000"],
        [f"+1.100 ± {spread:.3f}", "-0.200 ± 0.000"],
        ["2.100 to 2.100 (0.000)", f"0.500 to 0.700 ({0.1 * np.sqrt(2):.3f})"],
    ]
    assert len(rows["joint"]) == 2, "no difference to itself"


def test_explosions_are_counted_and_have_no_mean():
    joint = np.ones((2, 3, 2))
    maml = np.full((2, 3, 2), 0.5)
    maml[0, 1, 1] = np.inf
    rows = rows_of(sinusoids.tables(5, {"maml": maml, "joint": joint}))
    assert rows["maml"][0] == ["0.500 ± 0.000", "median 0.500, 1 of 6 diverged"]
    assert rows["maml"][1] == ["-0.500 ± 0.000", "diverged"]
    assert rows["maml"][2][1] == "diverged"


def test_what_is_read_back_marks_explosions(tmp_path):
    errors = np.array([[[[1.0, np.nan], [2.0, 1e9]]]])
    empty = np.array([])
    made = [Found(empty, empty, errors, empty, 7, 1.5)]
    for _ in range(2):  # made, then read
        found = kept(tmp_path / "methods" / "x.npz", Found, made.pop)
        again = regression.without_explosions(found)
        np.testing.assert_array_equal(again.errors, [[[[1, np.inf], [2, np.inf]]]])
        assert (again.meta_parameters, again.cpu_seconds) == (7, 1.5)


def test_a_rate_at_the_edge_of_its_grid_is_marked():
    config = sinusoids.Config(methods=("fomaml",))
    method = sinusoids.make_methods(config)["fomaml"]
    inner, outer = method.inner_rates, method.outer_rates
    assert len(inner) * len(outer) == 12

    def rates(*best):
        scores = np.ones((len(inner), len(outer)))
        scores[best] = 0
        found = Found(scores, None, None, None, 1, 1.0)
        table = sinusoids.training_table({"fomaml": found}, {"fomaml": method})
        return table.cells[0][1:3]

    assert rates(1, 1) == [f"{inner[1]:.3g}", f"{outer[1]:.3g}"]
    assert rates(0, -1) == [f"{inner[0]:.3g}*", f"{outer[-1]:.3g}*"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--methods mamml", "--methods mamml: did you mean maml?"),
        ("--methods maml,maml", "--methods names maml twice: drop one"),
        ("--test-shots 0", "--test-shots 0: choose 1 or more"),
        ("--inits 1", "--inits 1: choose 2 or more"),
        ("--preset demmo", "--preset demmo: did you mean demo?"),
    ],
)
def test_mistakes_are_named(line, message, capsys):
    assert sinusoids.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_flags_override_a_preset():
    config = sinusoids.STUDY.parse("--preset demo --methods joint".split())
    assert (config.methods, config.inits) == (("joint",), 2)
