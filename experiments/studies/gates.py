"""Do learned gates carry over to another learner, and which of their parts matter?

Claims (Ravi & Larochelle, 2017, section 3.2): one cell serves every coordinate, so a
rule is not tied to the learner it was trained on; it sees the loss, the gradient, the
parameter and its previous gates.

1. Transfer. Gates are meta-trained with theta_0 drawn afresh in every episode on one
   Conv4 width, and applied as they are to another width and to an MLP, against SGD
   whose rate is tuned for each of these learners on validation episodes.
2. Ablations of the gates in the same setting, one part removed at a time.

    python -m experiments.studies.gates                       # glyphs, no download
    python -m experiments.studies.gates --dataset omniglot --data-dir DIR

15 minutes on a CPU core for Omniglot and 300 meta-steps. Expected: gates beat tuned SGD
by 5 points on the learner of meta-training and by 2 on the MLP, and are 4 below it on a
Conv4 of twice the width; a constant i costs 5 points, the forget gate at most 1.
docs/results/gates.md has results, machine and time.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure

import metalstm
from experiments.common.cli import Count, Natural, Pair
from experiments.common.study import StudyOptions, read, run_study, write_results
from experiments.common.tables import Table
from experiments.common.tuning import each_point, tune
from metalstm import algorithms, data, nn, rules
from metalstm.base import Learner, MetaParams, PyTree, UpdateRule
from metalstm.data import Dataset, EpisodeSpec
from metalstm.meta.evaluation import Evaluation, paired_difference

SGD_RATES = tuple(10 ** (k / 4) for k in range(-8, 7))  # 0.01 to 32
ABLATIONS: dict[str, dict[str, Any]] = {
    "all parts": {},
    "no first LSTM": {"hidden_size": 0},
    "f fixed at 1": {"forget": "one"},
    "i a learned constant": {"input": "constant"},
    "f = 1 and i constant (SGD)": {"forget": "one", "input": "constant"},
    "no loss input": {"loss_input": False},
    "no theta input": {"theta_input": False},
    "no previous gates": {"carry_input": False},
}


class Config(StudyOptions, frozen=True, kw_only=True):
    dataset: Literal["glyphs", "omniglot"] = "glyphs"
    """glyphs (needs no download) or omniglot on held-out alphabets."""
    data_dir: Path | None = None
    """Where TFDS keeps omniglot; also the environment's TFDS_DATA_DIR."""
    way: Pair = 5
    shot: Count = 5
    steps: Count = 5
    """Inner updates."""
    meta_steps: Count = 400
    """Meta-steps of each rule."""
    meta_batch: Count = 4
    """Episodes of one meta-step."""
    hidden: Natural = 8
    """Units of the gates' LSTM."""
    filters: Count = 16
    """Of the learner that the gates are trained on; the other has twice as many."""
    test_episodes: Pair = 600
    validation_episodes: Pair = 100


def load_dataset(name: str, data_dir: Path | None) -> Dataset:
    if name == "glyphs":
        return data.load_glyphs()
    return data.load_omniglot(data_dir or os.environ.get("TFDS_DATA_DIR"))


def learners(config: Config) -> dict[str, Learner]:
    """By name, the one of meta-training first."""

    def conv(filters: int) -> Learner:
        return nn.conv4(config.way, filters, downsample="stride", momentum=0.05)

    narrow, wide = config.filters, 2 * config.filters
    return {
        f"conv4-{narrow}": conv(narrow),
        f"conv4-{wide}": conv(wide),
        "mlp-64": nn.mlp(config.way, (64,)),
    }


def make_gates(config: Config, **changes: Any) -> UpdateRule:
    # a first step of a useful size: i_0 = sigmoid(0) = 0.5
    start = {"forget_bias": (4.0, 5.0), "input_bias": (0.0, 0.0)}
    return rules.lstm_gates(**{"hidden_size": config.hidden, **start, **changes})


def method(
    learner: Learner, rule: UpdateRule, config: Config
) -> metalstm.MetaAlgorithm:
    """Only the rule is learned; theta_0 is drawn in every episode."""
    return algorithms.learned_init(
        learner,
        rule,
        num_steps=config.steps,
        differentiation=metalstm.first_order(),
        learn_init=False,
        scan_unroll=config.steps,
    )


