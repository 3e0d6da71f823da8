"""Two training scripts, each with a run that takes seconds, and what it must leave."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .outcomes import require

ROOT = Path(__file__).parents[2]


class Script(NamedTuple):
    """A script with the flags of a small run."""

    name: str  # of the module in experiments
    method: str  # what it meta-trains
    flags: tuple[str, ...]
    counter: str  # what a row of metrics.jsonl counts
    save_every: int  # in these
    # an option, and another value of it than the run's: its flag, name and value
    contradictions: tuple[tuple[str, str, str], ...]

    def command(self, *extra: str) -> list[str]:
        return [sys.executable, "-m", f"experiments.{self.name}", *extra]


_META_LSTM = "methods.meta-lstm"
FEW_SHOT = Script(
    "few_shot",
    "meta-lstm",
    tuple(
        "--dataset folders --image-size 8 --algorithms meta-lstm "
        "--learner mlp --widths 6 --hidden-size 2 --num-steps 2 --way 3 --queries 2 "
        "--meta-batch 2 --input-bias -1 -0.5 --gradient-scale 1 --episodes 400 "
        "--validate-every 80 --validation-episodes 6 --save-every 40 "
        "--test-episodes 10 --test-batch 5 --learning-rate 0.02".split()
    ),
    "episode",
    40,
    (
        ("--way", "data.way", "4"),
        ("--seed", "run.seed", "1"),
        ("--hidden-size", f"{_META_LSTM}.method.rule.hidden_size", "3"),
        ("--learning-rate", f"{_META_LSTM}.training.learning_rate", "0.01"),
        ("--widths", f"{_META_LSTM}.learner.widths", "5"),
        ("--meta-batch", f"{_META_LSTM}.training.meta_batch", "4"),
        ("--order", f"{_META_LSTM}.method.order", "second"),
        ("--seeds", "run.seeds", "2"),
        ("--image-size", "data.image_size", "9"),
        ("--validate-every", f"{_META_LSTM}.training.validate_every", "40"),
    ),
)
LEARNED_OPTIMIZER = Script(
    "learned_optimizer",
    "l2l",
    tuple(
        "--dim 2 --l2l.hidden-size 3 --l2l.num-layers 1 --num-tasks 2 "
        "--unroll-steps 2 --horizon 4 "
        "--meta-steps 200 --validate-every 40 --save-every 20 "
        "--validation-instances 4 --steps 4 --instances 6 --tune-instances 2 "
        "--study comparison --baselines sgd".split()
    ),
    "step",
    20,
    (
        ("--dim", "problem.family.dim", "3"),
        ("--seed", "run.seed", "1"),
        ("--l2l.hidden-size", "rule.l2l.hidden_size", "4"),
        ("--num-tasks", "training.num_tasks", "3"),
        ("--unroll-steps", "training.unroll_steps", "4"),
        ("--horizon", "training.horizon", "8"),
        ("--learning-rate", "budget.learning_rate", "0.01"),
        ("--steps", "test.steps", "5"),
        ("--save-every", "budget.save_every", "10"),
        ("--l2l.num-layers", "rule.l2l.num_layers", "2"),
    ),
)
SCRIPTS = (FEW_SHOT, LEARNED_OPTIMIZER)


def draw_images(root: Path, *, side: int = 6) -> Path:
    """Classes of 6 noisy copies of one random picture each, in three splits."""
    from PIL import Image

    if root.exists():
        return root
    rng = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 5), ("test", 5)):
        for c in range(number):
            picture = rng.uniform(0, 255, (side, side))
            (root / split / f"{split}{c}").mkdir(parents=True)
            for m in range(6):
                noisy = np.clip(picture + rng.normal(0, 20, picture.shape), 0, 255)
                image = Image.fromarray(noisy.astype(np.uint8))
                image.save(root / split / f"{split}{c}" / f"{m}.png")
    return root


class Place:
    """Where the trials of one script run: its images, caches and whole run."""

    def __init__(self, script: Script, folder: Path):
        self.script, self.folder = script, folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.flags = list(script.flags)
        if script is FEW_SHOT:
            self.flags += ["--data-dir", str(draw_images(folder / "images"))]
        self.environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "METALSTM_CACHE_DIR": str(folder / "decoded"),
            "PYTHONPATH": str(ROOT),
        }

    def start(self, *extra: str, before: str = "") -> subprocess.Popen[str]:
        """Start the script; its output goes to a pipe, both streams.

        Args:
          before: Python to run in its process first: a limit, a right given up.
        """
        command = self.script.command(*extra)
        if before:
            becomes = "import os, sys; os.execv(sys.executable, sys.argv[1:])"
            command = [sys.executable, "-c", f"{before}\n{becomes}", *command]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fork(self, *extra: str) -> Forked:
        """Start the script without the seconds that its imports take."""
        return Forked(self, extra)

    def finish(self, *extra: str, before: str = "") -> tuple[int, str]:
        process = self.start(*extra, before=before)
        said, _ = process.communicate(timeout=900)
        return process.returncode, said

    def new(self, workdir: Path) -> list[str]:
        return [*self.flags, "--workdir", str(workdir)]

    def go_on(self, workdir: Path) -> list[str]:
        """--resume where there is a run; a run killed too early has none."""
        if (workdir / "config.json").exists():
            return ["--resume", str(workdir)]
        return self.new(workdir)

    def whole(self) -> Path:
        """The run that nothing disturbed, made once."""
        workdir = self.folder / "whole"
        if not (workdir / "results.json").exists():
            code, said = self.finish(*self.new(workdir))
            require(code == 0, f"the undisturbed run failed: {said}")
        return workdir

    def count(self, workdir: Path) -> int:
        """The last count in metrics.jsonl: how far a run is known to have come."""
        counts = [row[self.script.counter] for row in rows(self.script, workdir)]
        return max(counts, default=0)

    def saved(self, workdir: Path) -> int:
        """The count of the newest checkpoint."""
        path = workdir / "checkpoints" / self.script.method / "state"
        # not by `metalstm.runtime.checkpoints`, which may ask JAX for its processes
        names = [p.name.removeprefix(".replaced-") for p in path.glob("*")]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
        return step * (2 if self.script is FEW_SHOT else 1)


class Forked:
    """The script's main in a forked copy of this process, whose imports are done.

    Nothing may have been computed by JAX before: its threads do not survive a fork.
    """

    def __init__(self, place: Place, line: Sequence[str]):
        from jax._src import xla_bridge

        main = preload(place.script)
        require(not xla_bridge.backends_are_initialized(), "JAX has computed here")
        self._output = place.folder / "output.txt"
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid == 0:
            _become(place, main, line, self._output)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> str:
        """What it printed, once it has ended."""
        while self.poll() is None:
            time.sleep(0.01)
        return self._output.read_text()


def preload(script: Script) -> Callable[[list[str]], int]:
    """Import all that the script will; returns its main."""
    import PIL.Image  # noqa: F401

    for folder in ("common", script.name):
        for path in sorted((ROOT / "experiments" / folder).glob("*.py")):
            importlib.import_module(f"experiments.{folder}.{path.stem}")
    return main_of(script)


def main_of(script: Script) -> Callable[[list[str]], int]:
    return importlib.import_module(f"experiments.{script.name}.__main__").main


def _become(place: Place, main: Callable, line: Sequence[str], output: Path) -> None:
    import jax

    code = 1
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        faulthandler.dump_traceback_later(900, exit=True)  # it hangs
        os.environ.update(place.environment)
        jax.config.update("jax_platforms", "cpu")
        compiled = place.environment["JAX_COMPILATION_CACHE_DIR"]
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        code = main(list(line))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rows(script: Script, workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the times."""
    found = []
    path = workdir / "metrics.jsonl"
    # not by `experiments.common.run_folder`, which asks JAX for its processes
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # half a line: the process was killed
            row = json.loads(line)
            if script.counter in row:
                found.append({k: v for k, v in row.items() if k != "seconds"})
    return found


