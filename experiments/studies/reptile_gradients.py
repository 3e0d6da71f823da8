"""Which of the inner loop's gradients make Reptile learn to learn?

Claim (Nichol et al., 2018, section 6.2, figure 3): theta_0 takes k = 4 steps of SGD on
minibatches of one task, with gradients g1 .. g4, and is moved by a combination of them.
g1 alone is training on all tasks jointly, and does worst; g1 + g2 is Reptile with two
steps, g2 first-order MAML with one; the more minibatches, the better, above all for
sums.

    python -m experiments.studies.reptile_gradients               # glyphs, no download
    python -m experiments.studies.reptile_gradients --dataset omniglot --data-dir DIR
    python -m experiments.studies.reptile_gradients --preset demo # under two minutes

As in the paper: plain SGD inside and outside, one task a meta-step, 5-way 5-shot, and
the same tasks for every combination. Unlike there, every combination has its outer rate
chosen on validation, from the same number of rates, which includes the averages (a sum
at a smaller rate).

Four minutes on a CPU core. Expected: g1 alone is worst, by some points; sums grow
better with the number of minibatches. docs/results/reptile_gradients.md has results,
machine and time.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import metalstm
from experiments.common import study
from experiments.common.cli import Count, Pair, Positive, check_multiple
from experiments.common.tables import Table
from experiments.common.tuning import Tuned, tune
from metalstm import algorithms, data, nn, plots
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.data import EpisodeSpec
from metalstm.statistics import mean_and_ci95

PRESETS = {
    "demo": "--inner-batches 2 --outer-rates 0.02 --meta-steps 400 "
    "--validation-episodes 50"
}
COLUMNS = {
    "meta-update": "{name}",
    "outer rate": "{outer_rate:g}{mark}",
    "best validation": "{best:.1f}",
    "test accuracy % (95% CI)": "{test.percent:.1f}",
    "paired difference to g1": "{paired.percent:+.1f}",
    "CPU seconds": "{cpu_seconds:.0f}",
}


class Config(study.CharacterOptions, frozen=True, kw_only=True):
    shot: Count = 5
    train_shot: Count = 10
    """Images of a class in meta-training, cut into minibatches."""
    queries: Count = 5
    """Query images of a class in validation and test."""
    inner_batches: Pair = 4
    """k, minibatches of an inner loop in meta-training."""
    batch_size: Count = 10
    """Images of a minibatch."""
    inner_rate: Positive = 0.05
    """SGD's inside, in meta-training and at meta-test."""
    outer_rates: tuple[Positive, ...] = (0.005, 0.02, 0.08)
    """SGD's outside, of which each combination gets its best."""
    test_updates: Count = 10
    """Updates on the whole support set in validation and test."""
    filters: Count = 16
    """Of the strided Conv4 with layer norm."""
    meta_steps: Count = 800
    """Meta-steps, of one task each."""
    validate_every: Count = 200
    validation_episodes: Pair = 60
    test_episodes: Pair = 600


def check(config: Config) -> None:
    images = config.way * config.train_shot
    if images % config.batch_size:
        raise ValueError(
            f"--batch-size {config.batch_size} does not divide the {images} images of "
            "--way times --train-shot: choose a divisor"
        )
    every = config.validate_every
    check_multiple("--meta-steps", config.meta_steps, "--validate-every", every)


def combinations(num_batches: int) -> dict[str, tuple[float, ...]]:
    """The weights of g_1 .. g_k: every prefix sum, and every gradient alone."""
    found = {}
    for last in range(1, num_batches + 1):
        names = [f"g{t}" for t in range(1, last + 1)]
        name = " + ".join(names) if last <= 3 else f"g1 + ... + g{last}"
        found[name] = tuple(float(t < last) for t in range(num_batches))
        if last > 1:
            found[f"g{last}"] = tuple(float(t == last - 1) for t in range(num_batches))
    return found


class Found(NamedTuple):
    """What was found of a combination of gradients."""

    curves: np.ndarray  # [rates, validations, 3] meta-steps, accuracy, half its 95% CI
    accuracies: np.ndarray  # [test episodes] at the best rate
    cpu_seconds: Any

    def tuned(self, config: Config) -> Tuned:
        scores = -np.nanmax(self.curves[..., 1], 1)
        return tune(lambda grid: scores, {"rate": config.outer_rates})