def meta_train(
    learner: Learner, rule: UpdateRule, dataset: Dataset, config: Config
) -> PyTree:
    """The rule's parameters."""
    algorithm = method(learner, rule, config)
    optimizer = metalstm.adam_clipped(1e-2, 1.0)
    spec = EpisodeSpec(config.way, config.shot, 15)
    episode = spec.sample(jax.random.key(0), dataset.train)
    start = metalstm.init_train_state(algorithm, optimizer, config.seed, episode)
    loop = metalstm.make_train_loop(
        algorithm,
        optimizer,
        dataclasses.replace(spec, queries=5),
        num_tasks=config.meta_batch,
    )

    def say(step: int, means: Mapping[str, float]) -> None:
        print(
            f"  step {step:5d}  loss {means['loss']:.3f}  acc {means['accuracy']:.3f}",
            flush=True,
        )

    state = metalstm.fit(
        loop,
        metalstm.init_fit_state(start),
        dataset.train,
        num_steps=config.meta_steps,
        report=say,
        report_every=max(config.meta_steps // 4, 1),
    )
    return state.train.params.rule


def tester(
    learner: Learner, rule: UpdateRule, dataset: Dataset, split: str, config: Config
) -> Callable[[PyTree], Evaluation]:
    """Compile once: ``rule parameters -> Evaluation`` on episodes of ``split``."""
    algorithm = method(learner, rule, config)
    spec = EpisodeSpec(config.way, config.shot, 15)
    run = metalstm.make_evaluate(algorithm, spec, batch_size=10)
    example = spec.sample(jax.random.key(0), dataset.train)
    start = algorithm.init(jax.random.key(0), example)
    test = split == "test"
    episodes = config.test_episodes if test else config.validation_episodes

    def evaluate(rule_params: PyTree) -> Evaluation:
        params = MetaParams(start.learner, rule_params)
        return run(params, dataset.pool(split), num_episodes=episodes, split=split)

    return evaluate


def run(config: Config, folder: Path) -> None:
    dataset = load_dataset(config.dataset, config.data_dir)
    targets = learners(config)
    trained_on, learner = next(iter(targets.items()))
    rows: list[dict[str, Any]] = []
    evaluations: dict[tuple[str, str, str], Evaluation] = {}

    def record(part: str, name: str, target: str, found: Evaluation, **more: Any):
        evaluations[part, name, target] = found
        row = {"part": part, "rule": name, "learner": target}
        rows.append(row | {"mean": found.mean, "ci95": found.ci95} | more)
        print(f"{part:10} {name:28} {target:10} {found}", flush=True)

    trained = {}
    for name, changes in ABLATIONS.items():
        print(f"meta-training: {name}", flush=True)
        rule, started = make_gates(config, **changes), time.monotonic()
        trained[name] = meta_train(learner, rule, dataset, config)
        seconds = time.monotonic() - started
        test = tester(learner, rule, dataset, "test", config)
        record("ablation", name, trained_on, test(trained[name]), seconds=seconds)
    for name, target in targets.items():
        test = tester(target, make_gates(config), dataset, "test", config)
        record("transfer", "learned gates", name, test(trained["all parts"]))
        sgd = rules.learned_sgd()
        validate = tester(target, sgd, dataset, "validation", config)
        score = each_point(lambda rate, v=validate: -v(np.float32(rate)).mean)
        tuned = tune(score, {"rate": SGD_RATES})
        rate = tuned.best["rate"]
        found = tester(target, sgd, dataset, "test", config)(np.float32(rate))
        inside = tuned.inside["rate"]
        record("transfer", "tuned SGD", name, found, rate=rate, rate_inside_grid=inside)
    for row in rows:
        key = row["part"], row["rule"], row["learner"]
        of = {"ablation": "all parts", "transfer": "tuned SGD"}[row["part"]]
        if row["rule"] != of:
            other = evaluations[row["part"], of, row["learner"]]
            difference = paired_difference(evaluations[key], other)
            row["difference"], row["difference_ci95"] = difference
    write_results(
        folder,
        config,
        [table(rows, dataset.name, config)],
        {"rows": rows, "checksum": dataset.checksum},
        {"gates.png": figure(rows)},
    )


def table(rows: Sequence[Mapping[str, Any]], dataset: str, config: Config) -> Table:
    caption = (
        f"{dataset}, {config.way}-way {config.shot}-shot, {config.steps} updates, "
        "theta_0 drawn in every episode, first order, batch norm: support (inductive), "
        f"{config.meta_steps} meta-steps of {config.meta_batch} episodes, seed "
        f"{config.seed}, {config.test_episodes} test episodes."
    )
    cells = []
    for row in rows:
        difference = note = ""
        if "difference" in row:
            mean, ci95 = row["difference"], row["difference_ci95"]
            difference = f"{100 * mean:+.1f} ± {100 * ci95:.1f}"
        if "rate" in row:
            edge = "" if row["rate_inside_grid"] else " (at the edge of the grid)"
            note = f"rate {row['rate']:.3g}{edge}"
        accuracy = f"{100 * row['mean']:.1f} ± {100 * row['ci95']:.1f}"
        names = row["part"], row["rule"], row["learner"]
        cells.append([*names, accuracy, difference, note])
    headings = ["part", "rule", "learner", "accuracy % (95% CI)", "paired difference"]
    return Table(caption, [*headings, "note"], cells, left=(0, 1, 2, 5))


def figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    drawn = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    for axis, part in zip(drawn.subplots(1, 2), ("ablation", "transfer"), strict=True):
        chosen = [row for row in rows if row["part"] == part]
        axis.barh(
            [
                row["rule"]
                if part == "ablation"
                else f"{row['learner']}\n{row['rule']}"
                for row in chosen
            ],
            [100 * row["mean"] for row in chosen],
            xerr=[100 * row["ci95"] for row in chosen],
            color=["C1" if row["rule"] == "tuned SGD" else "C0" for row in chosen],
        )
        axis.invert_yaxis()
        axis.set(xlabel="meta-test accuracy, %", title=part)
    return drawn


def parse(arguments: list[str]) -> Config:
    module = "experiments.studies.gates"
    return read(Config(), arguments, module=module, description=__doc__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    return run_study("gates", parse, run, arguments, may_change=("data_dir",))


if __name__ == "__main__":
    sys.exit(main())