def arrays(script: Script, workdir: Path, which: str) -> list[np.ndarray]:
    """All arrays of the newest checkpoint."""
    from metalstm.runtime import checkpoints

    path = workdir / "checkpoints" / script.method / which
    restored = checkpoints.restore(path, None)
    require(restored.message is None, f"{restored.message}")
    return [np.asarray([restored.step]), *restored.state]


def require_same(script: Script, left: Path, right: Path) -> None:
    """The same meta-parameters, metrics and results, bit for bit; times may differ."""
    for which in ("state", "best"):
        pairs = zip(
            arrays(script, left, which), arrays(script, right, which), strict=True
        )
        same = all(a.tobytes() == b.tobytes() for a, b in pairs)
        require(same, f"the {which} differs")
    require(rows(script, left) == rows(script, right), "metrics.jsonl differs")
    for measured in _measured(left), _measured(right):
        require(len(measured) > 0, "there are no results")
    require(_measured(left) == _measured(right), "the results differ")
    json.loads((left / "results.json").read_text())
    # files that a kill left unfinished have names of their own, and go an hour later
    hidden = [p for p in left.rglob(".*") if not p.name.startswith(".part-")]
    stray = [str(p.relative_to(left)) for p in hidden]
    require(not stray, f"left behind: {stray}")


def _measured(workdir: Path) -> set[tuple[bytes, ...]]:
    """The measured numbers: accuracies of test episodes, or curves.

    Without the files' names and keys: those of curves have a digest of the rule's file
    in them, which says how long training took.
    """
    found = set()
    for path in [*workdir.glob("*.npz"), *workdir.glob("curves/*.npz")]:
        with np.load(path) as stored:
            names = sorted(set(stored.files) - {"key"})
            found.add(tuple(stored[name].tobytes() for name in names))
    return found


def listing(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, with its date and contents."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def errors(said: str) -> Sequence[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]
