"""The held-out test's report: cells made by hand, against values computed by hand."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from scipy import stats

from experiments.learned_optimizer import (
    held_out,
    held_out_cells,
    held_out_report,
    held_out_rows,
)
from experiments.learned_optimizer.held_out_cells import (
    OPTIMIZERS,
    RULE_SCHEDULES,
    SEEDS,
    TUNE_SEED,
    around,
    best_trial,
    next_trial,
)
from metalstm import rules

TASKS = ("tabular", "heat", "maml")
LAST = {  # of the seeds, on each task
    "adamw": ([1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [1.0, 1.0, 1.0]),
    "muon": ([1.0, 1.0, 9.0], [4.0, 8.0, 8.0], [0.5, 0.5, 0.5]),
    "mine": ([1.5, 1.5, 1.5], [5.0, None, 6.0], [2.0, 2.0, 2.0]),
}


def write_cells(folder, last=LAST, optimum=1):
    """Every cell of these optimizers: straight curves from 10, best at ``optimum``."""
    for name, tasks in last.items():
        schedules = getattr(OPTIMIZERS.get(name), "schedules", RULE_SCHEDULES)
        scores: dict = {}
        while (trial := next_trial(schedules, scores)) is not None:
            scores[trial] = abs(trial.step - optimum) + (trial.schedule != schedules[0])
        best = best_trial(scores)
        assert best.step == optimum
        for task, losses in zip(TASKS, tasks, strict=True):
            default = best._replace(step=0)
            cells = {(t, TUNE_SEED): score for t, score in scores.items()}
            centre = best if name in OPTIMIZERS else default
            # the best of the seven rates is the one below the centre
            cells |= {(t, 0): abs(k - 2) + 1.0 for k, t in enumerate(around(centre))}
            for trial in {best, centre}:
                cells |= {(trial, s): losses[s] for s in SEEDS}
            for (trial, seed), value in cells.items():
                end = 10.0 if value is None else value
                curve = np.linspace(10, end, 21).tolist()
                curve[-1] = value
                where = folder / "v2" / task / name
                where.mkdir(parents=True, exist_ok=True)
                path = where / f"{trial.schedule}{trial.step:+d}-seed{seed}.json"
                path.write_text(json.dumps({"losses": curve}))


@pytest.fixture
def rows(tmp_path):
    write_cells(tmp_path)
    return held_out_rows.rows_of(held_out_rows.read_cells(tmp_path))[0]


def test_rows_are_the_tuned_ones_and_a_rules_default(rows):
    assert list(rows) == ["adamw", "muon", "mine", "mine, tuned"]
    assert rows["mine"]["heat"].trial == (0, "constant")
    assert rows["mine, tuned"]["heat"].trial == (1, "constant")
    assert rows["muon"]["heat"].trial == (1, "cosine")
    assert rows["muon"]["heat"].inside is True
    assert rows["mine"]["heat"].inside is None
    assert rows["muon"]["heat"].median == 8.0
    assert rows["mine"]["heat"].diverged.tolist() == [False, True, False]


def test_tables_have_the_values_computed_by_hand(rows):
    losses, summary, by_rate = held_out_report.tables(rows, ["vit: not begun"])
    assert losses.cells[0] == [
        "tabular",
        "2",
        "1 (0.500)",
        "1.5 (0.750)",
        "1.5 (0.750)",
    ]
    assert losses.cells[1][1:4] == ["4", "8 (2.000)", "6 (1.500)"]
    assert losses.notes == ["missing: vit: not begun"]
    muon, mine = (
        dict(zip(summary.headings, summary.cells[k], strict=True)) for k in (1, 2)
    )
    # ratios 0.5, 2, 0.5: the middle half is (0.25 x 0.5 + 1 x 0.5 + 0.25 x 2) / 1.5
    assert muon["IQM of ratios [95%]"].startswith("0.750 [")
    assert muon["below AdamW"] == "2 of 3"
    assert muon["optimum inside"] == "3 of 3"
    # tabular 10 -> 1 is at 2 after 8 / 9, 17.8 and so 18 of 20 records; maml 10 -> 0.5
    # is at 1 after 18.9, so 19; heat never reaches 4
    assert muon["updates to AdamW's loss"] == "95%"
    assert muon["reached"] == "2 of 3"
    assert mine["diverged"] == "0.111"
    assert (mine["trials"], muon["trials"]) == ("1", "9")
    row = dict(zip(by_rate.headings, by_rate.cells[1], strict=True))
    # the seed's 2 at the lowest rate over AdamW's 2, 4, 1; the last loss at the tuned
    assert row["x 10^-1.5"] == "1.5"
    assert row["x 10^+0.0"] == "0.5"
    assert row["inside"] == "3 of 3"


def test_the_legend_has_the_tasks_of_every_row(rows):
    del rows["muon"]["maml"]
    figure = held_out_report.ratios_figure(rows)
    legend = figure.axes[0].get_legend()
    assert {text.get_text() for text in legend.get_texts()} == {*TASKS}


def test_the_panels_have_one_legend_and_plain_ticks(rows):
    figure = held_out_report.curves_figure(rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*rows]
    assert all(axes.get_legend() is None for axes in figure.axes)
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    said = [t.get_text() for t in axis.get_ticklabels(which="both") if t.get_text()]
    assert 2 <= len(said) < 12  # some are beyond the view
    assert all(float(text) > 0 for text in said)


def test_losses_that_have_no_ratio_are_omitted_and_said(tmp_path):
    last = LAST | {"muon": ([1.0] * 3, [-1.0] * 3, [0.5] * 3)}
    write_cells(tmp_path, last)
    rows, _ = held_out_rows.rows_of(held_out_rows.read_cells(tmp_path))
    _, summary, _ = held_out_report.tables(rows, [])
    muon = dict(zip(summary.headings, summary.cells[1], strict=True))
    assert muon["below AdamW"] == "2 of 2"
    assert muon["IQM of ratios [95%]"].startswith("0.500 [")
    assert "muon: no ratio, a loss is not above 0 or AdamW's: heat" in summary.notes


def test_the_interquartile_mean_is_scipys_where_that_exists():
    values = np.random.default_rng(0).exponential(size=(5, 12))
    expected = stats.trim_mean(values, 0.25, axis=1)
    np.testing.assert_allclose(held_out_rows.iqm(values), expected)
    assert held_out_rows.iqm([1, 2, 3, 4, 5, 6, 7, float("inf")]) == 4.5
    # of three the middle one counts, and a quarter of each of the others
    np.testing.assert_allclose(held_out_rows.iqm([1, 2, 4]), (0.25 + 2 + 1) / 1.5)
    assert held_out_rows.iqm([5.0]) == 5.0


def test_the_interval_of_ten_tasks_is_scipys_bootstrap():
    """Of one seed each: nothing but tasks is resampled."""
    ratios = np.random.default_rng(1).lognormal(size=(10, 1))
    found = held_out_rows.iqm_interval(ratios, np.ones((10, 1)))
    expected = stats.bootstrap(
        (ratios[:, 0],), held_out_rows.iqm, n_resamples=20_000, method="percentile",
        random_state=0,
    ).confidence_interval  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=0.02)


def test_the_interval_of_one_task_is_that_of_a_median_of_three():
    """Median of 3 of 3: the lowest and highest have probability 7 / 27 each."""
    losses = np.array([[1.0, 2.0, 4.0]])
    assert held_out_rows.iqm_interval(losses, np.ones((1, 3))) == (1.0, 4.0)
    # the same seeds are drawn for both: a constant ratio has no interval
    assert held_out_rows.iqm_interval(3 * losses, losses) == (3.0, 3.0)


def test_the_report_is_made_again_from_its_own_file(tmp_path, capsys):
    cells, into = tmp_path / "cells", tmp_path / "page"
    write_cells(cells)
    (cells / "v2/heat/muon/cosine+1-seed2.json").unlink()
    (cells / "v2/maml/adamw/cosine+0-seed1000.json").unlink()
    words = ["--folder", str(cells), "--report", str(into)]
    assert held_out.main(words) == 0
    said = capsys.readouterr().out
    assert "muon has 2 of 3 seeds" in said
    assert "adamw has 8 trials, more are to come" in said
    assert "missing: resnet, vit, transformer, gru, autoencoder, policy" in said
    names = [
        "held_out.json",
        "held_out.md",
        "held_out_curves.png",
        "held_out_ratios.png",
    ]
    assert all((into / name).stat().st_size > 100 for name in names)
    before = (into / "held_out.md").read_text()
    again = ["--folder", str(tmp_path / "none"), "--report", str(into)]
    assert held_out.main(again) == 0
    assert (into / "held_out.md").read_text() == before
    nothing = ["--folder", str(tmp_path / "none"), "--report", str(tmp_path / "other")]
    assert held_out.main(nothing) == 2
    assert "has no cells" in capsys.readouterr().err


def rule_file(path, seed):
    path.parent.mkdir(exist_ok=True)
    params = rules.moment_gates(hidden_size=2).init(jax.random.key(seed), ())
    rules.save_rule(path, {"rule": "moment_gates", "hidden_size": 2}, params, info={})
    return path


def test_a_row_is_of_one_rule(tmp_path, capsys):
    cells = tmp_path / "cells"
    write_cells(cells)
    a, b = (rule_file(tmp_path / name / "mine.npz", k) for k, name in enumerate("ab"))
    adamw = rule_file(tmp_path / "adamw.npz", 2)
    words = ["--folder", str(cells), "--tasks", "heat", "--optimizers", "adamw"]
    run = lambda *files: held_out.main([*words, "--rule", *map(str, files)])  # noqa: E731
    assert run(a) == 0  # cells of earlier versions do not say of which rule they are
    assert run(a) == 0
    for files, message in (
        ([b], "has cells of another rule called mine; rename the file"),
        ([a, b], "b/mine.npz: another row is called mine; rename the file"),
        ([adamw], "adamw.npz: another row is called adamw; rename the file"),
    ):
        assert run(*files) == 2
        assert message in capsys.readouterr().err
    fresh = tmp_path / "fresh"
    for path in (a, b):  # nothing was run
        digest = held_out_cells.gate_rule(path).digest
        held_out_cells.claim_name(fresh, "mine", digest)


SHORT = json.dumps({"losses": [1.0] * 7})


@pytest.mark.parametrize(
    "text", ["", '{"losses": [1.0', "[]", "{}", SHORT, SHORT.replace("1.0", '"x"')]
)
def test_a_damaged_cell_is_named(tmp_path, capsys, text):
    write_cells(tmp_path, {"adamw": LAST["adamw"]})
    path = tmp_path / f"v2/heat/adamw/cosine+0-seed{TUNE_SEED}.json"
    path.write_text(text)
    run = ["--tasks", "heat", "--optimizers", "adamw"]
    for words in (run, ["--report", str(tmp_path / "page")]):
        assert held_out.main(["--folder", str(tmp_path), *words]) == 2
        said = capsys.readouterr().err
        assert f"{path} is damaged (" in said
        assert "): delete it, and run the test again" in said


def test_other_files_are_no_cells(tmp_path):
    write_cells(tmp_path)
    cells = held_out_cells.Cells(tmp_path, "heat", "adamw")
    before, scores = held_out_rows.read_cells(tmp_path), cells.scores()
    for name in (f".part-0a1b2c3d-cosine+0-seed{TUNE_SEED}.json", "notes.json"):
        (cells.folder / name).write_text("{")
    assert cells.scores() == scores
    after = held_out_rows.read_cells(tmp_path)
    assert held_out_rows.to_json(after) == held_out_rows.to_json(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged ("),
        ("{}", "is damaged ("),
        ('{"version": 1, "losses": {}}', "is of version 1 of the test, and this is 2"),
        ('{"version": 2, "losses": {"heat": {"lion": {"x": [1]}}}}', "(heat lion x)"),
        ('{"version": 2, "losses": {"heat": {"lion": {"cosine+0-seed0": [1]}}}}',
         "is damaged (heat lion cosine+0-seed0)"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("has_cells", [False, True])
def test_a_held_out_json_that_cannot_be_read_is_named(
    tmp_path, capsys, text, message, has_cells
):
    cells, path = tmp_path / "cells", tmp_path / "held_out.json"
    if has_cells:
        write_cells(cells, {"adamw": LAST["adamw"]})
    path.write_text(text)
    words = ["--folder", str(cells), "--report", str(tmp_path)]
    assert held_out.main(words) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert message in said
    assert "choose another --report" in said
    assert path.read_text() == text


def test_a_report_does_not_replace_one_of_more_cells(tmp_path, capsys):
    cells, into = tmp_path / "cells", tmp_path / "page"
    write_cells(cells, {"adamw": LAST["adamw"]})
    words = ["--folder", str(cells), "--report", str(into)]
    assert held_out.main(words) == 0
    before = (into / "held_out.json").read_bytes()
    (cells / f"v2/heat/adamw/cosine+0-seed{TUNE_SEED}.json").unlink()
    assert held_out.main(words) == 2
    said = capsys.readouterr().err
    assert "held_out.json has 1 cells that" in said
    assert "such as heat/adamw/cosine+0-seed1000: choose another --report" in said
    assert (into / "held_out.json").read_bytes() == before
