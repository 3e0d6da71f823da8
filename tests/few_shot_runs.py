"""Runs of few_shot, as small as can be, that several test files look at."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from metalstm import data

SMALL = (
    "--learner mlp --widths 6 --way 3 --queries 2 --meta-batch 2 "
    "--validation-episodes 6 --test-episodes 10 --test-batch 5 --learning-rate 0.02 "
    "--episodes 40 --validate-every 20 --save-every 10"
).split()
META_LSTM = (
    "--hidden-size 2 --num-steps 2 --input-bias -1 -0.5 --gradient-scale 1".split()
)
CHOSEN = ("meta-lstm", "sgd", "scratch", "nearest-neighbour")


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


def command(*extra: object, workdir: Path | None = None) -> list[str]:
    where = [] if workdir is None else ["--workdir", str(workdir)]
    return [*SMALL, *where, *map(str, extra)]


def four_methods(folder: Path) -> list[str]:
    """A method of every kind that needs no pre-training."""
    own = ["--scratch.num-steps", "3", *META_LSTM]
    return command("--algorithms", *CHOSEN, *own, workdir=folder)


def read(path: Path) -> dict:
    return json.loads(path.read_text())
