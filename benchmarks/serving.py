"""Milliseconds of a prediction on this machine, by number of queries.

    python -m benchmarks.serving

MAML, 5 steps, 5-way 5-shot, Conv4 with 32 filters on 28 x 28, without batch norm.
"adapt and predict" is one call of a `metalstm.Predictor`, "predict" one of its
classifier after ``adapt``. Medians, after the calls that compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import jax
import numpy as np

import metalstm
from metalstm import algorithms, nn
from metalstm.predictor import example_episode

__all__ = ["main"]

WAY, SHOT, SHAPE = 5, 5, (28, 28, 1)


def milliseconds(call: Callable[[], object], rounds: int = 30) -> float:
    """The median of ``rounds`` calls, after two that compile and try the fillings."""
    times = []
    for k in range(rounds + 2):
        start = time.perf_counter()
        call()
        if k > 1:
            times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    rng = np.random.default_rng(0)
    algorithm = algorithms.maml(nn.conv4(WAY, norm="none"), num_steps=5)
    example = example_episode(SHAPE, WAY)
    params = algorithm.init(jax.random.key(0), example)
    predict = metalstm.Predictor("maml", algorithm, params, WAY, SHAPE)
    draw = lambda num: rng.integers(0, 256, (num, *SHAPE), dtype=np.uint8)  # noqa: E731
    images, labels = draw(WAY * SHOT), np.repeat(np.arange(WAY), SHOT)
    classifier = predict.adapt(images, labels)
    print("| queries | adapt and predict, ms | predict, ms |\n|---|---|---|")
    for num in (1, 16, 75):
        query = draw(num)
        both = milliseconds(lambda query=query: predict(images, labels, query))
        alone = milliseconds(lambda query=query: classifier(query))
        print(f"| {num} | {both:.1f} | {alone:.2f} |")


if __name__ == "__main__":
    main()
