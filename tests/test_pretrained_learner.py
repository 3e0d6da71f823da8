"""Trained methods in files: listed, loaded, and tested again by the command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from few_shot_runs import META_LSTM, command, read, tiny_dataset

import metalstm
from experiments.few_shot import __main__ as few_shot
from metalstm import data

pytestmark = pytest.mark.usefixtures("tiny_instead_of_glyphs")
CARD = {"trained_on": "tiny", "result": "chance", "limits": "6x6 images"}


@pytest.fixture(scope="module")
def shipped(finished, tmp_path_factory):
    """The Meta-LSTM of a run as one file."""
    saved = read(finished / "config.json")
    methods = {"meta-lstm": saved["config"]["methods"]["meta-lstm"]}
    trained = metalstm.load_run(finished, "meta-lstm")
    return metalstm.save(
        tmp_path_factory.mktemp("shipped") / "ours.npz",
        trained.algorithm,
        trained.params,
        tiny_dataset().train,
        data.EpisodeSpec(3, 1, 2),
        info=CARD
        | {"config": saved["config"] | {"methods": methods}, "data": saved["data"]}
        | {"meta_training": {"episodes": 40, "wall_seconds": 1.0}},
    )


def test_the_command_tests_a_file_as_it_tests_the_run(
    finished, shipped, tmp_path, capsys
):
    # a file is named in the results' names, so that another does not overwrite them
    for source, name in ((shipped, f"{Path(shipped).stem}-"), (finished, "")):
        line = ["--evaluate", source, "--algorithms", "meta-lstm", "--test-seed", 3]
        assert few_shot.main([*map(str, line), "--workdir", str(tmp_path / "out")]) == 0
        results = tmp_path / "out" / f"evaluation-{name}3w1s-3"
        (row,) = read(results.with_suffix(".json"))
        with np.load(results.with_suffix(".npz")) as arrays:
            row |= {"accuracies": arrays["meta-lstm"].tolist()}
        if source == shipped:
            of_file = row
    same = {"mean", "ci95", "accuracies", "meta_training_episodes"}
    assert {k: of_file[k] for k in same} == {k: row[k] for k in same}
    assert "meta-lstm" in capsys.readouterr().out


def test_a_run_starts_from_a_file(shipped, finished, tmp_path, capsys):
    line = command(
        "--algorithms", "meta-lstm", *META_LSTM, "--init-from", shipped,
        "--theta-learning-rate", 0, "--episodes", 2, workdir=tmp_path / "run",
    )  # fmt: skip
    assert few_shot.main(line) == 0
    assert f"starts from meta_lstm of {shipped}: 4 arrays" in capsys.readouterr().out
    before, after = metalstm.load(shipped), metalstm.load_run(tmp_path / "run")
    tiny.assert_equal(before.params.learner, after.params.learner)


def test_methods_are_listed_and_loaded_by_name(shipped, finished):
    (card,) = metalstm.pretrained_learner(directory=shipped.parent)
    assert card == metalstm.LearnerCard("ours", *CARD.values())
    ours = metalstm.pretrained_learner("ours", directory=shipped.parent)
    run = metalstm.load_run(finished, "meta-lstm")
    tiny.assert_equal(ours.params, run.params)
    images = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 1), np.uint8)
    labels = ["a", "b", "c"]
    assert (ours(images[:3], labels, images) == run(images[:3], labels, images)).all()
    with pytest.raises(ValueError, match=r"method 'other' in .*: choose from ours"):
        metalstm.pretrained_learner("other", directory=shipped.parent)
    assert metalstm.pretrained_learner(directory=shipped.parent / "none") == ()


def test_a_file_that_does_not_say_how_to_test_it_is_refused(shipped, tmp_path, capsys):
    plain = metalstm.load(shipped)
    spec, pool = data.EpisodeSpec(3, 1, 2), tiny_dataset().train
    path = metalstm.save(tmp_path / "a.npz", plain.algorithm, plain.params, pool, spec)
    assert few_shot.main(["--evaluate", str(path)]) == 2
    assert "does not say how to test it" in capsys.readouterr().err


def test_a_file_with_the_options_of_several_methods_is_refused(
    finished, shipped, tmp_path, capsys
):
    saved, trained = read(finished / "config.json"), metalstm.load(shipped)
    path = metalstm.save(
        tmp_path / "several.npz",
        trained.algorithm,
        trained.params,
        tiny_dataset().train,
        data.EpisodeSpec(3, 1, 2),
        info={"config": saved["config"], "data": saved["data"]},
    )
    assert len(saved["config"]["methods"]) > 1
    assert few_shot.main(["--evaluate", str(path)]) == 2
    assert "holds one method, and its config has" in capsys.readouterr().err
