"""Pictures: they draw, and what they draw is what they were given."""

from __future__ import annotations

import numpy as np
import pytest

from metalstm import plots
from metalstm.calibration import Reliability
from metalstm.meta.confidence import ConfidenceReport
from metalstm.plots import accuracies
from metalstm.statistics import Estimate


def saves(figure, tmp_path):
    png, pdf = plots.save_figure(figure, tmp_path / "picture")
    assert png.read_bytes()[:4] == b"\x89PNG"
    assert png.stat().st_size > 5_000
    assert pdf.read_bytes()[:5] == b"%PDF-"


def test_learning_curves(tmp_path):
    episodes = np.arange(1, 201)
    noise = np.random.default_rng(0).normal(size=(2, 200))
    seeds = [plots.Curve(episodes, 1 + row) for row in noise]
    validation = [
        plots.Curve(np.array([100, 200]), np.array([a, a + 0.2]), np.array([0.1, 0.1]))
        for a in (0.4, 0.6)
    ]
    figure = plots.learning_curves(
        {"maml": seeds}, {"maml": seeds[:1]}, {"maml": validation}, chance=0.2
    )
    loss, accuracy = figure.axes
    drawn = loss.lines[0].get_ydata()
    assert len(drawn) < 100, "smoothed"
    assert drawn.mean() == pytest.approx(1 + noise[:, :198].mean(), abs=1e-2)
    labels = [line.get_label() for line in accuracy.lines]
    marked = accuracy.lines[labels.index("maml, validation")]
    np.testing.assert_allclose(marked.get_ydata(), [50, 70])
    band = accuracy.collections[-1].get_paths()[0].vertices[:, 1]
    half = 100 * 1.96 * np.std([0.4, 0.6], ddof=1) / np.sqrt(2)
    assert band.max() == pytest.approx(70 + half)
    saves(figure, tmp_path)


def test_learning_curves_of_many_methods_can_be_told_apart(tmp_path):
    curves = {f"m{k}": [plots.Curve(np.arange(5), np.full(5, k))] for k in range(20)}
    figure = plots.learning_curves(curves, {}, curves)
    left, right = figure.axes
    lines = [left.lines, right.lines]
    parts = ("color", "linestyle", "marker", "fillstyle")
    looks = [
        [tuple(getattr(a, f"get_{p}")() for p in parts) for a in of] for of in lines
    ]
    assert len(set(looks[0])) == 20
    assert looks[1] == looks[0]
    assert left.get_legend() is None, "one legend, next to the panels"
    assert len(right.get_legend().get_texts()) == 20
    saves(figure, tmp_path)


def test_one_seed_shows_the_interval_over_episodes():
    curve = plots.Curve(np.array([10, 20]), np.array([0.5, 0.6]), np.array([0.1, 0.2]))
    figure = plots.learning_curves({}, {}, {"maml": [curve]})
    band = figure.axes[1].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(80)
    assert band.min() == pytest.approx(40)


def test_seeds_that_stop_early_bound_the_mean():
    long = plots.Curve(np.array([10, 20, 30]), np.array([0.5, 0.6, 0.7]))
    short = plots.Curve(np.array([10, 20]), np.array([0.5, 0.8]))
    figure = plots.learning_curves({}, {}, {"maml": [long, short]})
    np.testing.assert_allclose(figure.axes[1].lines[0].get_ydata(), [50, 70])


@pytest.mark.parametrize("channels", [1, 3])
def test_episode_picture(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(6, 9, 9, channels))
    support = images[:2], np.array([1, 0])
    query = images[2:], np.array([0, 0, 1, 1])
    figure = plots.episode_picture(
        support, query, np.array([1, 1, 1, 1]), np.array([0, 1, 1, 1])
    )
    texts = [axes.get_xlabel() for axes in figure.axes if axes.get_visible()]
    assert [t for t in texts if t] == ["1 → 0", "1 → 1", "1 → 1", "1 → 1"]
    assert figure.get_suptitle() == "right: 50% before, 75% after adaptation"
    shown = figure.axes[0].images[0].get_array()
    expected = images[1] if channels == 3 else images[1][..., 0]
    np.testing.assert_allclose(shown, expected)
    saves(figure, tmp_path)


def test_accuracy_bars(tmp_path):
    figure = plots.accuracy_bars({"maml": (0.5, 0.01), "sgd": (0.3, 0.02)}, chance=0.2)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(widths, [50, 30])
    assert figure.axes[0].texts[1].get_text() == "30.0 ± 2.0"
    saves(figure, tmp_path)


