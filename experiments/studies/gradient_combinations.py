"""The study of `experiments.studies.reptile_gradients`: curves, test, table, figure."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import metalstm
from experiments.common import report
from experiments.common.run_folder import write_json
from experiments.common.small_study import recipe
from experiments.studies.reptile_gradients import Config, combinations
from metalstm import algorithms, data, nn
from metalstm.algorithms.gradient.published import fixed_sgd
from metalstm.data import Dataset, EpisodeSpec
from metalstm.meta.evaluation import Evaluation, paired_difference
from metalstm.runtime.files import atomic_write

_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73")


class Study:
    """What is compiled once and serves every combination and outer rate."""

    def __init__(self, config: Config):
        self.config = config
        self.dataset = _load(config)
        self.spec = EpisodeSpec(config.way, config.shot, config.queries)
        trained = EpisodeSpec(config.way, config.train_shot, 1)
        for split in ("validation", "test"):
            data.validate(self.spec, self.dataset, split)
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

        self.advance = advance
        tested = reptile(None)
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
            result = self._test(state.params, "validation", config.validation_episodes)
            rows.append([done, result.mean, result.ci95])
            if result.mean > best:
                best, best_params = result.mean, state.params
        return rows, best, best_params

    def test(self, params: Any) -> Evaluation:
        return self._test(params, "test", self.config.test_episodes)

    def _test(self, params: Any, split: str, episodes: int) -> Evaluation:
        pool, seed = self.dataset.pool(split), self.config.seed
        return self.evaluate(
            params, pool, num_episodes=episodes, split=split, seed=seed
        )


def run(config: Config, folder: Path) -> None:
    """Study what ``folder`` does not have yet; then write the table and the figure."""
    study = Study(config)
    names = combinations(config.inner_batches)
    print(
        f"{study.dataset.name}, {config.way}-way {config.shot}-shot, "
        f"{config.meta_steps:,} meta-steps of one task, {len(names)} combinations at "
        f"{len(config.outer_rates)} outer rates",
        flush=True,
    )
    found = {name: _combination(study, name, w, folder) for name, w in names.items()}
    tests = {
        name: Evaluation(
            np.array(one["test_accuracies"]),
            mean=one["test"][0],
            ci95=one["test"][1],
            query_norm=None,
            split="test",
            seed=config.seed,
        )
        for name, one in found.items()
    }
    text = _table(found, tests, config)
    with atomic_write(folder / "table.md") as part:
        part.write_text(text + "\n")
    shown = {
        name: {k: v for k, v in one.items() if k != "test_accuracies"}
        for name, one in found.items()
    }
    results = {
        "config": recipe(config),
        "combinations": shown,
        "data": {"name": study.dataset.name, "checksum": study.dataset.checksum},
        "versions": report.versions(),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
    }
    write_json(folder / "results.json", results)
    report.save_figure(_figure(found, config), folder / "curves.png")
    print(text)
    print(f"table.md, results.json, curves.png in {folder}")


def _combination(
    study: Study, name: str, weights: tuple[float, ...], folder: Path
) -> dict[str, Any]:
    """One combination at every outer rate; kept in a file, and read from it."""
    tag = "_".join(f"{w:g}" for w in weights)
    path = folder / "combinations" / f"{tag}.json"
    if path.exists():
        return json.loads(path.read_text())
    started = time.process_time()
    curves, best, best_params, best_rate = {}, -1.0, None, 0.0
    for rate in study.config.outer_rates:
        rows, score, params = study.curve(weights, rate)
        curves[f"{rate:g}"] = rows
        ends = "stopped: not finite" if len(rows) < 2 else f"ends at {rows[-1][1]:.1%}"
        print(f"{name:16} outer rate {rate:<6g} {ends}, best {score:.1%}", flush=True)
        if score > best:
            best, best_params, best_rate = score, params, rate
    result = study.test(best_params)
    print(f"{name:16} test {result}", flush=True)
    document = {
        "curves": curves,
        "outer_rate": best_rate,
        "best_validation": best,
        "test": [result.mean, result.ci95],
        "test_accuracies": [round(float(x), 6) for x in result.accuracies],
        "cpu_seconds": round(time.process_time() - started, 1),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return document


def _table(found: dict[str, Any], tests: dict[str, Evaluation], config: Config) -> str:
    columns = (
        "meta-update", "outer rate", "best validation", "test accuracy % (95% CI)",
        "paired difference to g1", "CPU seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rates = config.outer_rates
    for name, one in found.items():
        edge = "*" if one["outer_rate"] in (rates[0], rates[-1]) else ""
        test = tests[name]
        difference = ""
        if name != "g1":
            mean, ci95 = paired_difference(test, tests["g1"])
            difference = f"{100 * mean:+.1f} ± {100 * ci95:.1f}"
        lines.append(
            f"| {name} | {one['outer_rate']:g}{edge} | "
            f"{100 * one['best_validation']:.1f} | {100 * test.mean:.1f} ± "
            f"{100 * test.ci95:.1f} | {difference} | {one['cpu_seconds']:.0f} |"
        )
    if any("* |" in line for line in lines):
        lines += ["", "\\* at the edge of the grid"]
    return "\n".join(lines)


def _figure(found: dict[str, Any], config: Config) -> Any:
    """Each combination at its best rate; sums in lines, single gradients dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained", dpi=100)
    axes = figure.subplots()
    for name, one in found.items():
        steps, mean, ci95 = np.array(one["curves"][f"{one['outer_rate']:g}"]).T
        last = int(name.rsplit("g", 1)[1])
        alone = "+" not in name and last > 1
        colour = _COLOURS[(last - 1) % len(_COLOURS)]
        style: dict[str, Any] = {"color": colour, "ls": "--" if alone else "-"}
        label = f"{name}, rate {one['outer_rate']:g}"
        axes.plot(steps, 100 * mean, marker=".", label=label, **style)
        low, high = 100 * (mean - ci95), 100 * (mean + ci95)
        axes.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
    axes.axhline(100 / config.way, color="grey", ls=":", label="chance")
    axes.set(xlabel="meta-steps (one task each)", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _load(config: Config) -> Dataset:
    if config.dataset == "glyphs":
        return data.load_glyphs()
    folder = config.data_dir or os.environ.get("TFDS_DATA_DIR")
    return data.load_omniglot(folder)
