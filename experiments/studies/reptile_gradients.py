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

Half an hour on a CPU core. Expected: g1 alone is worst, by some points; sums grow
better with the number of minibatches. docs/results/reptile_gradients.md has results,
machine and time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import metalstm
from experiments.common.cli import Count, Pair, Positive, check_multiple
from experiments.common.run_folder import write_json
from experiments.common.study import CharacterOptions, Study, write_results
from experiments.common.tables import Table
from experiments.common.tuning import each_point, tune
from metalstm import algorithms, data, nn, plots
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.data import EpisodeSpec
from metalstm.meta.evaluation import Evaluation
from metalstm.statistics import Estimate, mean_and_ci95

PRESETS = {
    "demo": "--inner-batches 2 --outer-rates 0.02 --meta-steps 400 "
    "--validation-episodes 50"
}


class Config(CharacterOptions, frozen=True, kw_only=True):
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


class Trainer:
    """What is compiled once and serves every combination and outer rate."""

    def __init__(self, config: Config):
        self.config, self.dataset = config, config.load()
        self.spec = EpisodeSpec(config.way, config.shot, config.queries)
        for split in ("validation", "test"):
            data.validate(self.spec, self.dataset, split)
        trained = EpisodeSpec(config.way, config.train_shot, 1)
        data.validate(trained, self.dataset, "train")
        learner = nn.conv4(
            config.way, config.filters, downsample="stride", norm="layer"
        )

        def reptile(weights):
            return algorithms.reptile(
                learner,
                fixed_sgd(config.inner_rate),
                num_steps=config.inner_batches,
                batch_size=config.batch_size,
                num_test_steps=config.test_updates,
                train_shots=config.train_shot,
                gradient_weights=weights,
            )

        @jax.jit
        def advance(state, weights, rate, pool):
            loop = metalstm.make_train_loop(
                reptile(weights),
                optax.sgd(rate),
                self.spec,
                num_tasks=1,
                steps_per_call=config.validate_every,
            )
            return loop(state, pool)

        self.advance, tested = advance, reptile(None)
        self.evaluate = metalstm.make_evaluate(tested, self.spec, batch_size=10)
        episode = self.spec.sample(jax.random.key(0), self.dataset.train)
        self.start = metalstm.init_train_state(
            tested, optax.sgd(0.0), config.seed, episode
        )

    def curve(self, weights: tuple[float, ...], rate: float):
        """Validation accuracy against meta-steps, and the best meta-parameters."""
        config, state = self.config, self.start
        rows, best, best_params = [], -1.0, state.params
        for done in range(0, config.meta_steps + 1, config.validate_every):
            if done:
                state, metrics = self.advance(
                    state, jnp.array(weights), jnp.float32(rate), self.dataset.train
                )
                if not bool(metrics["finite"].all()):
                    break
            result = self.test(state.params, "validation", config.validation_episodes)
            rows.append([done, result.mean, result.ci95])
            if result.mean > best:
                best, best_params = result.mean, state.params
        return rows, best, best_params

    def test(self, params: Any, split: str, episodes: int) -> Evaluation:
        pool, seed = self.dataset.pool(split), self.config.seed
        return self.evaluate(
            params, pool, num_episodes=episodes, split=split, seed=seed
        )

    def study(self, name: str, weights: tuple[float, ...]) -> dict[str, Any]:
        """One combination at every outer rate, and the test of the best."""
        started, curves, params = time.process_time(), {}, {}

        def score(rate: float) -> float:
            rows, best, params[rate] = self.curve(weights, rate)
            curves[f"{rate:g}"] = rows
            ends = "stopped: not finite"
            if len(rows) > 1:
                ends = f"ends at {rows[-1][1]:.1%}"
            about = f"{name:16} outer rate {rate:<6g}"
            print(f"{about} {ends}, best {best:.1%}", flush=True)
            return -best

        tuned = tune(each_point(score), {"rate": self.config.outer_rates})
        rate = tuned.best["rate"]
        result = self.test(params[rate], "test", self.config.test_episodes)
        print(f"{name:16} test {result}", flush=True)
        return {
            "curves": curves,
            "outer_rate": rate,
            "inside": tuned.inside["rate"],
            "best_validation": -tuned.score,
            "test": [result.mean, result.ci95],
            "test_accuracies": [round(float(x), 6) for x in result.accuracies],
            "cpu_seconds": round(time.process_time() - started, 1),
        }


def run(config: Config, folder: Path) -> None:
    """Study what ``folder`` does not have yet; then write the table and the figure."""
    trainer, found = Trainer(config), {}
    names, dataset = combinations(config.inner_batches), trainer.dataset
    print(
        f"{dataset.name}, {config.way}-way {config.shot}-shot, "
        f"{config.meta_steps:,} meta-steps of one task, {len(names)} combinations at "
        f"{len(config.outer_rates)} outer rates",
        flush=True,
    )
    for name, weights in names.items():
        tag = "_".join(f"{w:g}" for w in weights)
        path = folder / "combinations" / f"{tag}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_json(path, trainer.study(name, weights))
        found[name] = json.loads(path.read_text())
    shown = {
        name: {k: v for k, v in one.items() if k != "test_accuracies"}
        for name, one in found.items()
    }
    about = {"name": dataset.name, "checksum": dataset.checksum}
    write_results(
        folder,
        config,
        [table(found)],
        {"combinations": shown, "data": about},
        {"curves.png": figure(found, config)},
    )


def table(found: Mapping[str, Any]) -> Table:
    cells = []
    for name, one in found.items():
        pair = (np.array(found[n]["test_accuracies"]) for n in (name, "g1"))
        difference = mean_and_ci95(np.subtract(*pair)).percent
        cells.append(
            [
                name,
                f"{one['outer_rate']:g}{'' if one['inside'] else '*'}",
                f"{100 * one['best_validation']:.1f}",
                f"{Estimate(*one['test']).percent:.1f}",
                "" if name == "g1" else f"{difference:+.1f}",
                f"{one['cpu_seconds']:.0f}",
            ]
        )
    headings = (
        "meta-update", "outer rate", "best validation", "test accuracy % (95% CI)",
        "paired difference to g1", "CPU seconds",
    )  # fmt: skip
    edge = not all(one["inside"] for one in found.values())
    notes = ["* at the edge of the grid"] if edge else []
    return Table("", headings, cells, notes=notes)


def figure(found: Mapping[str, Any], config: Config) -> Figure:
    """Each combination at its best rate; a sum's line, a single gradient's dashes."""
    kinds = {n: "one gradient" if n[1:].isdecimal() else "sum" for n in found}
    curves = {n: one["curves"][f"{one['outer_rate']:g}"] for n, one in found.items()}
    return plots.accuracy_sweep(
        curves,
        kinds | {"g1": "sum"},
        xlabel="meta-steps (one task each)",
        title="validation episodes, 95% CI",
        chance=[(step, 1 / config.way) for step in (0, config.meta_steps)],
        xscale="linear",
    )


STUDY = Study("reptile_gradients", Config(), run, __doc__, presets=PRESETS, check=check)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
