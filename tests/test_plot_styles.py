"""The style of every figure: colours by name, bands, files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from experiments.few_shot.methods import METHODS
from experiments.learned_optimizer.options import BASELINES, RULES
from metalstm import plots
from metalstm.plots import style


def test_a_pdf_holds_its_fonts_and_no_date(tmp_path):
    figure = plots.accuracy_bars({"maml": (0.5, 0.01)})
    files = plots.save_figure(figure, tmp_path / "v1.2.png")
    assert [file.name for file in files] == ["v1.2.png", "v1.2.pdf"]
    pdf = files[1].read_bytes()
    assert b"/FontFile2" in pdf, "TrueType"
    assert b"/Type3" not in pdf
    assert b"/CreationDate" not in pdf
    (only,) = plots.save_figure(figure, tmp_path / "v1.3", formats=["pdf"])
    assert only.name == "v1.3.pdf"
    assert only.read_bytes() == pdf


def test_a_method_has_one_colour_and_marker_in_every_figure():
    def looks(figure, panel=0):
        return {
            line.get_label().partition(",")[0]: (line.get_color(), line.get_marker())
            for line in figure.axes[panel].lines
        }

    curve = [plots.Curve(np.arange(5), np.full(5, 0.5), np.full(5, 0.1))]
    names = ("scratch", "mine", "maml")
    found = []
    for chosen in (names, names[::-1], names[1:]):
        curves = dict.fromkeys(chosen, curve)
        figure = plots.learning_curves(curves, {}, curves)
        found += [looks(figure, 0), looks(figure, 1)]
        points = {name: [(1, 0.5, 0.1), (5, 0.6, 0.1)] for name in chosen}
        families = dict.fromkeys(chosen, "x")
        found.append(looks(plots.accuracy_sweep(points, families, xlabel="shots")))
        losses = dict.fromkeys(chosen, plots.Losses(np.arange(2), np.ones((3, 2))))
        found.append(looks(plots.loss_panels({"a": losses})))
    for look in found:
        for name in names[1:]:
            assert look[name] == found[0][name]


def test_known_methods_differ_and_two_runs_of_one_are_told_apart():
    known = style._KNOWN
    assert len(set(known.values())) == len(known)
    styles = plots.method_styles(["maml", "maml (run2)", "anil", "adam"])
    one, other, same_colour, _ = styles.values()
    assert one["color"] == other["color"] == same_colour["color"]
    assert one["marker"] == other["marker"] != same_colour["marker"]
    assert other["fillstyle"] == "none"
    assert len({s["linestyle"] for s in (one, other, same_colour)}) == 3


def test_every_method_of_the_commands_has_a_style():
    assert {*METHODS} | {*RULES} | {*BASELINES} <= {*style._KNOWN}


def test_bands_contain_their_mean_where_it_is_clipped():
    for mean, half in ((1.0, 0.0), (1.0, 0.2), (0.999, 0.1), (0.0, 0.1), (0.5, 0.1)):
        curve = [plots.Curve(np.arange(3), np.full(3, mean), np.full(3, half))]
        points = {"maml": [(1, mean, half), (5, mean, half)]}
        sweep = plots.accuracy_sweep(points, {"maml": "x"}, xlabel="shots").axes[0]
        for axes in (sweep, plots.learning_curves({}, {}, {"maml": curve}).axes[1]):
            drawn = axes.lines[0].get_ydata()
            band = axes.collections[0].get_paths()[0].vertices[:, 1]
            assert band.min() <= drawn.min() <= drawn.max() <= band.max()
            low, high = axes.get_ylim()
            assert low <= drawn.min() <= drawn.max() <= high, "in sight"
            assert 0 <= band.min() <= band.max() <= 100
        bar = plots.accuracy_bars({"maml": (mean, half)}).axes[0]
        ends = 100 * np.clip([mean - half, mean + half], 0, 1)
        (error,) = bar.collections[0].get_segments()
        np.testing.assert_allclose(np.sort(error[:, 0]), ends)


def test_a_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'metalstm\[experiments\]'"):
        plots.accuracy_bars({"maml": (0.5, 0.01)})
