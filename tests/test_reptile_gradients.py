"""Reptile from combinations of inner gradients: the command line and its curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import reptile_gradients
from experiments.studies.reptile_gradients import Found, combinations
from metalstm import data

TINY = (
    "--way 2 --shot 1 --train-shot 2 --queries 1 --inner-batches 2 --batch-size 2 "
    "--outer-rates 0.1 --test-updates 1 --filters 2 --meta-steps 2 --validate-every 1 "
    "--validation-episodes 4 --test-episodes 6"
).split()


def tiny_dataset(copies: int = 4) -> data.Dataset:
    """Classes of noisy copies of one random 8x8 picture each."""
    rng = np.random.default_rng(0)
    pools, names = {}, {}
    for split in ("train", "validation", "test"):
        prototypes = rng.uniform(0, 255, (3, 1, 8, 8, 1))
        images = np.clip(prototypes + rng.normal(0, 9, (3, copies, 8, 8, 1)), 0, 255)
        pools[split] = data.make_pool(images.astype(np.uint8))
        names[split] = tuple(f"{split}{k}" for k in range(3))
    return data.Dataset(
        "tiny", **pools, class_names=names, image_shape=(8, 8, 1), checksum="", info={}
    )


@pytest.fixture(autouse=True)
def tiny_instead_of_glyphs(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load_glyphs", tiny_dataset)
    monkeypatch.chdir(tmp_path)


def test_combinations_are_prefix_sums_and_single_gradients():
    assert combinations(4) == {
        "g1": (1, 0, 0, 0),
        "g1 + g2": (1, 1, 0, 0),
        "g2": (0, 1, 0, 0),
        "g1 + g2 + g3": (1, 1, 1, 0),
        "g3": (0, 0, 1, 0),
        "g1 + ... + g4": (1, 1, 1, 1),
        "g4": (0, 0, 0, 1),
    }


def test_a_run_draws_every_combination_and_goes_on_where_it_was(capsys):
    line = [*TINY, "--workdir", "run"]
    assert reptile_gradients.main(line) == 0
    printed = capsys.readouterr().out
    rows = json.loads(Path("run/results.json").read_text())["combinations"]
    assert [row["name"] for row in rows] == ["g1", "g1 + g2", "g2"]
    starts = set()
    for row in rows:
        with np.load(f"run/combinations/{row['name']}.npz") as saved:
            (curve,) = saved["curves"]
        assert curve[:, 0].tolist() == [0, 1, 2]
        assert row["best_validation"] == curve[:, 1].max()
        assert f"{100 * row['test'][0]:.1f} ± " in printed
        starts.add(curve[0, 1])
    assert len(starts) == 1, "all start from one theta_0, on the same episodes"
    assert Path("run/curves.png").read_bytes()[1:4] == b"PNG"
    assert reptile_gradients.main(line) == 0
    again = capsys.readouterr().out
    assert "outer rate 0.1" not in again, "nothing was trained again"
    assert again.splitlines()[-2:] == printed.splitlines()[-2:]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batch-size 7", "--batch-size 7 does not divide the 50 images"),
        ("--meta-steps 700", "--meta-steps 700 is not a multiple of --validate-every"),
        ("--inner-batches 1", "--inner-batches 1: choose 2 or more"),
        ("--outer-rates 0.1 0", "--outer-rates 0: choose a number above 0"),
        ("--shot 3 --way 2 --batch-size 2 --queries 3", "choose"),
    ],
)
def test_mistakes_are_named(line, message, capsys):
    assert reptile_gradients.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_the_figure_draws_the_chosen_rate():
    low, high = [[0, 0.2, 0.01], [5, 0.4, 0.01]], [[0, 0.2, 0.01], [5, 0.9, 0.01]]
    stopped = [[0, 0.2, 0.01], [np.nan] * 3]
    found = {
        "g1": Found(np.array([low, stopped]), None, 0),
        "g2": Found(np.array([low, high]), None, 0),
    }
    config = reptile_gradients.Config(outer_rates=(0.1, 0.2))
    axes = reptile_gradients.figure(found, config).axes[0]
    first, second, chance = axes.lines
    np.testing.assert_allclose(first.get_ydata(), [0.2, 0.4])
    np.testing.assert_allclose(second.get_ydata(), [0.2, 0.9])
    assert second.get_linestyle() == "--"
    assert chance.get_ydata()[0] == 0.2
