"""The study of learned rules: its cells nest, resume, and start where they should."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import metalstm
from experiments.studies import learned_rules
from experiments.studies.learned_rules import RULES, Config, algorithm_of
from metalstm import data

QUICK = (
    "--meta-steps 2 --test-episodes 4 --train-way 5 --train-queries 1 --seeds 2 "
    "--shots 1"
).split()


@pytest.fixture(scope="module")
def drawn():
    """Meta-parameters of each rule, all of the same theta_0, and an episode."""
    pool = data.load_glyphs().train
    episode = data.EpisodeSpec(5, 1, 2).sample(jax.random.key(0), pool)
    found = {}
    for rule in RULES:
        algorithm = algorithm_of(rule, "first", Config())
        found[rule] = algorithm, algorithm.init(jax.random.key(1), episode)
    return found, episode


def scores(algorithm, params, episode):
    return algorithm.predict(
        params, jax.random.key(2), episode.support, episode.query.x, num_classes=5
    )


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"start"}))
def test_every_rule_starts_from_the_same_updates(rule, drawn):
    found, episode = drawn
    start = scores(*found["start"], episode)
    np.testing.assert_allclose(
        scores(*found[rule], episode), start, atol=0.05 * np.abs(start).max()
    )


def test_the_start_is_gradient_descent_of_the_two_steps(drawn):
    """theta - i * way * gradient, by hand, for a single update."""
    _, episode = drawn
    config = Config(steps=1)
    algorithm = algorithm_of("start", "first", config)
    params = algorithm.init(jax.random.key(1), episode)
    learner = learned_rules.learner_of("glyphs")
    state = params.learner
    at_way = learner.at_way(state.params, 5)

    def loss(theta):
        outputs, _ = learner.apply(
            state._replace(params=theta), episode.support.x, norm="batch"
        )
        log_p = jax.nn.log_softmax(outputs)
        return -log_p[np.arange(5), episode.support.y].mean()

    grads = jax.grad(loss)(at_way)
    head, body = config.first_step
    moved = {
        part: jax.tree.map(
            lambda t, g, i={"head": head, "body": body}[part]: t - 5 * i * g,
            at_way[part],
            grads[part],
        )
        for part in at_way
    }
    by_hand, _ = learner.apply(
        state._replace(params=moved), episode.query.x, norm="batch"
    )
    np.testing.assert_allclose(
        scores(algorithm, params, episode), by_hand, rtol=1e-4, atol=1e-4
    )


def test_a_stopped_study_resumes(tmp_path, capsys, monkeypatch):
    line = [*QUICK, "--init-rate", "1e-3", "--workdir", str(tmp_path)]
    assert learned_rules.main([*line, "--rules", "start", "hidden-4"]) == 0
    first = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["rule"] for row in first] == ["start", "hidden-4"]
    assert "to_start" in first[1]
    assert "to_rates" not in first[1]

    class Never:
        def __init__(self, *args):
            pass

        def __call__(self, *args):
            raise AssertionError("made again")

    monkeypatch.setattr(learned_rules, "Cell", Never)
    assert learned_rules.main([*line, "--rules", "start", "hidden-4"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == first
    capsys.readouterr()


def test_a_trained_start_stays_as_it_is(tmp_path, capsys):
    """With --start and no --init-rate "start" learns nothing: one seed will do."""
    spec, pool = data.EpisodeSpec(5, 1, 2), data.load_glyphs().train
    trained = metalstm.algorithms.maml(learned_rules.learner_of("glyphs"), train_way=5)
    params = trained.init(jax.random.key(3), spec.sample(jax.random.key(0), pool))
    file = metalstm.save(tmp_path / "trained.npz", trained, params, pool, spec)
    line = [*QUICK, "--start", str(file), "--left-out", "9", "--rules", "start"]
    assert learned_rules.main([*line, "--workdir", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run").glob("*.npz")] == [
        "start first-order 1-shot 0.npz"
    ]
    # another start by the same name does not go with the cells of the first
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    metalstm.save(file, trained, other, pool, spec)
    assert learned_rules.main([*line, "--workdir", str(tmp_path / "run")]) == 2
    assert "began with other data" in capsys.readouterr().err


def test_the_last_classes_are_those_of_the_pool():
    pool = data.load_glyphs().train
    last = learned_rules.last_classes(pool, 3)
    assert last.num_classes == 3
    np.testing.assert_array_equal(last.of_class(0), pool.of_class(-3))
    with pytest.raises(ValueError, match="--left-out 10000"):
        learned_rules.last_classes(pool, 10_000)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rules none", "--rules"),
        ("--init-rate 0", "--init-rate 0"),
        ("--rules rates,nothing", "--rules"),
        ("--init-rate 1 --first-step 1 0.1", "--first-step 1: choose a number below 1"),
        ("--init-rate 1 --clip -1", "--clip -1"),
        ("--init-rate 1 --rule-rate -1", "--rule-rate -1"),
        ("--init-rate 1e-3 --norm frozen", "--norm frozen"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        learned_rules.STUDY.parse(flags.split())


def test_differences_do_not_depend_on_the_order_of_the_rules():
    rng, keys = np.random.default_rng(0), [("rates", "first"), ("rates", "second")]
    keys += [("hidden-4", "first"), ("hidden-4", "second"), ("start", "first")]
    found = {key: rng.uniform(size=(2, 50)) for key in keys}
    for some in (keys, keys[::-1]):
        given = {key: found[key] for key in some}
        row = learned_rules.row_of("hidden-4", "second", 1, given)
        for other in (("start", "first"), ("rates", "second")):
            mean = 100 * (found["hidden-4", "second"] - found[other]).mean()
            np.testing.assert_allclose(row[f"to_{other[0]}"][0], mean)
        row = learned_rules.row_of("hidden-4", "first", 1, given)
        mean = 100 * (found["hidden-4", "first"] - found["rates", "first"]).mean()
        np.testing.assert_allclose(row["to_rates"][0], mean)


def test_a_start_that_is_another_function_is_refused(tmp_path, capsys):
    spec, pool = data.EpisodeSpec(5, 1, 2), data.load_glyphs().train
    body = metalstm.nn.conv4(None, 32, downsample="stride", norm="layer")
    relu = metalstm.algorithms.maml(metalstm.nn.tied_head(body), train_way=5)
    params = relu.init(jax.random.key(3), spec.sample(jax.random.key(0), pool))
    file = metalstm.save(tmp_path / "relu.npz", relu, params, pool, spec)
    line = [*QUICK, "--rules", "start", "--start", str(file)]
    assert learned_rules.main([*line, "--workdir", str(tmp_path / "run")]) == 2
    assert "final_relu=True, and this one has final_relu=F" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.npz"))


def test_fewer_classes_than_the_way_are_refused_before_the_first_cell(tmp_path, capsys):
    line = [*QUICK, "--init-rate", "1e-3", "--left-out", "4", "--rules", "start"]
    assert learned_rules.main([*line, "--workdir", str(tmp_path / "run")]) == 2
    assert "--train-way 5: meta-training has 4 classes" in capsys.readouterr().err
