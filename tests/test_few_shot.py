"""The command line: what it writes, what it refuses, and that it can always go on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.scripts import draw_images

import metalstm
from experiments.common import run_folder
from experiments.common.loop import Loop
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot import meta_testing, methods, presets
from experiments.few_shot import options as options
from experiments.few_shot.command_line import as_flags, parse
from experiments.few_shot.saved_methods import choose_methods, read_runs
from experiments.studies import shots_and_ways
from metalstm import data, runs

ROOT = Path(__file__).parents[1]
SMALL = (
    "--learner mlp --widths 6 --hidden 2 --steps 2 --scratch-steps 3 --way 3 "
    "--queries 2 --meta-batch 2 --input-bias -1 -0.5 --gradient-scale one "
    "--validation-episodes 6 --test-episodes 10 --test-batch 5 --learning-rate 0.02"
).split()
BUDGET = "--episodes 40 --validate-every 20 --save-every 10".split()


def tiny_images(num_classes: int, seed: int) -> np.ndarray:
    """Classes of 6 noisy copies of one random 6x6 picture each."""
    rng = np.random.default_rng(seed)
    prototypes = rng.uniform(0, 255, (num_classes, 1, 6, 6, 1))
    noise = rng.normal(0, 20, (num_classes, 6, 6, 6, 1))
    return np.clip(prototypes + noise, 0, 255).astype(np.uint8)


def tiny_dataset() -> data.Dataset:
    sizes = {"train": 12, "validation": 5, "test": 5}
    images = {s: tiny_images(n, i) for i, (s, n) in enumerate(sizes.items())}
    names = {s: tuple(f"{s}{k}" for k in range(n)) for s, n in sizes.items()}
    pools = {s: data.make_pool(a) for s, a in images.items()}
    sum_of_all = data.checksum(*images.values())
    return data.Dataset(
        "tiny", **pools, class_names=names, image_shape=(6, 6, 1), checksum=sum_of_all,
        info={},
    )  # fmt: skip


@pytest.fixture(autouse=True)
def tiny_instead_of_glyphs(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "load_glyphs", tiny_dataset)
    monkeypatch.chdir(tmp_path)


def command(*extra, workdir=None) -> list[str]:
    where = [] if workdir is None else ["--workdir", str(workdir)]
    return [*SMALL, *BUDGET, *where, *map(str, extra)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One finished run with a method of every kind; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    chosen = ["meta-lstm", "sgd", "scratch", "nearest-neighbour"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load_glyphs", tiny_dataset)
        line = command("--algorithms", *chosen, workdir=folder)
        assert few_shot.main(line) == 0
    return folder


def arrays(folder: Path, which: str = "state") -> list[np.ndarray]:
    """All arrays of the newest checkpoint of meta-lstm."""
    from metalstm.runtime import checkpoints

    path = folder / "checkpoints" / "meta-lstm" / which
    return checkpoints.restore(path, None).state


def assert_same_run(left: Path, right: Path):
    for which in ("state", "best"):
        for a, b in zip(arrays(left, which), arrays(right, which), strict=True):
            np.testing.assert_array_equal(a, b)
    one, two = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        for rows in (run_folder.Metrics(f).read() for f in (left, right))
    )
    assert one == two
    with np.load(left / "accuracies.npz") as a, np.load(right / "accuracies.npz") as b:
        np.testing.assert_array_equal(a["meta-lstm"], b["meta-lstm"])


def test_a_run_writes_its_folder(finished):
    results = json.loads((finished / "results.json").read_text())
    assert list(results["methods"]) == [
        "meta-lstm", "sgd", "scratch", "nearest-neighbour"
    ]  # fmt: skip
    assert results["dataset"]["checksum"] == tiny_dataset().checksum
    for name, row in results["methods"].items():
        assert row["episodes"] == 10
        assert row["split"] == "test"
        assert row["seed"] == 0
        assert row["episodes_per_second"] > 0
        assert row["batch_norm"] is None, f"an MLP has none, also for {name}"
    with np.load(finished / "accuracies.npz") as per_episode:
        mine = per_episode["meta-lstm"]
        difference = per_episode["sgd"] - mine
    row = results["methods"]["meta-lstm"]
    assert row["accuracy"] == pytest.approx(mine.mean(), abs=1e-6)
    assert row["ci95"] == pytest.approx(1.96 * mine.std(ddof=1) / 10**0.5, abs=1e-6)
    assert row["meta_training"]["episodes"] == 40
    assert 0 < row["gates"]["mean_f"] < 1
    assert results["paired_difference_to"] == "meta-lstm"
    assert row["paired_difference"] is None
    paired = results["methods"]["sgd"]["paired_difference"]
    assert paired[0] == pytest.approx(difference.mean(), abs=1e-6)
    tried = results["methods"]["sgd"]["meta_training"]["tried"]
    assert len(tried) >= 6
    for picture in ("learning_curve", "gates", "episode", "accuracy"):
        assert (finished / f"{picture}.png").read_bytes()[:4] == b"\x89PNG"
    rows = run_folder.Metrics(finished).read()
    assert {row["kind"] for row in rows} == {"train", "validation"}
    with open(finished / "table.csv", newline="") as file:
        written = {row["name"]: row for row in csv.DictReader(file)}
    assert list(written) == list(results["methods"])
    assert float(written["sgd"]["difference"]) == pytest.approx(paired[0])
    assert written["meta-lstm"]["meta_training_episodes"] == "40"
    assert written["scratch"]["meta_training_episodes"] == ""
    assert "| sgd |" in (finished / "table.md").read_text()


def test_what_a_run_prints(finished, capsys, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    assert few_shot.main(["--resume", str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out
    assert "train / val / test: 12 / 5 / 5 classes" in out
    assert "3-way 1-shot, 2 queries a class" in out
    assert "best on validation: episode" in out
    assert "the same 10 episodes for every method" in out
    assert "gates: mean f" in out
    assert f"--resume {folder}" in out


def test_ctrl_c_saves_and_going_on_is_the_same_run(
    finished, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "run"
    handler = signal.getsignal(signal.SIGINT)  # a background shell ignores it
    real_report, reports = Loop._report, []

    def report(self, step, means):
        real_report(self, step, means)
        reports.append(step)
        if len(reports) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Loop, "_report", report)
    chosen = ["meta-lstm", "sgd", "scratch", "nearest-neighbour"]
    line = command("--algorithms", *chosen, workdir=folder)
    assert few_shot.main(line) == 130
    assert f"--resume {folder}" in capsys.readouterr().out
    assert not (folder / "results.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert few_shot.main(["--resume", str(folder)]) == 0
    assert "resuming at episode" in capsys.readouterr().out
    assert_same_run(folder, finished)


@pytest.mark.slow
def test_kill_9_and_going_on_is_the_same_run(finished, tmp_path):
    images = tmp_path / "images"
    from PIL import Image

    for split, number in (("train", 12), ("val", 5), ("test", 5)):
        for k, of_class in enumerate(tiny_images(number, seed=number)):
            (images / split / f"{split}{k}").mkdir(parents=True)
            for m, image in enumerate(of_class):
                Image.fromarray(image[..., 0]).save(
                    images / split / f"{split}{k}" / f"{m}.png"
                )
    line = ["--dataset", "folders", "--data-dir", str(images), "--image-size", "8"]
    line = [*command("--algorithms", "meta-lstm"), *line, "--episodes", "600"]
    environment = os.environ | {"METALSTM_CACHE_DIR": str(tmp_path / "cache")}

    def start(*extra):
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.few_shot", *extra],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    victim = start(*line, "--workdir", str(killed))
    state = killed / "checkpoints" / "meta-lstm" / "state"
    deadline = time.monotonic() + 300
    while len(list(state.glob("[0-9]*"))) < 2 and victim.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (killed / "results.json").exists(), "the run was over before the kill"
    resumed = start("--resume", str(killed))
    out, _ = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, out
    assert "resuming at episode" in out
    reference = start(*line, "--workdir", str(whole))
    out, _ = reference.communicate(timeout=600)
    assert reference.returncode == 0, out
    assert_same_run(killed, whole)


def test_a_damaged_best_is_written_again(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    (path,) = (folder / "checkpoints" / "meta-lstm" / "best").iterdir()
    (path / "_CHECKPOINT_METADATA").write_text("{")
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        metalstm.load_run(folder)
    assert few_shot.main(["--resume", str(folder)]) == 0
    assert_same_run(folder, finished)


def test_corrupt_images_are_left_out_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METALSTM_CACHE_DIR", str(tmp_path / "cache"))
    images = draw_images(tmp_path / "images")
    (images / "train" / "train3" / "2.png").write_bytes(b"no image")
    line = command("--algorithms", "nearest-neighbour", workdir=tmp_path / "run")
    line += ["--dataset", "folders", "--data-dir", str(images), "--image-size", "8"]
    assert few_shot.main(line) == 2
    said = capsys.readouterr().err
    assert "train3/2.png cannot be decoded" in said
    assert "leave it out with --skip-corrupt" in said
    assert few_shot.main([*line, "--skip-corrupt"]) == 0
    assert "left out: 1 corrupt files" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["dataset"]["skipped"] == 1
    assert results["dataset"]["skipped_files"][0].endswith("train3/2.png")


def test_a_longer_budget_goes_on(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    line = ["--resume", str(folder), "--episodes", "60"]
    assert few_shot.main(line) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["methods"]["meta-lstm"]["meta_training"]["episodes"] == 60


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--algorithms meta-lsmt", "did you mean meta-lstm"),
        ("--algorithms maml,maml", "names maml twice"),
        ("--algorithms sgd", "add one of meta-lstm, fo-meta-lstm, maml"),
        ("--preset rawi-5shot", "did you mean ravi-5shot"),
        ("--dataset omniglott", "choose glyphs, omniglot"),
        ("--dataset folders", "--data-dir"),
        ("--dataset folders --data-dir nowhere", "nowhere"),
        ("--dataset mini-imagenet --data-dir nowhere", "mini-ImageNet"),
        ("--way 700", "way=700 is more than the 5 classes"),
        ("--way 700", "choose --way <= 5"),
        ("--shot 9", "choose --shot + queries <= 6"),
        ("--shot 0", "--shot 0: choose 1 or more"),
        ("--learning-rate 0", "--learning-rate 0.0: choose a number above 0"),
        ("--support-batch 2", "does not divide the 3 images"),
        ("--accumulate-tasks 3 --meta-batch 4", "does not divide --meta-batch 4"),
        ("--schedule cosine --minutes 1", "needs --episodes"),
        ("--query-norm all", "goes with --evaluate"),
        ("--query-norm frozen", "add --train-query-norm frozen"),
        ("--train-way 4 --algorithms maml", "add --tied-head"),
        ("--draw-init --algorithms meta-lstm,sgd", "drop sgd"),
        ("--normalise imagenet", "3 channels"),
        ("--image-size 20", "glyphs are drawn at 28"),
        ("--skip-corrupt", "is for --dataset folders"),
        ("--resume nowhere", "not a run folder"),
        ("--evaluate nowhere", "not a run folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(line, message, capsys, tmp_path):
    before = set(tmp_path.rglob("*"))
    chosen = [] if "--algorithms" in line else ["--algorithms", "nearest-neighbour"]
    assert few_shot.main([*SMALL, *chosen, *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert set(tmp_path.rglob("*")) == before


def test_unknown_flags_are_refused(capsys):
    with pytest.raises(SystemExit) as info:
        few_shot.main(["--wey", "5"])
    assert info.value.code == 2


def test_debug_shows_the_traceback(capsys):
    assert few_shot.main([*SMALL, "--way", "700", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_folder_of_another_config_is_refused(finished, capsys):
    line = command("--algorithms", "meta-lstm", workdir=finished)
    assert few_shot.main([*line, "--hidden", "3"]) == 2
    message = capsys.readouterr().err
    assert "rule.hidden: saved 2, now 3" in message
    assert "another --workdir" in message
    assert few_shot.main(["--resume", str(finished), "--hidden", "3"]) == 2
    assert "rule.hidden" in capsys.readouterr().err


def test_the_end_of_a_cosine_cannot_move(tmp_path, capsys):
    folder = tmp_path / "run"
    chosen = ["--algorithms", "nearest-neighbour", "--schedule", "cosine"]
    assert few_shot.main(command(*chosen, workdir=folder)) == 0
    assert few_shot.main(["--resume", str(folder), "--episodes", "60"]) == 2
    assert "budget.episodes: saved 40, now 60" in capsys.readouterr().err


def test_a_folder_with_something_else_is_refused(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert few_shot.main(command(workdir=tmp_path / "mine")) == 2
    assert "holds no run" in capsys.readouterr().err


def test_two_runs_in_one_folder_are_refused(finished, capsys):
    with run_folder.locked(finished):
        assert few_shot.main(["--resume", str(finished)]) == 2
    message = capsys.readouterr().err
    assert f"process {os.getpid()} is running" in message
    assert "choose another --workdir" in message


def test_default_folders_do_not_collide():
    config = parse(SMALL)
    first = run_folder.choose_folder(config)
    assert first == Path("runs/few_shot/glyphs-3w1s-0")
    first.mkdir(parents=True)
    assert run_folder.choose_folder(config).name == "glyphs-3w1s-0-2"


def test_several_seeds_are_aggregated(tmp_path, capsys):
    folder = tmp_path / "seeds"
    line = command("--algorithms", "fomaml", "--seeds", "2", workdir=folder)
    assert few_shot.main(line) == 0
    assert "mean over 2 meta-training seeds" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    means = [
        json.loads((folder / f"seed-{s}" / "results.json").read_text())["methods"][
            "fomaml"
        ]["accuracy"]
        for s in (0, 1)
    ]
    assert means[0] != means[1]
    row = results["methods"]["fomaml"]
    assert row["accuracy"] == pytest.approx(np.mean(means))
    half = 1.96 * np.std(means, ddof=1) / 2**0.5
    assert row["ci95"] == pytest.approx(half)
    with pytest.raises(FileNotFoundError, match="give one of seed-0, seed-1"):
        metalstm.load_run(folder)


@pytest.mark.fault("NaN, Inf and values that are no bytes")
def test_a_loss_that_is_not_finite_stops_with_the_step_named(tmp_path, capsys):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml", workdir=folder)
    assert few_shot.main([*line, "--inner-rate", "1e38"]) == 2
    assert "not finite at step 1" in capsys.readouterr().err


def test_minutes_bound_the_time(tmp_path):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml", "--minutes", "0.02", workdir=folder)
    assert few_shot.main(line) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["methods"]["fomaml"]["meta_training"]["episodes"] > 0
    # the time is over already
    assert few_shot.main(["--resume", str(folder), "--minutes", "0.001"]) == 0


def test_tensorboard_files(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    line = command("--algorithms", "nearest-neighbour", "--tensorboard", workdir=folder)
    assert few_shot.main(line) == 0
    assert list((folder / "tensorboard").iterdir())
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    line = command("--tensorboard", workdir=tmp_path / "other")
    assert few_shot.main(line) == 2
    assert "metalstm[tensorboard]" in capsys.readouterr().err


def test_evaluate_again_at_another_shot(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    assert few_shot.main(["--evaluate", str(folder), "--test-seed", "0"]) == 0
    rows = json.loads((folder / "evaluation-3w1s-support-0.json").read_text())
    results = json.loads((folder / "results.json").read_text())["methods"]
    for row in rows:
        assert row["mean"] == pytest.approx(results[row["name"]]["accuracy"])
    assert few_shot.main(["--evaluate", str(folder), "--shot", "2"]) == 0
    assert (folder / "evaluation-3w2s-support-0.json").exists()
    capsys.readouterr()
    assert few_shot.main(["--evaluate", str(folder), "--way", "4"]) == 2
    assert "choose --way 3, or train with --tied-head" in capsys.readouterr().err


def test_runs_of_several_folders_become_one_table(finished, tmp_path, capsys):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for folder in folders:
        shutil.copytree(finished, folder)
    saved = json.loads((folders[0] / "config.json").read_text())
    # the first has no Meta-LSTM: the others are compared with the second's
    specs = {n: s for n, s in saved["methods"].items() if n != "meta-lstm"}
    algorithms = {"algorithms": list(specs), "test_steps": 1}
    config = saved["config"] | {"methods": saved["config"]["methods"] | algorithms}
    run_folder.write_json(
        folders[0] / "config.json", saved | {"methods": specs, "config": config}
    )
    (folders[0] / "results.json").unlink()
    line = ["--evaluate", *map(str, folders), "--algorithms", "sgd,meta-lstm"]
    assert few_shot.main([*line, "--workdir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "paired, to meta-lstm" in out
    stem = tmp_path / "out" / "evaluation-3w1s-support-0"
    rows = json.loads(stem.with_suffix(".json").read_text())
    assert [r["name"] for r in rows] == ["sgd (a/run)", "meta-lstm", "sgd (b/run)"]
    results = json.loads((folders[1] / "results.json").read_text())["methods"]
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


def test_runs_that_make_no_common_table_are_refused(finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    assert few_shot.main(["--evaluate", str(folder), str(folder)]) == 2
    assert "twice" in capsys.readouterr().err
    line = ["--evaluate", str(folder), "--algorithms", "maml"]
    assert few_shot.main(line) == 2
    assert "the runs have meta-lstm, sgd" in capsys.readouterr().err
    saved = json.loads((folder / "config.json").read_text())
    other = saved | {"data": saved["data"] | {"image_shape": [8, 8, 1]}}
    run_folder.write_json(folder / "config.json", other)
    assert few_shot.main(["--evaluate", str(finished), str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"{folder} was trained with image_shape [8, 8, 1]" in message
    (folder / "seed-0").mkdir()
    assert few_shot.main(["--evaluate", str(folder)]) == 2
    assert "several seeds" in capsys.readouterr().err


SWEEP = (
    "--shots 2 1 5 6 --ways 3 4 9 --test-episodes 10 --test-batch 5 --algorithms "
    "nearest-neighbour sgd"
).split()


def test_accuracy_against_shots_and_ways(finished, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    tested, real = [], metalstm.evaluate

    def evaluate(algorithm, params, pool, spec, **options):
        if len(tested) == 3:
            raise KeyboardInterrupt
        tested.append((spec.way, spec.shot, spec.queries))
        return real(algorithm, params, pool, spec, **options)

    monkeypatch.setattr(metalstm, "evaluate", evaluate)
    assert shots_and_ways.main([str(folder), *SWEEP]) == 130
    assert "goes on from here" in capsys.readouterr().err
    before = json.loads((folder / shots_and_ways.NAME).read_text())["points"]
    assert len(before) == 3
    monkeypatch.setattr(metalstm, "evaluate", real)
    assert shots_and_ways.main([str(folder), *SWEEP]) == 0
    out = capsys.readouterr().out
    assert "3-way 6-shot left out: shot=6 and queries=1 need 7 images" in out
    assert "9-way 1-shot left out: way=9 is more than the 5 classes" in out
    assert "4-way 1-shot, sgd left out: its head has 3 classes" in out
    assert "3-way 5-shot: 1 queries a class" in out
    points = json.loads((folder / shots_and_ways.NAME).read_text())["points"]
    assert points[:3] == before
    both = ["sgd", "nearest-neighbour"]
    expected = [(3, k, 2, n) for k in (1, 2) for n in both]
    expected += [(3, 5, 1, n) for n in both] + [(4, 1, 2, "nearest-neighbour")]
    names = ("way", "shot", "queries", "method")
    assert [tuple(row[name] for name in names) for row in points] == expected
    results = json.loads((folder / "results.json").read_text())["methods"]
    assert points[0]["mean"] == pytest.approx(results["sgd"]["accuracy"])
    for axis in ("shot", "way"):
        picture = folder / f"accuracy_vs_{axis}.png"
        assert picture.read_bytes()[:4] == b"\x89PNG"
    # other settings would mix what is not comparable
    assert shots_and_ways.main([str(folder), *SWEEP, "--test-seed", "1"]) == 2
    message = capsys.readouterr().err
    assert "holds points with test_seed 0, not 1: give another --workdir" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nowhere", "not a run folder"),
        ("RUN --shots 0", "--shots 0: choose 1 or more"),
        ("RUN --ways 1", "--ways 1: choose 2 or more"),
        ("RUN --algorithms maml", "the runs have meta-lstm, sgd"),
        ("--shots 1", "name at least one run folder"),
    ],
)
def test_mistakes_about_shots_and_ways(finished, line, message, capsys, tmp_path):
    line = line.replace("RUN", str(finished)).split()
    assert shots_and_ways.main([*line, "--workdir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_evaluate_in_every_batch_norm_mode_and_at_any_way(tmp_path, capsys):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml", "prototypical", workdir=folder)
    conv = "--learner conv4 --blocks 1 --filters 2 --strided --tied-head".split()
    assert few_shot.main([*line, *conv]) == 0
    assert few_shot.main(["--evaluate", str(folder), "--query-norm", "all"]) == 0
    rows = json.loads((folder / "evaluation-3w1s-all-0.json").read_text())
    assert [row["name"] for row in rows] == [
        "fomaml [support]", "fomaml [support+1]", "fomaml [transductive]",
        "prototypical [frozen]",
    ]  # fmt: skip
    assert [row["difference"] is None for row in rows] == [True, False, False, True]
    assert few_shot.main(["--evaluate", str(folder), "--way", "4"]) == 0
    assert "fomaml [support]" in capsys.readouterr().out
    predict = metalstm.load_run(folder, "prototypical")
    images = tiny_images(4, 9)
    labels = predict(images[:, 0], list("abcd"), images[:, 1])
    assert set(labels) <= set("abcd")


def test_floors_share_one_pre_training(tmp_path):
    folder, chosen = tmp_path / "run", ("feature-cosine", "finetune-head")
    line = command("--algorithms", *chosen, "--finetune-steps", 4, workdir=folder)
    assert few_shot.main(line) == 0
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {*chosen, "pretrained-linear"}
    methods = json.loads((folder / "results.json").read_text())["methods"]
    tuned = methods["finetune-head"]["meta_training"]
    assert tuned["episodes"] == methods["feature-cosine"]["meta_training"]["episodes"]
    assert set(tuned["tried_steps"]) == {"1", "2", "4"}
    best = max(tuned["tried_steps"].values())
    assert tuned["tried_steps"][str(tuned["steps"])] == best
    rule = metalstm.load_run(folder, "finetune-head").params.rule
    assert rule["num_steps"] == tuned["steps"]
    assert rule["learning_rate"] == np.float32(tuned["rate"])


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


def test_spec_builders_refuse_unknown_names():
    with pytest.raises(ValueError, match="learner='vgg': choose one of conv4"):
        runs.build_learner({"name": "vgg"}, 5)
    with pytest.raises(ValueError, match="rule='lion'"):
        runs.build_rule({"name": "lion"})
    spec = {"algorithm": {"name": "magic"}, "learner": {"name": "mlp"}, "way": 2}
    with pytest.raises(ValueError, match="algorithm='magic'"):
        runs.build_algorithm(spec)


def test_a_tuning_grid_brackets_its_best():
    best, tried = meta_testing.bracketed_best((1.0, 3.0, 9.0), lambda r: -abs(r - 81))
    assert best == 81
    assert max(tried) > 81
    best, tried = meta_testing.bracketed_best((1.0, 3.0, 9.0), lambda r: -abs(r - 3))
    assert best == 3
    assert len(tried) == 3
    _, tried = meta_testing.bracketed_best((1.0, 2.0), lambda r: -r)
    assert len(tried) == 6, "not without end"


@pytest.mark.parametrize("name", sorted(presets.PRESETS))
def test_presets_are_configs_that_work(name):
    config = parse(["--preset", name])
    assert config.run.preset == name
    again = options.from_json(json.loads(json.dumps(options.to_json(config))))
    assert again == config


def test_published_recipes():
    """Ravi & Larochelle's code, and Finn et al.'s."""
    five, one = (parse(["--preset", f"ravi-{k}shot"]) for k in (5, 1))
    for config, shot, steps, momentum, episodes in (
        (five, 5, 8, 0.05, 50_000),
        (one, 1, 12, 0.1, 75_000),
    ):
        assert (config.data.shot, config.methods.steps) == (shot, steps)
        assert config.learner.norm_momentum == momentum
        assert (config.budget.episodes, config.budget.meta_batch) == (episodes, 1)
        assert (config.budget.learning_rate, config.budget.clip) == (1e-3, 0.25)
        assert (config.data.queries, config.rule.hidden) == (15, 20)
        assert (config.rule.forget_bias, config.rule.input_bias) == ((4, 5), (-5, -4))
        assert config.methods.order == "first"
        spec = few_shot_spec(config, "meta-lstm")["algorithm"]["options"]
        assert spec["gradient_scale"] == "1/batch"
        assert spec["support_stats"] == "moving"
        assert spec["train_query_norm"] == "transductive"
        assert spec["query_norm"] == "support"
    maml = parse(["--preset", "maml-omniglot"])
    assert (maml.methods.inner_rate, maml.methods.steps) == (0.4, 1)
    assert maml.budget.meta_batch == 32
    mini = parse(["--preset", "maml-mini-imagenet"])
    assert (mini.methods.steps, mini.methods.test_steps) == (5, 10)
    assert mini.methods.inner_rate == 0.01


def few_shot_spec(config, name):
    return methods.method_specs(config)[name]


@pytest.fixture
def with_own(monkeypatch):
    """A preset whose methods have settings of their own."""
    flags = {"way": 3, "steps": 2, "algorithms": ("meta-lstm", "sgd")}
    own = {
        "meta-lstm": {"filters": 8, "steps": 3, "rotations": True},
        "sgd": {"filters": 4, "steps": 4},
        "matching": {"filters": 6, "forget_bias": (1.0, 2.0), "episodes": 7},
    }
    monkeypatch.setitem(presets.PRESETS, "mine", flags)
    monkeypatch.setitem(presets.METHOD_FLAGS, "mine", own)
    return "--preset mine --algorithms meta-lstm,sgd,matching,maml".split()


def test_methods_have_settings_of_their_own(with_own):
    config = parse(with_own)
    specs = methods.method_specs(config)
    filters = {n: s["learner"]["options"]["filters"] for n, s in specs.items()}
    # sgd starts from meta-lstm's theta_0, so it adapts its learner
    assert filters == {"meta-lstm": 8, "sgd": 8, "matching": 6, "maml": 32}
    steps = [s["algorithm"]["options"].get("num_steps") for s in specs.values()]
    assert steps == [3, 4, None, 2]
    own = methods.config_for(config, "matching")
    assert own.budget.episodes == 7
    assert own.methods.algorithms == config.methods.algorithms
    assert own.own == {}


def test_a_flag_on_the_command_line_wins_over_a_methods_own(with_own):
    # also when it is what the preset has for the others
    config = parse([*with_own, "--steps", "2", "--filters=5", "--no-rotations"])
    assert config.own == {"matching": {"forget_bias": (1.0, 2.0), "episodes": 7}}
    specs = methods.method_specs(config)
    assert {s["learner"]["options"]["filters"] for s in specs.values()} == {5}
    assert specs["sgd"]["algorithm"]["options"]["num_steps"] == 2


def test_own_settings_survive_the_run_folder(with_own):
    config = parse(with_own)
    again = options.from_json(json.loads(json.dumps(options.to_json(config))))
    assert again == config
    longer = parse([*with_own, *"--episodes 9 --filters 8 --forget-bias 1 2".split()])
    assert "matching" not in longer.own
    may_change = options.may_change(longer)
    assert {"budget.episodes", "own.matching.episodes"} <= set(may_change)
    own = config.own | {"matching": {"schedule": "cosine"}}
    ends = options.may_change(dataclasses.replace(config, own=own))
    assert not {"budget.episodes", "own.matching.episodes"} & set(ends)
    assert parse("--preset mine --algorithms maml".split()).own == {}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"maml": {"way": 7}}, "way is the same for all methods"),
        ({"maml": {"steps": 0}}, "--steps 0: choose 1 or more"),
        ({"maml": {"train_way": 9}}, "add --tied-head"),
        ({"maml": {"wey": 9}}, "there is no option 'wey'"),
    ],
)
def test_own_settings_are_checked(with_own, monkeypatch, own, message):
    monkeypatch.setitem(presets.METHOD_FLAGS, "mine", own)
    with pytest.raises(ValueError, match=message):
        parse(with_own)


def test_floors_share_what_has_the_same_settings():
    config = parse("--algorithms finetune-head,finetune-all,feature-cosine".split())
    own = {"finetune-all": {"filters": 8}, "feature-cosine": {"finetune_steps": 3}}
    config = dataclasses.replace(config, own=own)
    specs = methods.method_specs(config, num_classes=9)
    wanted, uses = methods.pretrainings(config, specs)
    assert uses == {
        "finetune-head": "pretrained-linear",
        "finetune-all": "pretrained-linear-2",
        "feature-cosine": "pretrained-linear",
    }
    assert wanted["pretrained-linear-2"].spec["learner"]["options"]["filters"] == 8
    assert wanted["pretrained-linear-2"].config.learner.filters == 8
    assert wanted["pretrained-linear"].spec["algorithm"]["options"] == {
        "num_classes": 9, "compare": "centroid", "classifier": "linear"
    }  # fmt: skip


@pytest.mark.slow
def test_a_run_with_own_settings_resumes_and_loads(tmp_path, monkeypatch, with_own):
    line = [*with_own, *command(workdir=tmp_path / "run")]
    line[3] = "meta-lstm,prototypical,finetune-head"
    own = {"meta-lstm": {"hidden": 3}, "prototypical": {"widths": (5,), "episodes": 20}}
    own |= {"finetune-head": {"rotations": True, "finetune_steps": 2}}
    monkeypatch.setattr(
        presets, "METHOD_FLAGS", {"mine": own | {"matching": {"hidden": 9}}}
    )
    unsaid = {"--hidden", "--widths", "--episodes"}
    kept = [i for i, a in enumerate(line) if not {a, line[i - 1]} & unsaid]
    line = [line[i] for i in kept]
    monkeypatch.setitem(
        presets.PRESETS,
        "mine",
        presets.PRESETS["mine"] | {"episodes": 40, "widths": (6,), "hidden": 2},
    )
    assert few_shot.main(line) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())["methods"]
    episodes = {n: r["meta_training"].get("episodes") for n, r in results.items()}
    assert episodes == {"meta-lstm": 40, "prototypical": 20, "finetune-head": 40}
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["config"]["own"] == json.loads(json.dumps(own))
    specs = saved["methods"]
    assert specs["meta-lstm"]["rule"]["options"]["hidden_size"] == 3
    # turned characters are further classes of pre-training
    assert specs["finetune-head"]["algorithm"]["options"]["num_classes"] == 4 * 12
    predict = metalstm.load_run(tmp_path / "run", "prototypical")
    assert jax.tree.leaves(predict.params.params)[0].shape[-1] == 5
    before = (tmp_path / "run" / "accuracies.npz").read_bytes()
    assert few_shot.main(["--resume", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "accuracies.npz").read_bytes() == before
    again = ["--resume", str(tmp_path / "run"), "--hidden", "4"]
    assert few_shot.main(again) == 2


def test_all_names_every_method():
    for preset in (None, "omniglot", "demo", "mini-imagenet"):
        chosen = [] if preset is None else ["--preset", preset]
        config = parse([*chosen, "--algorithms", "all"])
        assert config.methods.algorithms == tuple(methods.METHODS)
        specs = json.loads(json.dumps(methods.method_specs(config)))
        assert set(specs) == set(methods.METHODS)


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_of_the_omniglot_preset_predicts(name):
    """By shapes alone: nothing is compiled."""
    line = ["--preset", "omniglot", "--algorithms", name]
    hand_made = methods.METHODS[name].family == methods.HAND_MADE
    config = parse([*line, *(["meta-lstm"] if hand_made else [])])
    spec = json.loads(json.dumps(methods.method_specs(config, 781)[name]))
    algorithm = runs.build_algorithm(spec)
    episode = runs.example_episode((28, 28, 1), 5)

    def predict():
        params = algorithm.init(jax.random.key(0), episode)
        key, (support, query) = jax.random.key(0), episode
        return algorithm.predict(params, key, support, query.x, num_classes=5)

    assert jax.eval_shape(predict).shape == (5, 5)


def test_flags_override_presets():
    config = parse("--preset demo --way 7 --algorithms maml".split())
    assert config.data.way == 7
    assert config.methods.algorithms == ("maml",)
    assert config.data.dataset == "glyphs"
    assert config.learner.tied_head
    with pytest.raises(ValueError, match="there is no option 'wey'"):
        options.with_flags(config, wey=3)


def test_advice_is_said_in_flags():
    said = as_flags("way=9 is too many; choose way <= 5")
    assert said == "way=9 is too many; choose --way <= 5"
    assert as_flags("this way or that way") == "this way or that way"
    said = as_flags("leave it out with skip_corrupt=True")
    assert said == "leave it out with --skip-corrupt"


def test_metrics_survive_a_half_written_line(tmp_path):
    metrics = run_folder.Metrics(tmp_path)
    metrics.write("maml", "train", 10, loss=1.0)
    metrics.write("maml", "train", 20, loss=0.5)
    metrics.write("sgd", "train", 20, loss=0.7)
    with open(metrics.path, "a") as file:
        file.write('{"method": "maml", "ki')
    metrics.rewind("maml", 10)
    assert [(r["method"], r["episode"]) for r in metrics.read()] == [
        ("maml", 10),
        ("sgd", 20),
    ]
