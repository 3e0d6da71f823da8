"""Milliseconds of a prediction on this machine, and of a fresh process's first.

    taskset -c 0 python -m benchmarks.serving

MAML, 5 steps, 5-way 5-shot, Conv4 with 32 filters on 28 x 28, without batch norm.
"adapt and predict" is one call of a `metalstm.Predictor`, "predict" one of its
classifier after ``adapt``, after the calls that compile; "of one more" is a number of
queries that was not asked before and that the same program serves. A fresh process
either loads the file that `metalstm.save` wrote, or runs what was exported, with
imports of metalstm refused; it compiles everything.

Times are of the process's CPU, medians of calls that take turns: pinned to one core
that is what an idle core would take, nearly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

import metalstm
from metalstm import algorithms, data, nn

__all__ = ["LOADED", "RUN_WITHOUT", "in_fresh_process", "main"]

WAY, SHOT, SHAPE = 5, 5, (28, 28, 1)

# Arguments: data.npz with what the program is called with, the program's file, and
# where the scores go; prints milliseconds of CPU time.
_BEGIN = """
import json, sys, time
import numpy as np
data, file, out = sys.argv[1:4]
with np.load(data) as stored:
    inputs = [stored[name] for name in sorted(stored)]
spent = {}
def timed(name, call):
    start = time.process_time()
    result = call()
    spent[name] = 1e3 * (time.process_time() - start)
    return result
"""
_END = """
np.save(out, timed("first call", call))
timed("next call", call)
print(json.dumps(spent))
"""
LOADED = f"""{_BEGIN}
import metalstm
spent["imports"] = 1e3 * time.process_time()
predict = timed("loading", lambda: metalstm.load(file))
call = lambda: predict.scores(*inputs)[0]
{_END}"""
RUN_WITHOUT = f"""{_BEGIN}
class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("metalstm", "flax", "optax"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
import jax
from jax import export
spent["imports"] = 1e3 * time.process_time()
read = lambda: export.deserialize(bytearray(open(file, "rb").read()))
program = jax.jit(timed("loading", read).call)
call = lambda: np.asarray(program(*inputs))
assert "metalstm" not in sys.modules
{_END}"""


def in_fresh_process(
    script: str, inputs: Mapping[str, np.ndarray], file: Path, *, before: str = ""
) -> tuple[dict[str, float], np.ndarray]:
    """Return the milliseconds that ``script`` took, and its scores [M, way].

    Args:
      script: `LOADED` or `RUN_WITHOUT`.
      inputs: by names in the order of the call.
      file: the model, or the program.
      before: to be run first, such as an import of a user's module.
    """
    with tempfile.TemporaryDirectory() as folder:
        stored, out = Path(folder) / "data.npz", Path(folder) / "out.npy"
        np.savez(stored, **inputs)
        command = [sys.executable, "-c", before + script, stored, file, out]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(done.stdout), np.load(out)


def milliseconds(
    calls: Mapping[str, Callable[[], object]], rounds: int = 15
) -> dict[str, float]:
    """The median CPU time of each, after two that compile and try the fillings."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if k > 1:
                times[name].append(time.process_time() - start)
    return {name: 1e3 * float(np.median(found)) for name, found in times.items()}


def main() -> None:
    rng = np.random.default_rng(0)
    algorithm = algorithms.maml(nn.conv4(WAY, norm="none"), num_steps=5)
    draw = lambda *num: rng.integers(0, 256, (*num, *SHAPE), np.uint8)  # noqa: E731
    pool, spec = data.make_pool(draw(WAY, SHOT + 1)), data.EpisodeSpec(WAY, SHOT, 1)
    episode = spec.sample(data.episode_key(0, "train", 0), pool)
    params = algorithm.init(jax.random.key(0), episode)
    x, y = draw(WAY * SHOT), np.repeat(np.arange(WAY, dtype=np.int32), SHOT)
    with tempfile.TemporaryDirectory() as folder:
        file = metalstm.save(Path(folder) / "it.npz", algorithm, params, pool, spec)
        predict = metalstm.load(file)
        classifier = predict.adapt(x, y)
        calls = {}
        for num in (1, 16, 75):
            query = draw(num)
            calls[f"both {num}"] = lambda query=query: predict(x, y, query)
            calls[f"alone {num}"] = lambda query=query: classifier(query)
        took = milliseconds(calls)
        start = time.process_time()
        classifier(draw(74))
        one_more = 1e3 * (time.process_time() - start)
        print(f"{os.getloadavg()[0]:.1f} programs running, {os.cpu_count()} cores\n")
        print("| queries | adapt and predict, ms | predict, ms |\n|---|---:|---:|")
        for num in (1, 16, 75):
            print(f"| {num} | {took[f'both {num}']:.0f} ", end="")
            print(f"| {took[f'alone {num}']:.1f} |")
        print(f"| 74, for the first time | | {one_more:.1f} |\n")

        program, adapted = Path(folder) / "predict.bin", Path(folder) / "adapted.bin"
        predict.export(program, num_support=len(x))
        classifier.export(adapted)
        all_inputs = {"a": x, "b": y, "c": draw(16)}
        alone = {"c": all_inputs["c"]}
        columns = ("imports", "loading", "first call", "next call")
        print(f"| a fresh process | {', ms | '.join(columns)}, ms |")
        print("|---|" + "---:|" * len(columns))
        os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
        for name, script, given, path in (
            ("`metalstm.load`", LOADED, all_inputs, file),
            ("`predict.export`, no metalstm", RUN_WITHOUT, all_inputs, program),
            ("`classifier.export`, no metalstm", RUN_WITHOUT, alone, adapted),
        ):
            spent, _ = in_fresh_process(script, given, path)
            cells = " | ".join(f"{spent[column]:.0f}" for column in columns)
            print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
