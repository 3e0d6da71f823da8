"""The held-out test's search, cells and report, and the meta-training's parts."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.learned_optimizer import (
    held_out,
    held_out_cells,
    held_out_report,
    held_out_rows,
    held_out_tasks,
    meta_tasks,
)
from experiments.learned_optimizer.held_out_cells import OPTIMIZERS, Trial, next_trial
from metalstm import rules
from metalstm.learned_optimizers import problems


def search(optimizer, score) -> dict[Trial, float]:
    scores: dict[Trial, float] = {}
    while (trial := next_trial(optimizer.schedules, scores)) is not None:
        assert trial not in scores
        scores[trial] = score(trial)
    return scores


@pytest.mark.parametrize("optimum", range(-3, 4))
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_search_has_nine_trials_and_brackets_the_best_rate(name, optimum):
    """A convex score within a factor of 30 of the default, the constant one better."""
    optimizer = OPTIMIZERS[name]
    first = optimizer.schedules[0]
    constant = lambda t: 0.3 * (t.schedule != "constant")  # noqa: E731
    scores = search(optimizer, lambda t: (t.step - optimum) ** 2 + constant(t))
    nine = dict(list(scores.items())[: held_out_cells.TRIALS])
    best = held_out_cells.best_trial(scores)
    assert best == held_out_cells.best_trial(nine) == Trial(optimum, "constant")
    tried = [t.step for t in scores]
    assert min(tried) < optimum < max(tried)
    tried = [t.step for t in nine if t.schedule == first]
    assert len(scores) == len(nine) + (optimum not in range(min(tried) + 1, max(tried)))


def test_the_search_goes_beyond_an_edge_and_ends():
    downhill = search(OPTIMIZERS["lion"], lambda t: -float(t.step))
    assert len(downhill) == held_out_cells.MOST_TRIALS
    assert [t.step for t in downhill][9:] == [6, 7, 8, 9, 10, 11]


def test_the_search_survives_rates_that_diverge():
    score = lambda t: float("inf") if t.step > -1 else -float(t.step)  # noqa: E731
    scores = search(OPTIMIZERS["adamw"], score)
    assert held_out_cells.best_trial(scores).step == -1


def tiny_task() -> held_out_tasks.HeldOut:
    load = lambda folder: held_out_tasks.Loaded(problems.quadratics(2), ())  # noqa: E731
    return held_out_tasks.HeldOut("quadratics", load, 20)


def test_cells_are_files_that_are_not_run_again(tmp_path, monkeypatch, capsys):
    rule = rules.moment_gates(hidden_size=2)
    file = tmp_path / "mine.npz"
    params = rule.init(jax.random.key(0), ())
    spec = {"rule": "moment_gates", "hidden_size": 2}
    rules.save_rule(file, spec, params, info={})
    for module in (held_out_cells, held_out_rows, held_out_report):
        monkeypatch.setattr(module, "TASKS", {"quadratics": tiny_task()})
    words = ["--folder", str(tmp_path / "cells"), "--tasks", "quadratics"]
    words += ["--optimizers", "adamw,schedule-free", "--rule", str(file)]
    assert held_out.main(words) == 0
    files = sorted((tmp_path / "cells").rglob("*.json"))
    # nine trials (AdamW's best is at the edge of them: two more) and three seeds; a
    # rule's default is one of its own trials
    counts = {name: sum(p.parent.name == name for p in files) for name in
              ("adamw", "schedule-free", "mine")}  # fmt: skip
    assert (counts["adamw"], counts["schedule-free"]) == (14, 12)
    assert counts["mine"] in (12, 15)
    cell = json.loads(files[0].read_text())
    assert len(cell["losses"]) == 21
    before = {path: path.stat().st_mtime_ns for path in files}
    said = capsys.readouterr().out
    assert "mine, tuned" in said
    assert "quadratics: momentum, lion, muon not begun" in said
    first = next(p for p in files if p.match("adamw/*-seed1.json"))
    first.unlink()
    assert held_out.main(words) == 0
    assert first.exists()
    same = [p for p in files if p.stat().st_mtime_ns == before[p]]
    assert len(same) == len(files) - 1
    assert held_out.main([*words, "--fallback"]) == 0
    assert "mine, fallback" in capsys.readouterr().out
    ours = {*(tmp_path / "cells").rglob("*.json")} - {*files}
    assert {(path.parent.name, path.stem) for path in ours} == {
        ("mine, fallback", f"constant+0-seed{seed}") for seed in (0, 1, 2)
    }
    files += ours
    assert held_out.main([*words, "--sensitivity"]) == 0
    # seven rates of seed 0, of which the middle one is there
    found = {*(tmp_path / "cells").rglob("*.json")}
    assert {path.stem.partition("-seed")[2] for path in found - {*files}} == {"0"}
    rates = {path.stem for path in found if path.parent.name == "mine"}
    assert rates >= {f"constant{by:+d}-seed0" for by in range(-3, 4)}
    _, summary, by_rate = capsys.readouterr().out.split("\n\n")[-3:]
    assert "1.000 [1.000, 1.000]" in summary
    assert by_rate.splitlines()[-1].split()[0] == "mine"


def test_the_test_has_ten_tasks_three_of_them_long():
    tasks = held_out_tasks.TASKS
    assert len(tasks) == 10
    assert sum(task.num_steps == 10_000 for task in tasks.values()) == 3
    assert {task.num_steps for task in tasks.values()} == {2_000, 10_000}


@pytest.mark.parametrize("name", ["tabular", "heat", "policy", "maml"])
def test_generated_tasks_have_finite_losses_and_gradients(name):
    family, data = held_out_tasks.TASKS[name].load(Path())
    key = jax.random.key(0)
    task = family.sample(key, data)
    params = family.init(key, task)
    batch = family.batch(key, data)
    loss, grads = jax.jit(jax.value_and_grad(family.loss))(params, task, batch)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    larger = family.batch(key, data, 1_024)
    assert len(jax.tree.leaves(larger)[0]) == 1_024


def test_text_is_printable_characters_and_what_follows_them():
    data, kinds = held_out_tasks.text("abc \n" * 20, length=4)
    assert kinds == 95
    assert data.x[0].tolist() == [65, 66, 67, 0]
    assert data.y[0].tolist() == [66, 67, 0, 0]


def test_the_grammar_is_the_same_everywhere():
    tokens, kinds = meta_tasks.grammar_text(500)
    again, _ = meta_tasks.grammar_text(500)
    other, _ = meta_tasks.grammar_text(500, seed=1)
    assert tokens.shape == (500,)
    assert tokens.max() == kinds - 1 < 30
    np.testing.assert_array_equal(tokens, again)
    assert (tokens != other).any()