class Trainer:
    """What is compiled once and serves every combination and outer rate."""

    def __init__(self, config: Config):
        self.config, self.dataset = config, config.load()
        spec = EpisodeSpec(config.way, config.shot, config.queries)
        for split in ("validation", "test"):
            data.validate(spec, self.dataset, split)
        trained = EpisodeSpec(config.way, config.train_shot, 1)
        data.validate(trained, self.dataset, "train")
        learner = nn.conv4(
            config.way, config.filters, downsample="stride", norm="layer"
        )
        reptile = functools.partial(
            algorithms.reptile,
            learner,
            fixed_sgd(config.inner_rate),
            num_steps=config.inner_batches,
            batch_size=config.batch_size,
            num_test_steps=config.test_updates,
            train_shots=config.train_shot,
        )

        @jax.jit
        def advance(state, weights, rate, pool):
            loop = metalstm.make_train_loop(
                reptile(gradient_weights=weights),
                optax.sgd(rate),
                spec,
                num_tasks=1,
                steps_per_call=config.validate_every,
            )
            return loop(state, pool)

        self.advance = advance
        self.test = study.tester(reptile(), spec, self.dataset, config)
        episode = spec.sample(jax.random.key(0), self.dataset.train)
        self.start = metalstm.init_train_state(
            reptile(), optax.sgd(0.0), config.seed, episode
        )

    def curve(self, weights: tuple[float, ...], rate: float) -> tuple[np.ndarray, Any]:
        """`Found.curves` at one rate, and the parameters of the best validation."""
        state, best, every = self.start, self.start.params, self.config.validate_every
        rows = np.full((self.config.meta_steps // every + 1, 3), np.nan)
        for call in range(len(rows)):
            if call:
                state, metrics = self.advance(
                    state, jnp.array(weights), jnp.float32(rate), self.dataset.train
                )
                if not bool(metrics["finite"].all()):
                    break
            found = self.test(state.params, "validation")
            if call and found.mean > np.nanmax(rows[:, 1]):
                best = state.params
            rows[call] = call * every, found.mean, found.ci95
        return rows, best

    def study(self, name: str, weights: tuple[float, ...]) -> Found:
        """One combination at every outer rate, and the test of the best."""
        started, params, curves = time.process_time(), {}, []
        for rate in self.config.outer_rates:
            rows, params[rate] = self.curve(weights, rate)
            curves.append(rows)
            last, best = rows[-1, 1], np.nanmax(rows[:, 1])
            ends = f"ends at {last:.1%}" if np.isfinite(last) else "stopped: not finite"
            print(f"{name:16} outer rate {rate:<6g} {ends}, best {best:.1%}")
        found = Found(np.array(curves), np.zeros(0), 0.0)
        result = self.test(params[found.tuned(self.config).best["rate"]])
        print(f"{name:16} test {result}", flush=True)
        seconds = time.process_time() - started
        return found._replace(accuracies=result.accuracies, cpu_seconds=seconds)


def run(config: Config, folder: Path) -> study.Made:
    """Study what ``folder`` does not have yet."""
    trainer, found = Trainer(config), {}
    names, dataset = combinations(config.inner_batches), trainer.dataset
    study.note_data(folder, {"checksum": dataset.checksum})
    print(
        f"{dataset.name}, {config.way}-way {config.shot}-shot, "
        f"{config.meta_steps:,} meta-steps of one task, {len(names)} combinations at "
        f"{len(config.outer_rates)} outer rates",
        flush=True,
    )
    rows, marks = [], []
    for name, weights in names.items():
        path = folder / "combinations" / f"{name}.npz"
        make = functools.partial(trainer.study, name, weights)
        one = found[name] = study.kept(path, Found, make)
        tuned = one.tuned(config)
        marks.append(tuned.mark("rate"))
        row: dict[str, Any] = {
            "name": name,
            "outer_rate": tuned.best["rate"],
            "best_validation": -tuned.score,
            "test": mean_and_ci95(one.accuracies),
            "difference": mean_and_ci95(one.accuracies - found["g1"].accuracies),
            "cpu_seconds": round(float(one.cpu_seconds), 1),
        }
        rows.append(row)
    shown = [
        row
        | {"mark": mark, "best": 100 * row["best_validation"]}
        | ({} if row["name"] == "g1" else {"paired": row["difference"]})
        for row, mark in zip(rows, marks, strict=True)
    ]
    notes = ["* at the edge of the grid"] if any(marks) else []
    return study.Made(
        [Table.of("", COLUMNS, shown, notes=notes)],
        {"combinations": rows, "name": dataset.name, "checksum": dataset.checksum},
        {"curves.png": figure(found, config)},
    )


def figure(found: Mapping[str, Found], config: Config) -> Figure:
    """Each combination at its best rate; a sum's line, a single gradient's dashes."""
    kinds = {n: "one gradient" if n[1:].isdecimal() else "sum" for n in found}
    curves = {}
    for name, one in found.items():
        best = one.curves[config.outer_rates.index(one.tuned(config).best["rate"])]
        curves[name] = best[np.isfinite(best[:, 1])].tolist()
    return plots.accuracy_sweep(
        curves,
        kinds | {"g1": "sum"},
        xlabel="meta-steps (one task each)",
        title="validation episodes, 95% CI",
        chance=[(step, 1 / config.way) for step in (0, config.meta_steps)],
        xscale="linear",
    )


STUDY = study.Study(
    "reptile_gradients", Config(), run, __doc__, presets=PRESETS, check=check
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
