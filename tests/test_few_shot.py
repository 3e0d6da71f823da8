"""What a run of few_shot writes and prints, and that it can always be resumed."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from faults.scripts import draw_images
from few_shot_runs import (
    CHOSEN,
    META_LSTM,
    command,
    four_methods,
    read,
    tiny_dataset,
)

import metalstm
from experiments.common import run_folder
from experiments.common.loop import Loop
from experiments.common.tuning import each_point, tune
from experiments.few_shot import __main__ as few_shot
from experiments.few_shot.command_line import parse
from experiments.few_shot.running import choose_folder
from metalstm.runtime import checkpoints

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("tiny_instead_of_glyphs")


def arrays(folder: Path, which: str = "state") -> list[np.ndarray]:
    """All arrays of the newest checkpoint of meta-lstm."""
    return checkpoints.restore(folder / "checkpoints" / "meta-lstm" / which, None).state


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


@pytest.mark.smoke
def test_a_run_writes_its_folder(finished):
    results = read(finished / "results.json")
    assert list(results["methods"]) == list(CHOSEN)
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
    assert "| sgd " in (finished / "table.md").read_text()


def test_what_a_run_prints(copy, capsys):
    assert few_shot.main(["--resume", str(copy)]) == 0
    out = capsys.readouterr().out
    assert f"jax {jax.__version__}" in out
    assert "train / val / test: 12 / 5 / 5 classes" in out
    assert "3-way 1-shot, 2 queries a class" in out
    assert "batch norm: none in this learner" in out
    assert "best on validation: episode" in out
    assert "the same 10 episodes for every method" in out
    assert "gates: mean f" in out
    assert "to resume" not in out, "it is finished"
    assert "results.json, table.md, table.csv, learning_curve.png, " in out


def test_ctrl_c_saves_and_resuming_is_the_same_run(
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
    assert few_shot.main(four_methods(folder)) == 130
    assert f"--resume {folder}" in capsys.readouterr().out
    assert not (folder / "results.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    assert few_shot.main(["--resume", str(folder)]) == 0
    assert "resuming at episode" in capsys.readouterr().out
    assert_same_run(folder, finished)


# the run of `finished`, which takes its time once something is saved
GRACE = 30  # seconds that Slurm, Kubernetes and preempted TPUs give after SIGTERM
RESUME = "python -m experiments.few_shot --resume"
VICTIM = """
import sys, time
import few_shot_runs
from experiments.common.loop import Loop
from experiments.few_shot import __main__ as few_shot
from metalstm import data

def save(self, state, real=Loop._save):
    real(self, state)
    time.sleep(1)

Loop._save, data.load_glyphs = save, few_shot_runs.tiny_dataset
sys.exit(few_shot.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_kill_or_preemption_and_resuming_is_the_same_run(
    number, finished, tmp_path, capsys
):
    killed, said = tmp_path / "killed", tmp_path / "said.txt"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with said.open("w") as file:
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, *four_methods(killed)],
            env=os.environ | {"PYTHONPATH": path}, stdout=file, stderr=file,
        )  # fmt: skip
    state = killed / "checkpoints" / "meta-lstm" / "state"
    deadline = time.monotonic() + 300
    while len(list(state.glob("[0-9]*"))) < 2 and victim.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.send_signal(number)
    if number == signal.SIGKILL:
        assert victim.wait() == -signal.SIGKILL, said.read_text()
    else:
        time.sleep(0.1)
        victim.send_signal(number)  # a cluster may send it to the group as well
        assert victim.wait(timeout=GRACE) == 130, said.read_text()
        assert f"stopped and saved; to resume: {RESUME} {killed}" in said.read_text()
    assert not (killed / "results.json").exists(), "the run was over before the kill"
    assert few_shot.main(["--resume", str(killed)]) == 0
    assert "resuming at episode" in capsys.readouterr().out
    assert_same_run(killed, finished)


