"""Do the Meta-LSTM's defaults learn on data that nobody tuned them for?

Claim: `algorithms.meta_lstm(learner, num_steps=5)` with nothing else is within 3 points
of MAML (Finn et al., 2017) at MAML's best rate, and gains from shots: its first step is
the best of several on the first episode, so that features of any length fit.

    python -m experiments.studies.defaults --digits digits.csv.gz

Each cell is a data set, a network and a number of shots, kept in --workdir, so that a
stopped study resumes. MAML's rate is the best on validation classes of --rates, for
the first seed. Some two minutes a row of an MLP on a
CPU core. docs/results/defaults.md has its table.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import metalstm
from experiments.common.cli import Count, check_names
from experiments.common.study import Made, Study, StudyOptions, kept
from experiments.common.tables import Table
from metalstm import algorithms, data, nn
from metalstm.base import Learner, MetaAlgorithm, RuleTraits, UpdateRule
from metalstm.rules import learned_sgd
from metalstm.statistics import mean_and_ci95

Classes = list[np.ndarray]


class Config(StudyOptions, frozen=True, kw_only=True):
    cells: tuple[str, ...] = (
        "letters",
        "letters-mlp",
        "digits",
        "digits-mlp",
        "spectrograms",
        "embeddings",
    )
    """Data sets and networks."""
    shots: tuple[Count, ...] = (1, 5)
    digits: Path | None = None
    """digits.csv.gz of scikit-learn (sklearn/datasets/data); without, no digits."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Of MAML."""
    seeds: Count = 3
    meta_steps: Count = 300
    """Of 4 tasks."""
    test_episodes: Count = 200


class Ours(NamedTuple):
    accuracies: np.ndarray  # [seeds, test episodes]


class Maml(NamedTuple):
    accuracies: np.ndarray  # at its best rate
    rate: np.ndarray  # the best
    validation: np.ndarray  # [rates] of the first seed


def learner_of(cell: str) -> tuple[Learner, int]:
    """The network and the number of ways."""
    way = 3 if cell.startswith("digits") else 5
    if cell in ("letters", "digits", "spectrograms"):
        return nn.conv4(way, filters=8, num_blocks=2, downsample="stride"), way
    return nn.mlp(way, (64,) if cell == "embeddings" else (64, 64)), way


@functools.cache
def pools(source: str, digits: Path | None) -> dict[str, data.ClassPool]:
    """Train, validation and test, without a class in common."""
    if source == "letters":
        glyphs = data.load_glyphs()
        return {split: glyphs.pool(split) for split in data.SPLITS}
    if source == "digits":
        rows = np.loadtxt(str(digits), delimiter=",", dtype=np.float32)
        x, y = rows[:, :-1].reshape(-1, 8, 8, 1), rows[:, -1].astype(int)
        # too few digits to meta-train on: each also turned by a quarter circle
        digits_of = ((1, 4, 6, 9, 0), (3, 7), (2, 5, 8))
        classes = [
            np.rot90(x[y == digit], turns, (1, 2)).copy()
            for some in digits_of
            for digit in some
            for turns in (0, 1)
        ]
        sizes = tuple(2 * len(some) for some in digits_of)
    else:
        make = {"spectrograms": _spectrograms, "embeddings": _embeddings}[source]
        classes, sizes = make(np.random.RandomState(0)), (60, 15, 25)
    ends = np.cumsum([0, *sizes])
    spans = zip(data.SPLITS, ends[:-1], ends[1:], strict=True)
    return {split: data.make_pool(classes[low:high]) for split, low, high in spans}


def _spectrograms(random: np.random.RandomState) -> Classes:
    """Harmonics in decibels, [16 pitches, 16 times, 1]: a class is a voice."""
    time, pitch = np.meshgrid(np.arange(16), np.arange(16))
    classes = []
    for _ in range(100):
        spacing, slope = random.uniform(2, 6), random.uniform(-0.3, 0.3)
        width, beat = random.uniform(0.3, 0.9), random.uniform(0, 1.5)
        examples = []
        for _ in range(20):
            step = spacing * np.exp(0.05 * random.randn())
            phase = (pitch - slope * time - random.uniform(0, 1)) / step
            wave = np.exp(-(((phase - np.round(phase)) * step / width) ** 2))
            wave = wave * (1 + 0.5 * np.cos(beat * time + random.uniform(0, 6)))
            power = (wave + 0.3 * random.rand(16, 16)) ** 2
            examples.append(10 * np.log10(power + 1e-4))
        classes.append(np.array(examples, np.float32)[..., None])
    return classes


def _embeddings(random: np.random.RandomState) -> Classes:
    """As of a backbone with a ReLU: 64 positive features, a large common mean."""
    directions, mean = random.randn(16, 64), 1.5 * random.rand(64)
    centres = [mean + 0.35 * random.randn(16) @ directions for _ in range(100)]
    noise = [1.2 * random.randn(30, 64) for _ in centres]
    both = zip(centres, noise, strict=True)
    return [2 * np.maximum(c + n, 0).astype(np.float32) for c, n in both]