def test_loss_panels(tmp_path):
    steps = np.array([0, 10, 20])
    values = np.random.default_rng(0).uniform(0.5, 2, (6, 3))
    diverged = values.copy()
    diverged[0, 2] = np.inf
    panels = {
        "quadratics": {
            "adam": plots.Losses(steps, values),
            "l2l": plots.Losses(steps, diverged),
        },
        "MNIST": {"l2l": plots.Losses(steps, 2 * values)},
    }
    figure = plots.loss_panels(panels, learned=["l2l"])
    left, right = figure.axes
    adam, l2l = left.lines
    np.testing.assert_allclose(adam.get_ydata(), values.mean(0))
    assert np.isnan(l2l.get_ydata()[2]), "no mean where a problem diverged"
    assert l2l.get_linewidth() > adam.get_linewidth()
    assert right.lines[0].get_color() == l2l.get_color(), "one colour a rule"
    band = left.collections[0].get_paths()[0].vertices[:, 1]
    half = 1.96 * values.std(0, ddof=1) / 6**0.5
    assert band.max() == pytest.approx((values.mean(0) + half).max())
    assert left.get_yscale() == "log"
    saves(figure, tmp_path)


def test_losses_below_zero_have_a_linear_scale():
    values = np.array([[1.0, -2.0], [1.5, -1.0]])
    (axes,) = plots.loss_panels({"a": {"sgd": plots.Losses(np.arange(2), values)}}).axes
    assert axes.get_yscale() == "linear"
    half = 1.96 * values[:, 1].std(ddof=1) / 2**0.5
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == pytest.approx(-1.5 - half)


def test_panels_share_a_legend():
    losses = plots.Losses(np.arange(3), np.ones((2, 3)))
    of_panel = dict.fromkeys("abcdefg", losses)
    figure = plots.loss_panels({"one": of_panel, "two": {"h": losses}})
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*"abcdefgh"]


def test_loss_panels_by_geometric_mean():
    values = np.array([[1.0, 1e-4], [1.0, 1e-8]])
    losses = {"sgd": plots.Losses(np.array([0, 1]), values)}
    figure = plots.loss_panels({"a": losses, "b": losses}, geometric=["a"])
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), [1, 1e-6])
    np.testing.assert_allclose(right.lines[0].get_ydata(), values.mean(0))
    assert "geometric" in left.get_ylabel()


def test_rate_sweeps(tmp_path):
    rates = np.array([0.1, 1.0, 10.0])
    sweeps = {
        "sgd": plots.Sweep(rates, np.array([0.5, 0.2, np.inf])),
        "adam": plots.Sweep(rates, np.full(3, np.inf)),
    }
    figure = plots.rate_sweeps(sweeps)
    curve, best = figure.axes[0].lines[:2]
    assert np.isnan(curve.get_ydata()[2])
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (1.0, 0.2)
    saves(figure, tmp_path)


def test_escape_curves(tmp_path):
    share = np.array([0.0, 0.5, 1.0])
    forget = np.linspace(0.5, 1, 4 * 3 * 2).reshape(4, 3, 2)
    escaped = {"sgd": (np.arange(3), 0 * share), "gates": (np.arange(3), share)}
    figure = plots.escape_curves(escaped, {"gates": forget}, learned=["gates"])
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[1].get_ydata(), [0, 50, 100])
    np.testing.assert_allclose(right.lines[0].get_ydata(), np.median(forget, (0, 2)))
    band = right.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(forget[:, 2], 0.9))
    assert right.lines[0].get_color() == left.lines[1].get_color()
    saves(figure, tmp_path)
    assert len(plots.escape_curves(escaped).axes) == 1


def test_meta_training_curves(tmp_path):
    steps = np.arange(1, 101)
    loss = plots.Curve(steps, 1 / steps)
    validation = plots.Curve(np.array([50, 100]), np.array([-1.0, -2.0]), np.ones(2))
    figure = plots.meta_training_curves({"l2l": loss}, {"l2l": validation})
    left, right = figure.axes
    assert left.lines[0].get_ydata()[-1] == pytest.approx(0.01, rel=1e-6)
    np.testing.assert_allclose(right.lines[0].get_ydata(), [-1, -2])
    assert right.collections[0].get_paths()[0].vertices[:, 1].max() == 0
    saves(figure, tmp_path)