def test_a_damaged_best_is_written_again(finished, copy):
    (step,) = checkpoints.steps(copy / "checkpoints" / "meta-lstm" / "best")
    (
        copy / "checkpoints" / "meta-lstm" / "best" / str(step) / "_CHECKPOINT_METADATA"
    ).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        metalstm.load_run(copy)
    assert few_shot.main(["--resume", str(copy)]) == 0
    assert_same_run(copy, finished)


def test_a_longer_budget_resumes_and_other_options_are_refused(copy, capsys):
    line = ["--resume", str(copy)]
    assert few_shot.main([*line, "--hidden-size", "3"]) == 2
    message = capsys.readouterr().err
    assert "methods.meta-lstm.method.rule.hidden_size: saved 2, now 3" in message
    assert "another --workdir" in message
    fewer = command("--algorithms", "meta-lstm", *META_LSTM, workdir=copy)
    assert few_shot.main(fewer) == 2
    assert "run.algorithms" in capsys.readouterr().err
    assert few_shot.main([*line, "--episodes", "60"]) == 0
    results = read(copy / "results.json")
    assert results["methods"]["meta-lstm"]["meta_training"]["episodes"] == 60


def test_two_runs_in_one_folder_are_refused(copy, capsys):
    with run_folder.locked(copy):
        assert few_shot.main(["--resume", str(copy)]) == 2
    message = capsys.readouterr().err
    assert f"process {os.getpid()} is running" in message
    assert "choose another --workdir" in message


def test_the_end_of_a_cosine_cannot_move(tmp_path, capsys):
    folder = tmp_path / "run"
    chosen = ["--algorithms", "nearest-neighbour", "--schedule", "cosine"]
    assert few_shot.main(command(*chosen, workdir=folder)) == 0
    assert few_shot.main(["--resume", str(folder), "--episodes", "60"]) == 2
    message = capsys.readouterr().err
    assert "methods.nearest-neighbour.training.episodes: saved 40, now 60" in message


