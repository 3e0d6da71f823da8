"""The study of the gates' settings, as small as can be."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import metalstm
from experiments.studies import gate_settings
from experiments.studies.gate_settings import SETTINGS, Choice
from metalstm import data

FIRST_ORDER = Choice(
    "1", {}, {"num_steps": 1, "differentiation": metalstm.first_order()}
)


@pytest.fixture(autouse=True)
def random_pictures(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    pools = {s: data.make_pool(rng.uniform(size=(6, 7, 2, 2, 1))) for s in data.SPLITS}
    monkeypatch.setattr(gate_settings, "pools", lambda: pools)
    monkeypatch.chdir(tmp_path)


def test_a_run_tests_every_choice_once_and_draws(tmp_path, monkeypatch, capsys):
    calls = []

    def fake(choice, programs, test_steps, config):
        calls.append(choice.label)
        values = np.linspace(0.3, 0.9, 2 * len(test_steps) * 4)
        return gate_settings.Tested(values.reshape(2, len(test_steps), 4))

    monkeypatch.setattr(gate_settings, "measure", fake)
    line = "--test-steps 1 2 --settings input_bias,num_steps --workdir run".split()
    assert gate_settings.main(line) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["settings"]
    assert list(found) == ["input_bias", "num_steps"]
    assert np.shape(found["input_bias"]["0.8808"]) == (2, 1)  # seeds, numbers of steps
    assert np.shape(found["num_steps"]["1"]) == (2, 2)
    for figure in ("settings", "updates"):
        for kind in ("png", "pdf"):
            assert (tmp_path / "run" / f"{figure}.{kind}").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "settings.png, updates.png in run; figures also as .pdf" in said
    assert len(calls) == 10
    assert gate_settings.main(line) == 0
    assert len(calls) == 10, "kept"


def test_a_choice_is_tested_with_each_seed_and_number_of_updates():
    config = gate_settings.Config(seeds=2, meta_steps=3, test_episodes=4)
    programs = gate_settings.Programs(FIRST_ORDER)
    found = gate_settings.measure(FIRST_ORDER, programs, (1, 2), config)
    assert found.accuracies.shape == (2, 2, 4)
    assert ((found.accuracies >= 0) & (found.accuracies <= 1)).all()


def test_choices_of_a_start_have_one_program():
    episode = gate_settings._EPISODES.sample(
        jax.random.key(0), gate_settings.pools()["train"]
    )
    shapes = [
        jax.eval_shape(
            gate_settings.algorithm_of(choice).init, jax.random.key(0), episode
        )
        for choice in SETTINGS["input_bias"]
    ]
    assert all(shape == shapes[0] for shape in shapes)


def test_every_panel_has_its_default():
    for setting, (_, default) in gate_settings.PANELS.items():
        assert default in [choice.label for choice in SETTINGS[setting]]


def test_an_unknown_setting_is_named(capsys):
    assert gate_settings.main(["--settings", "input-bias"]) == 2
    assert "did you mean input_bias?" in capsys.readouterr().err