def test_accuracy_sweep(tmp_path):
    sweeps = {
        "meta-lstm": [(1, 0.6, 0.02), (5, 0.8, 0.01)],
        "maml": [(1, 0.5, 0.02), (5, 0.8, 0.01)],
        "matching": [(5, 0.79, 0.01)],
    }
    families = {"meta-lstm": "gradient", "maml": "gradient", "matching": "metric"}
    chance = [(1, 0.2), (5, 0.2)]
    figure = plots.accuracy_sweep(
        sweeps, families, xlabel="shots", chance=chance, bold=["meta-lstm"]
    )
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["maml"].get_ydata(), [0.5, 0.8])
    assert axes.get_yscale() == "linear"
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(0.58), pytest.approx(0.81))
    styles = {name: line.get_linestyle() for name, line in lines.items()}
    assert styles["meta-lstm"] == styles["maml"] != styles["matching"]
    assert lines["meta-lstm"].get_color() != lines["maml"].get_color()
    assert lines["meta-lstm"].get_linewidth() > lines["maml"].get_linewidth()
    names = {text.get_text(): text.get_position() for text in axes.texts}
    assert names.keys() == {*sweeps, "chance"}
    del names["chance"]
    heights = sorted(height for _, height in names.values())
    assert np.diff(heights).min() > 0.02, "names do not overlap"
    assert {x for x, _ in names.values()} == {1.05}, "right of the axes"
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "gradient", "metric"
    ]  # fmt: skip
    saves(figure, tmp_path)


def test_high_accuracies_are_spread_by_their_odds(tmp_path):
    sweeps = {"a": [(5, 0.99, 0.03), (20, 0.95, 0.001)], "b": [(20, 0.999, 0.0)]}
    figure = plots.accuracy_sweep(
        sweeps, {"a": "x", "b": "x"}, xlabel="ways", chance=[(5, 0.2), (20, 0.05)]
    )
    axes = figure.axes[0]
    assert axes.get_yscale() == "logit"
    low, high = axes.get_ylim()
    assert 0 < low < 0.05
    assert 0.999 < high < 1, "the band above 1 is cut"
    assert not figure.legends, "one family"
    saves(figure, tmp_path)


def test_lines_that_fall_are_drawn_whole():
    sweeps = {"a": [(5, 0.99, 0.003), (20, 0.92, 0.01)]}
    figure = plots.accuracy_sweep(sweeps, {"a": "x"}, xlabel="ways")
    assert figure.axes[0].get_yscale() == "logit"
    assert figure.axes[0].get_ylim()[1] > 0.99


def test_names_are_spread_as_little_as_needed():
    positions = accuracies._spread(np.array([0.2, 0.5, 0.5, 0.51]), 0.1)
    np.testing.assert_allclose(positions, [0.2, 0.403333, 0.503333, 0.603333], 1e-5)
    crowded = accuracies._spread(np.full(5, 0.99), 0.25)
    np.testing.assert_allclose(crowded, [0, 0.25, 0.5, 0.75, 1])


