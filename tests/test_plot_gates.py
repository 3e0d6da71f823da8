"""Pictures of gates, and what the gates vary with."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from test_plots import saves

from metalstm import plots


def test_layers_and_gates(tmp_path):
    params = {
        "conv": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros(3)},
        "head": {"kernel": jnp.zeros(4)},
    }
    layers = plots.layer_groups(params)
    assert [name for name, _ in layers] == ["conv", "head"]
    np.testing.assert_array_equal(layers[1][1], np.arange(9, 13))
    assert plots.layer_groups(jnp.zeros(3))[0][0] == "parameters"


def of_two_layers(forget, i):
    """A figure of gates [tasks, T, 5] of two layers."""
    layers = [("body/conv", np.arange(3)), ("body/head", np.arange(3, 5))]
    return plots.gate_distributions(forget, i, layers)


def test_gates_are_drawn_as_quantiles_by_layer_and_step(tmp_path):
    i = np.random.default_rng(0).uniform(0.001, 0.9, (7, 2, 5))
    figure = of_two_layers(np.full_like(i, 0.999), i)
    top, bottom = figure.axes
    assert top.get_yscale() == bottom.get_yscale() == "log"
    second = np.percentile(i[:, 1, :3], [5, 25, 50, 75, 95])
    boxes = [(b.get_y(), b.get_y() + b.get_height()) for b in top.patches]
    # of each layer pale boxes, a step each, then dark ones
    np.testing.assert_allclose(boxes[1], second[[0, 4]])
    np.testing.assert_allclose(boxes[3], second[[1, 3]])
    bars = top.collections[0].get_segments()
    np.testing.assert_allclose([bars[1][0, 1], bars[1][1, 1]], second[2])
    (one_step,) = (line for line in top.lines if "gradient" in line.get_label())
    np.testing.assert_allclose(one_step.get_ydata(), np.exp(np.log(i).mean()))
    assert [t.get_text() for t in bottom.get_xticklabels()] == ["conv", "head"]
    assert bottom.get_title(loc="left") == "1 - f is constant"
    np.testing.assert_allclose(bottom.patches[0].get_y(), 0.001)
    saves(figure, tmp_path)


def test_a_forget_gate_far_from_one_is_drawn_as_it_is():
    f = np.random.default_rng(0).uniform(0.2, 0.8, (3, 2, 5))
    bottom = of_two_layers(f, f).axes[1]
    assert bottom.get_yscale() == "linear"
    np.testing.assert_allclose(bottom.patches[0].get_y(), np.percentile(f[:, 0, :3], 5))


def test_more_layers_than_are_drawn_are_counted():
    layers = [(f"l{k}", np.array([k])) for k in range(5)]
    gate = np.full((2, 1, 5), 0.5)
    figure = plots.gate_distributions(gate, gate, layers, max_layers=3)
    assert "2 more layers are not drawn" in figure.get_supxlabel()


def test_the_variance_of_a_gate_is_split_by_what_it_varies_with():
    rng = np.random.default_rng(1)
    layers = [("a", np.arange(4)), ("b", np.arange(4, 6))]
    x = rng.normal(size=(7, 3, 6)) + 3 * np.arange(3)[:, None] + rng.normal(size=6)
    x[:, :, 4:] += 2
    x = 0.3 * x - 5
    found = plots.gate_variation(np.exp(x), layers)
    # each part as a difference of numpy's total variances of coarser means
    of = {
        "tasks": x,
        "steps": np.broadcast_to(x.mean(0), x.shape),
        "parameters": np.broadcast_to(x.mean((0, 1)), x.shape),
    }
    coarse = np.empty(6)
    for _, indices in layers:
        coarse[indices] = x[:, :, indices].mean()
    variances = [of[name].var() for name in of] + [coarse.var()]
    shares = -np.diff([*variances, 0.0]) / x.var()
    np.testing.assert_allclose(shares, found[:0:-1], rtol=1e-6)
    assert sum(found[1:]) == pytest.approx(1)
    assert found.std == pytest.approx(x.std())


def test_what_does_not_vary_over_tasks_is_said():
    steps = np.broadcast_to(np.array([0.1, 0.4])[:, None], (3, 2, 5))
    found = plots.gate_variation(steps, [("a", np.arange(5))])
    assert str(found) == "varies with steps (100 %); nothing varies over tasks (0 %)"
    title = of_two_layers(steps, steps).axes[0].get_title(loc="left")
    assert title == f"i {found}"
    tasks = np.swapaxes(np.broadcast_to(np.array([0.1, 0.4, 0.2]), (5, 2, 3)), 0, 2)
    found = plots.gate_variation(tasks, [("a", np.arange(5))])
    assert str(found) == "varies with tasks (100 %)"
    constant = plots.gate_variation(np.full((3, 2, 5), 0.3), [("a", np.arange(5))])
    assert str(constant) == "is constant"


def test_nothing_is_said_of_tasks_where_there_is_one():
    gate = np.random.default_rng(0).uniform(0.2, 0.8, (1, 2, 5))
    found = plots.gate_variation(gate, [("a", np.arange(5))])
    assert np.isnan(found.tasks)
    assert "tasks" not in str(found)
    np.testing.assert_allclose(np.nansum(found[1:]), 1)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (np.full((2, 2, 5), np.nan), r"\(2, 2, 5\) and 20 NaN: give finite numbers"),
        (np.ones((2, 5)), r"shape \(2, 5\) and 0 NaN: give finite numbers \[tasks, T"),
        (np.ones((0, 2, 5)), r"shape \(0, 2, 5\) and"),
        (np.ones((2, 2, 6)), "layers have 5 parameters and the gate 6: give layer_gro"),
    ],
)
def test_what_is_no_gate_of_the_layers_is_refused(gate, message):
    layers = [("a", np.arange(5))]
    with pytest.raises(ValueError, match=message):
        plots.gate_variation(gate, layers)
    with pytest.raises(ValueError, match=message):
        plots.gate_distributions(gate, gate, layers)
