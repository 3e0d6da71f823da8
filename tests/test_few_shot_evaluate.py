"""Finished runs of few_shot, tested again: one table, other shots, ways and modes."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from few_shot_runs import command, read, tiny_dataset, tiny_images

import metalstm
from experiments.common.run_folder import write_json
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot.saved_runs import choose_methods, read_runs
from experiments.studies import shots_and_ways
from metalstm import data

pytestmark = pytest.mark.usefixtures("tiny_instead_of_glyphs")


def test_evaluate_again_at_another_shot(copy, capsys):
    assert few_shot.main(["--evaluate", str(copy), "--test-seed", "0"]) == 0
    rows = read(copy / "evaluation-3w1s-0.json")
    results = read(copy / "results.json")["methods"]
    for row in rows:
        assert row["mean"] == pytest.approx(results[row["name"]]["accuracy"])
    line = ["--evaluate", str(copy), "--shot", "2", "--query-norm", "support"]
    assert few_shot.main([*line, "--algorithms", "nearest-neighbour"]) == 0
    rows = read(copy / "evaluation-3w2s-support-0.json")
    assert [(r["shot"], r["evaluated"]) for r in rows] == [(2, [copy.name])]
    assert few_shot.main([*line, "--num-test-steps", "1"]) == 0
    assert (
        read(copy / "evaluation-3w2s-support-1steps-0.json")[0]["num_test_steps"] == 1
    )
    capsys.readouterr()
    assert few_shot.main(["--evaluate", str(copy), "--way", "4"]) == 2
    assert "choose --way 3, or train with --tied-head" in capsys.readouterr().err


def test_another_test_leaves_the_results_of_the_first(copy, tmp_path):
    line = ["--evaluate", str(copy), "--workdir", str(tmp_path / "out"), "--algorithms"]
    assert few_shot.main([*line, "nearest-neighbour", "--test-episodes", "5"]) == 0
    assert few_shot.main([*line, "nearest-neighbour", "--test-episodes", "6"]) == 0
    assert few_shot.main([*line, "sgd", "--test-episodes", "5"]) == 0
    out = tmp_path / "out"
    rows = [read(out / f"evaluation-3w1s-0{n}.json")[0] for n in ("", "-2", "-3")]
    found = [(row["name"], row["episodes"]) for row in rows]
    assert found == [("nearest-neighbour", 5), ("nearest-neighbour", 6), ("sgd", 5)]
    # the same again takes its own place
    assert few_shot.main([*line, "nearest-neighbour", "--test-episodes", "6"]) == 0
    assert len(list(out.glob("*.npz"))) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--seed 3", "--test-seed"),
        ("--seeds 3", "--seeds: --evaluate tests runs that are finished"),
        ("--tensorboard", "--tensorboard"),
        ("--algorithms nearest-neighbour,maml", "--algorithms maml: not known"),
        ("--algorithms nearest-neighbour --num-test-steps 7", "make no updates"),
    ],
)
def test_an_evaluation_ignores_no_flag(copy, flags, message, capsys):
    assert few_shot.main(["--evaluate", str(copy), *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(copy.glob("evaluation-*"))


def test_runs_of_several_folders_become_one_table(finished, tmp_path, capsys):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        shutil.copytree(finished, folder)
    saved = read(folders[0] / "config.json")
    # the first has no Meta-LSTM: the others are compared with the second's
    del saved["config"]["methods"]["meta-lstm"]
    saved["config"]["methods"]["sgd"]["method"]["num_test_steps"] = 1
    write_json(folders[0] / "config.json", saved)
    (folders[0] / "results.json").unlink()
    line = ["--evaluate", *map(str, folders), "--algorithms", "sgd,meta-lstm"]
    assert few_shot.main([*line, "--workdir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "paired, to meta-lstm" in out
    stem = tmp_path / "out" / "evaluation-3w1s-0"
    rows = read(stem.with_suffix(".json"))
    assert [r["name"] for r in rows] == ["sgd (a/run)", "meta-lstm", "sgd (b/run)"]
    results = read(folders[1] / "results.json")["methods"]
    shorter, meta_lstm, sgd = rows
    for row, name in ((sgd, "sgd"), (meta_lstm, "meta-lstm")):
        assert row["mean"] == pytest.approx(results[name]["accuracy"])
    paired = results["sgd"]["paired_difference"]
    assert sgd["difference"] == pytest.approx(paired[0], abs=1e-6)
    assert shorter["mean"] != sgd["mean"], "its run has one update at the test"
    assert [r["meta_training_episodes"] for r in rows] == [None, 40, None]
    spent = results["meta-lstm"]["meta_training"]["wall_seconds"]
    assert meta_lstm["meta_training_seconds"] == spent
    # of a run that was stopped: by its checkpoint
    (folders[1] / "results.json").unlink()
    stopped = choose_methods(read_runs(folders[1:]), ["meta-lstm"])[0].meta_training
    assert stopped["episodes"] == 40
    assert stopped["wall_seconds"] == pytest.approx(spent, rel=0.2)
    assert stem.with_suffix(".md").exists()
    assert stem.with_suffix(".csv").exists()


def test_runs_that_make_no_common_table_are_refused(finished, copy, capsys):
    assert few_shot.main(["--evaluate", str(copy), str(copy)]) == 2
    assert "twice" in capsys.readouterr().err
    assert few_shot.main(["--evaluate", str(copy), "--algorithms", "maml"]) == 2
    assert (
        "--algorithms maml: not known. Choose from meta-lstm, sgd"
        in capsys.readouterr().err
    )
    saved = read(copy / "config.json")
    other = saved | {"data": saved["data"] | {"image_shape": [8, 8, 1]}}
    write_json(copy / "config.json", other)
    assert few_shot.main(["--evaluate", str(finished), str(copy)]) == 2
    message = capsys.readouterr().err
    assert f"{copy} was trained with image_shape [8, 8, 1]" in message
    del saved["data"]["classes"]
    write_json(copy / "config.json", saved)
    assert few_shot.main(["--evaluate", str(copy)]) == 2
    assert "is damaged (KeyError: 'classes' of its data)" in capsys.readouterr().err
    (copy / "seed-0").mkdir()
    assert few_shot.main(["--evaluate", str(copy)]) == 2
    assert "several seeds" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_in_every_batch_norm_mode_and_at_any_way(tmp_path, capsys):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml", "prototypical", workdir=folder)
    conv = "--num-blocks 1 --filters 2 --downsample stride --tied-head".split()
    assert line[:4] == ["--learner", "mlp", "--widths", "6"]
    assert few_shot.main([*line[4:], *conv]) == 0
    assert few_shot.main(["--evaluate", str(folder), "--query-norm", "all"]) == 0
    rows = read(folder / "evaluation-3w1s-all-0.json")
    assert [row["name"] for row in rows] == [
        "fomaml [support]", "fomaml [support+1]", "fomaml [transductive]",
        "prototypical [frozen]",
    ]  # fmt: skip
    assert [row["difference"] is None for row in rows] == [True, False, False, True]
    capsys.readouterr()
    assert few_shot.main(["--evaluate", str(folder), "--way", "4"]) == 0
    assert "fomaml  " in capsys.readouterr().out
    predict = metalstm.load_run(folder, "prototypical")
    images = tiny_images(4, 9)
    labels = predict(images[:, 0], list("abcd"), images[:, 1])
    assert set(labels) <= set("abcd")


SWEEP = (
    "--shots 2 1 5 6 --ways 3 4 9 --test-episodes 10 --test-batch 5 --algorithms "
    "nearest-neighbour sgd"
).split()


def test_accuracy_against_shots_and_ways(copy, capsys, monkeypatch):
    tested, real = [], metalstm.evaluate

    def evaluate(algorithm, params, pool, spec, **options):
        if len(tested) == 3:
            raise KeyboardInterrupt
        tested.append((spec.way, spec.shot, spec.queries))
        return real(algorithm, params, pool, spec, **options)

    monkeypatch.setattr(metalstm, "evaluate", evaluate)
    line, sweep = [str(copy), *SWEEP, "--workdir", "sweep"], Path("sweep")
    assert shots_and_ways.main(line) == 130
    assert (
        "stopped; to resume: the same with --workdir sweep" in capsys.readouterr().err
    )
    before = {path: path.read_bytes() for path in (sweep / "points").iterdir()}
    assert len(before) == 3
    monkeypatch.setattr(metalstm, "evaluate", real)
    assert shots_and_ways.main(line) == 0
    out = capsys.readouterr().out
    assert "3-way 1-shot, sgd: " not in out, "nothing was tested again"
    assert {path: path.read_bytes() for path in before} == before
    assert "3-way 6-shot omitted: shot=6 and queries=1 need 7 images" in out
    assert "9-way 1-shot omitted: way=9 is more than the 5 classes" in out
    assert "4-way 1-shot, sgd omitted: its head has 3 classes" in out
    assert "3-way 5-shot: 1 queries a class" in out
    points = read(sweep / "results.json")["points"]
    assert len(list((sweep / "points").iterdir())) == len(points)
    both = ["sgd", "nearest-neighbour"]
    expected = [(3, k, 2, n) for k in (1, 2) for n in both]
    expected += [(3, 5, 1, n) for n in both] + [(4, 1, 2, "nearest-neighbour")]
    names = ("way", "shot", "queries", "method")
    assert [tuple(row[name] for name in names) for row in points] == expected
    results = read(copy / "results.json")["methods"]
    assert points[0]["mean"] == pytest.approx(results["sgd"]["accuracy"])
    for axis in ("shot", "way"):
        picture = sweep / f"accuracy_vs_{axis}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG"
    # so would other parameters, whose points have the same names
    with monkeypatch.context() as patch:
        patch.setattr(shots_and_ways, "digest", lambda params: "0123")
        assert shots_and_ways.main(line) == 2
    assert "began with other data" in capsys.readouterr().err
    # other settings would mix what is not comparable
    assert shots_and_ways.main([*line, "--seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "seed: saved 0, now 1" in message
    assert "or another --workdir" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "not a run folder"),
        ("RUN --shots 0", "--shots 0: choose 1 or more"),
        ("RUN --ways 1", "--ways 1: choose 2 or more"),
        ("RUN --algorithms maml", "--algorithms maml: not known. Choose from meta-l"),
        ("--shots 1", "name at least one run folder"),
    ],
)
def test_mistakes_about_shots_and_ways(finished, line, message, capsys, tmp_path):
    line = line.replace("RUN", str(finished)).split()
    assert shots_and_ways.main([*line, "--workdir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- predictors ------------------------------------------------------------------------


@pytest.mark.smoke
def test_load_run_predicts_as_the_evaluation_did(finished):
    predict = metalstm.load_run(finished)
    assert predict.method == "meta-lstm"
    dataset = tiny_dataset()
    spec = data.EpisodeSpec(3, 1, 2)
    accuracies = []
    for i in range(10):
        key = data.episode_key(0, "test", 0, i)
        support, query = jax.device_get(data.sample_episode(key, dataset.test, spec))
        names = np.array(["ant", "bee", "cat"])
        labels = predict(support.x, names[support.y], query.x)
        accuracies.append((labels == names[query.y]).mean())
    with np.load(finished / "accuracies.npz") as per_episode:
        np.testing.assert_allclose(accuracies, per_episode["meta-lstm"], atol=1e-6)
    raw = np.round(255 * support.x).astype(np.uint8)
    labels_of_bytes = predict(raw, names[support.y], np.round(255 * query.x) / 255)
    assert list(labels_of_bytes) == list(labels)


def test_load_run_refuses(finished, tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        metalstm.load_run(tmp_path)
    with pytest.raises(ValueError, match="choose one of meta-lstm, sgd"):
        metalstm.load_run(finished, "maml")
    predict = metalstm.load_run(finished, "sgd")
    x = np.zeros((3, 6, 6, 1))
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        predict(x, [0, 1], x)
    with pytest.raises(ValueError, match="trained with way=3"):
        predict(x, [0, 1, 1], x)
    with pytest.raises(ValueError, match="resize them"):
        predict(np.zeros((3, 5, 6, 1)), [0, 1, 2], x)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        predict(x + 200, [0, 1, 2], x)