def maml_of_any_rate(learner: Learner) -> MetaAlgorithm:
    """MAML whose rate is among the meta-parameters, but not learned: one program."""

    def bind(rate):
        return learned_sgd().bind(jax.lax.stop_gradient(rate))

    traits = RuleTraits(coordinatewise=True, smooth=True, reads_loss=False)
    rule = UpdateRule(lambda key, params: jnp.float32(0), bind, traits)
    return algorithms.learned_init(
        learner, rule, num_steps=5, differentiation=metalstm.second_order()
    )


class Runner:
    """The programs of one method in one cell."""

    def __init__(
        self, algorithm: MetaAlgorithm, config: Config, pools: dict, way: int, shot: int
    ):
        self.algorithm, self.config, self.pools = algorithm, config, pools
        self.spec = data.EpisodeSpec(way, shot, 5)
        self.optimizer = metalstm.adam_clipped(1e-3, 1.0)
        self._train = metalstm.make_train_loop(
            algorithm, self.optimizer, self.spec, num_tasks=4
        )
        self._test = metalstm.make_evaluate(algorithm, self.spec, batch_size=20)

    def __call__(
        self, seed: int, splits: tuple[str, ...], rate: float | None = None
    ) -> list[np.ndarray]:
        """Meta-train, and return the accuracies [episodes] of each split."""
        train, config = self.pools["train"], self.config
        episode = self.spec.sample(data.episode_key(seed, "train", 0), train)
        state = metalstm.init_train_state(self.algorithm, self.optimizer, seed, episode)
        if rate is not None:
            params = state.params._replace(rule=jnp.float32(rate))
            state = state._replace(params=params)
        for _ in range(config.meta_steps):
            state, _ = self._train(state, train)
        number = config.test_episodes
        return [
            self._test(
                state.params, self.pools[split], num_episodes=number, split=split
            ).accuracies
            for split in splits
        ]


def measure_ours(runner: Callable[..., Runner], learner: Learner, config) -> Ours:
    run = runner(algorithms.meta_lstm(learner, num_steps=5))
    seeds = range(config.seed, config.seed + config.seeds)
    return Ours(np.stack([run(seed, ("test",))[0] for seed in seeds]))


def measure_maml(runner: Callable[..., Runner], learner: Learner, config) -> Maml:
    run, both = runner(maml_of_any_rate(learner)), ("validation", "test")
    first, *others = range(config.seed, config.seed + config.seeds)
    found = [run(first, both, rate) for rate in config.rates]
    validation = np.array([accuracies.mean() for accuracies, _ in found])
    best = int(np.argmax(validation))
    rate = config.rates[best]
    rest = [run(seed, ("test",), rate)[0] for seed in others]
    return Maml(np.stack([found[best][1], *rest]), np.array(rate), validation)


def measure(cell: str, shot: int, config: Config, folder: Path) -> tuple[Ours, Maml]:
    """Both methods in one cell, each kept in a file of its own."""
    learner, way = learner_of(cell)
    of_cell = pools(cell.removesuffix("-mlp"), config.digits)
    runner = functools.partial(Runner, config=config, pools=of_cell, way=way, shot=shot)
    maml = functools.partial(measure_maml, runner, learner, config)
    ours = functools.partial(measure_ours, runner, learner, config)
    name = f"{cell}-{shot}"
    return (
        kept(folder / f"{name}-meta_lstm.npz", Ours, ours),
        kept(folder / f"{name}-maml.npz", Maml, maml),
    )


def run(config: Config, folder: Path) -> Made:
    rows, results = [], {}
    for cell in config.cells:
        if cell.startswith("digits") and config.digits is None:
            print(f"{cell}: omitted, --digits names no file", flush=True)
            continue
        for shot in config.shots:
            ours, maml = measure(cell, shot, config, folder)
            rows.append(_row(cell, shot, ours, maml))
            print("  ".join(rows[-1]), flush=True)
            results[f"{cell}-{shot}"] = {
                "meta_lstm": ours.accuracies.mean(1).tolist(),
                "maml": maml.accuracies.mean(1).tolist(),
                "rate": float(maml.rate),
                "validation": maml.validation.tolist(),
            }
    columns = ("data, network", "shots", "meta_lstm", "maml", "rate", "difference")
    caption = f"{config.seeds} seeds, {config.meta_steps} meta-steps of 4 tasks"
    table = Table(caption, columns, rows, left=(0,))
    return Made([table], {"cells": results}, {})


def _row(cell: str, shot: int, ours: Ours, maml: Maml) -> tuple[str, ...]:
    """Means over seeds, intervals over episodes, the difference paired."""

    def said(values: Any, sign: str = "") -> str:
        mean, ci95 = mean_and_ci95(np.mean(values, 0))  # all seeds have the same ones
        return f"{100 * mean:{sign}.1f} ± {100 * ci95:.1f}"

    difference = said(ours.accuracies - maml.accuracies, "+")
    both = said(ours.accuracies), said(maml.accuracies)
    return cell, str(shot), *both, f"{maml.rate:g}", difference


def check(config: Config) -> None:
    check_names("--cells", config.cells, Config().cells)


STUDY = Study("defaults", Config(), run, __doc__, check=check)


main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