def test_a_folder_with_something_else_is_refused(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert few_shot.main(command(workdir=tmp_path / "mine")) == 2
    assert "holds no run" in capsys.readouterr().err


def test_default_folders_do_not_collide():
    options = parse(command())
    first = choose_folder(options)
    assert first == Path("runs/few_shot/glyphs-3w1s-0")
    first.mkdir(parents=True)
    assert choose_folder(options).name == "glyphs-3w1s-0-2"


def test_corrupt_images_are_omitted_on_request(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("METALSTM_CACHE_DIR", str(tmp_path / "cache"))
    images = draw_images(tmp_path / "images")
    (images / "train" / "train3" / "2.png").write_bytes(b"no image")
    line = command("--algorithms", "nearest-neighbour", workdir=tmp_path / "run")
    line += ["--dataset", "folders", "--data-dir", str(images), "--image-size", "8"]
    assert few_shot.main(line) == 2
    said = capsys.readouterr().err
    assert "train3/2.png cannot be decoded" in said
    assert "skip_corrupt" in said
    assert few_shot.main([*line, "--skip-corrupt"]) == 0
    assert "omitted: 1 corrupt files" in capsys.readouterr().out
    results = read(tmp_path / "run" / "results.json")
    assert results["dataset"]["skipped"] == 1
    assert results["dataset"]["skipped_files"][0].endswith("train3/2.png")


def test_several_seeds_are_aggregated(tmp_path, capsys):
    folder = tmp_path / "seeds"
    line = command("--algorithms", "fomaml", "--seeds", "2", workdir=folder)
    assert few_shot.main(line) == 0
    assert "mean over 2 meta-training seeds" in capsys.readouterr().out
    row = read(folder / "results.json")["methods"]["fomaml"]
    of_seeds = [read(folder / f"seed-{seed}" / "results.json") for seed in (0, 1)]
    means = [of_seed["methods"]["fomaml"]["accuracy"] for of_seed in of_seeds]
    assert means[0] != means[1]
    assert row["accuracy"] == pytest.approx(np.mean(means))
    half = 1.96 * np.std(means, ddof=1) / 2**0.5
    assert row["ci95"] == pytest.approx(half)
    with pytest.raises(FileNotFoundError, match="give seed-0 or seed-1 in it"):
        metalstm.load_run(folder)


@pytest.mark.fault("NaN, Inf and values that are no bytes")
def test_a_loss_that_is_not_finite_stops_with_the_step_named(tmp_path, capsys):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml", workdir=folder)
    assert few_shot.main([*line, "--rate", "1e38"]) == 2
    assert "not finite at step 1" in capsys.readouterr().err


def test_minutes_bound_the_time(tmp_path):
    folder = tmp_path / "run"
    line = command("--algorithms", "prototypical", "--minutes", "0.02", workdir=folder)
    assert few_shot.main(line) == 0
    results = read(folder / "results.json")
    assert results["methods"]["prototypical"]["meta_training"]["episodes"] > 0
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


def test_transfer_methods_share_one_pre_training(tmp_path):
    folder, chosen = tmp_path / "run", ("feature-cosine", "finetune-head")
    own = ["--finetune-head.num-steps", 4]
    assert few_shot.main(command("--algorithms", *chosen, *own, workdir=folder)) == 0
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {*chosen, "pretrained-linear"}
    methods = read(folder / "results.json")["methods"]
    tuned = methods["finetune-head"]["meta_training"]
    assert tuned["episodes"] == methods["feature-cosine"]["meta_training"]["episodes"]
    assert set(tuned["tried_steps"]) == {"1", "2", "4"}
    best = max(tuned["tried_steps"].values())
    assert tuned["tried_steps"][str(tuned["steps"])] == best
    rule = metalstm.load_run(folder, "finetune-head").params.rule
    assert rule["num_steps"] == tuned["steps"]
    assert rule["learning_rate"] == np.float32(tuned["rate"])


@pytest.mark.slow
def test_a_run_with_flags_of_one_method_resumes_and_loads(tmp_path):
    folder = tmp_path / "run"
    line = command("--algorithms", "fomaml,prototypical,feature-cosine", workdir=folder)
    line += "--prototypical.widths 5 --prototypical.episodes 20".split()
    line += "--feature-cosine.rotations".split()
    assert few_shot.main(line) == 0
    results = read(folder / "results.json")["methods"]
    episodes = {n: r["meta_training"].get("episodes") for n, r in results.items()}
    assert episodes == {"fomaml": 40, "prototypical": 20, "feature-cosine": 40}
    specs = read(folder / "predictors.json")["methods"]
    # turned characters are further classes of pre-training
    assert specs["feature-cosine"]["spec"]["num_classes"] == 4 * 12
    predict = metalstm.load_run(folder, "prototypical")
    assert jax.tree.leaves(predict.params.params)[0].shape[-1] == 5
    before = (folder / "accuracies.npz").read_bytes()
    assert few_shot.main(["--resume", str(folder)]) == 0
    assert (folder / "accuracies.npz").read_bytes() == before
    assert few_shot.main(["--resume", str(folder), "--prototypical.widths", "4"]) == 2


# -- parts -----------------------------------------------------------------------------


def test_a_tuning_grid_brackets_its_best():
    def best(values, score) -> tuple[float, list[float]]:
        tuned = tune(each_point(score), {"r": values}, grow="r")
        return tuned.best["r"], tuned.grid["r"].tolist()

    rate, tried = best((1.0, 3.0, 9.0), lambda r: abs(r - 81))
    assert rate == 81
    assert max(tried) > 81
    rate, tried = best((1.0, 3.0, 9.0), lambda r: abs(r - 3))
    assert rate == 3
    assert len(tried) == 3
    _, tried = best((1.0, 2.0), lambda r: r)
    assert len(tried) == 6, "not without end"


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