def test_roc_curves_have_a_line_and_an_equal_error_dot_for_each_method():
    false = np.array([0.0, 0.0, 0.02, 0.1, 0.5, 1.0])
    perfect = np.array([0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    curves = {"a": (false, np.linspace(0, 1, 6)), "b": (false, perfect)}
    figure = plots.roc_curves(curves, title="letters")
    (axes,) = figure.axes
    lines = [line for line in axes.lines if line.get_label() in curves]
    assert [line.get_label() for line in lines] == ["a", "b"]
    for line, (_, true) in zip(lines, curves.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * true)
        assert np.all(np.asarray(line.get_xdata()) > 0)
    dots = [line for line in axes.lines if len(line.get_xdata()) == 1]
    # errors are equal where false = 1 - true: at the fifth place, and at the second
    found = [(line.get_xdata()[0], line.get_ydata()[0]) for line in dots]
    np.testing.assert_allclose(found, [(0.5, 80.0), (0.01, 100.0)])
    assert axes.get_xscale() == "log"
    assert axes.get_title() == "letters"


def test_confidence_panels_draw_what_was_measured(tmp_path):
    bins = Reliability(
        np.array([0.2, 0.5, 0.9]), np.array([0.3, 0.4, 0.8]), np.array([3, 500, 700])
    )
    reports = [
        ConfidenceReport(Estimate(0.5, 0.1), bins, *map(Estimate._make, measured))
        for measured in (
            ((0.85, 0.02), (2.0, 0.1), (0.2, 0.1), (0.3, 0.1)),
            ((0.91, 0.01), (2.5, 0.1), (0.1, 0.1), (0.6, 0.1)),
        )
    ]
    figure = plots.confidence_panels(
        [0.8, 0.9], {"ridge": reports, "centroid": reports}
    )
    calibrated, covered, missed = figure.axes
    # a bin of three answers says nothing
    np.testing.assert_allclose(calibrated.lines[0].get_ydata(), [40, 80])
    np.testing.assert_allclose(covered.lines[1].get_ydata(), [85, 91])
    band = covered.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((83, 92))
    np.testing.assert_allclose(missed.lines[0].get_ydata(), [30, 60])
    saves(figure, tmp_path)


def test_setting_panels_mark_the_default(tmp_path):
    panels = {
        "rate": {0.01: np.array([0.3, 0.5]), 0.1: np.array([0.6, 0.8])},
        "per": {"rule": np.array([0.7]), "tensor": np.array([0.6])},
    }
    figure = plots.setting_panels(
        panels, default={"rate": 0.1, "per": "rule"}, chance=0.2
    )
    rate, per = figure.axes
    assert (rate.get_xscale(), per.get_xscale()) == ("log", "linear")
    np.testing.assert_allclose(rate.lines[0].get_xydata(), [[0.01, 40], [0.1, 70]])
    np.testing.assert_allclose(rate.lines[1].get_ydata(), [30, 50])
    marked = [axes.lines[3].get_xydata()[0] for axes in (rate, per)]
    np.testing.assert_allclose(marked, [[0.1, 70], [0, 70]])
    assert [tick.get_text() for tick in per.get_xticklabels()] == ["rule", "tensor"]
    saves(figure, tmp_path)


@pytest.mark.parametrize("num_targets", [1, 2])
@pytest.mark.parametrize("seeds", [1, 3])
def test_fits_of_regression_tasks(tmp_path, num_targets, seeds):
    rng = np.random.default_rng(0)
    grid, shape = np.linspace(-1, 1, 9), (num_targets,) if num_targets > 1 else ()
    tasks = [
        plots.FittedTask(
            rng.uniform(-1, 1, 4),
            rng.normal(size=(4, *shape)),
            rng.normal(size=(9, *shape)),
        )
        for _ in range(2)
    ]
    outputs = rng.normal(size=(*((seeds,) if seeds > 1 else ()), 2, 6, 9, *shape))
    figure = plots.function_fits(
        tasks, grid, {"maml": outputs}, (0, 1, 5), targets=("x", "y")[:num_targets]
    )
    assert len(figure.axes) == 2 * num_targets
    axes = figure.axes[-1]  # the last task's last target
    curve, before, one, last, support = axes.lines
    of = outputs.reshape(seeds, 2, 6, 9, num_targets)[:, 1, ..., -1]
    np.testing.assert_allclose(curve.get_ydata(), tasks[1].curve.reshape(9, -1)[:, -1])
    for line, step in ((before, 0), (one, 1), (last, 5)):
        np.testing.assert_allclose(line.get_ydata(), of[:, step].mean(0))
    np.testing.assert_allclose(support.get_ydata(), tasks[1].y.reshape(4, -1)[:, -1])
    assert len(axes.collections) == (3 if seeds > 1 else 0)
    if seeds > 1:
        band = axes.collections[2].get_paths()[0].vertices[:, 1]
        ends = band.min(), band.max()
        assert ends == pytest.approx((of[:, 5].min(), of[:, 5].max()))
    saves(figure, tmp_path)


def test_the_error_of_each_target(tmp_path):
    found = np.random.default_rng(0).uniform(0.5, 2, (6, 3, 2))
    figure = plots.target_errors({"maml": found, "reptile": found}, targets=("x", "y"))
    assert [axes.get_title() for axes in figure.axes] == ["x", "y"]
    line, band = figure.axes[1].lines[0], figure.axes[1].collections[0]
    np.testing.assert_allclose(line.get_ydata(), found[..., 1].mean(0))
    half = 1.96 * found[..., 1].std(0, ddof=1) / 6**0.5
    highest = (found[..., 1].mean(0) + half).max()
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(highest)
    assert figure.get_supxlabel() == "band: 95% CI over tasks"
    assert len(plots.target_errors({"maml": found[..., 0]}).axes) == 1
    numbered = plots.target_errors({"maml": found}).axes
    assert [axes.get_title() for axes in numbered] == ["target 1", "target 2"]
    with pytest.raises(
        ValueError, match=r"\['x'\] are 1 and there are 2 targets: give"
    ):
        plots.target_errors({"maml": found}, targets=["x"])
    saves(figure, tmp_path)
