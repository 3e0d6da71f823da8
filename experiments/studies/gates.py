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
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import metalstm
from experiments.common.cli import Count, Natural, Pair
from experiments.common.study import CharacterOptions, Study, write_results
from experiments.common.tables import Table
from experiments.common.tuning import each_point, tune
from metalstm import algorithms, nn, plots, rules
from metalstm.base import Learner, MetaParams, PyTree, UpdateRule
from metalstm.data import Dataset, EpisodeSpec
from metalstm.meta.evaluation import Evaluation
from metalstm.statistics import Estimate

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


class Config(CharacterOptions, frozen=True, kw_only=True):
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


def learners(config: Config) -> dict[str, Learner]:
    """By name, the one of meta-training first."""
    found: dict[str, Learner] = {
        f"conv4-{filters}": nn.conv4(
            config.way, filters, downsample="stride", momentum=0.05
        )
        for filters in (config.filters, 2 * config.filters)
    }
    return found | {"mlp-64": nn.mlp(config.way, (64,))}


def gate_spec(config: Config, **changes: Any) -> dict[str, Any]:
    """What `rules.build_rule` makes gates of."""
    # a first step of a useful size: i_0 = sigmoid(0) = 0.5
    start = {"forget_bias": (4.0, 5.0), "input_bias": (0.0, 0.0)}
    return {"rule": "lstm_gates", "hidden_size": config.hidden, **start, **changes}


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
    spec = dataclasses.replace(spec, queries=5)
    tasks = config.meta_batch
    loop = metalstm.make_train_loop(algorithm, optimizer, spec, num_tasks=tasks)

    def say(step: int, means: Mapping[str, float]) -> None:
        loss, accuracy = means["loss"], means["accuracy"]
        print(f"  step {step:5d}  loss {loss:.3f}  acc {accuracy:.3f}", flush=True)

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
    """Meta-train what is not in ``folder``/rules yet; test all; write."""
    dataset, targets, sgd = config.load(), learners(config), rules.learned_sgd()
    trained_on, learner = next(iter(targets.items()))
    rows: list[dict[str, Any]] = []

    def record(names: Sequence[str], found: Evaluation, to: Evaluation | None, **more):
        row = dict(zip(("part", "rule", "learner"), names, strict=True)) | more
        row |= {"mean": found.mean, "ci95": found.ci95}
        if to is not None:
            difference = metalstm.paired_difference(found, to)
            row["difference"], row["difference_ci95"] = difference
        rows.append(row)
        print("{:10} {:28} {:10}".format(*names), found, flush=True)

    trained: dict[str, PyTree] = {}
    tested: dict[str, Evaluation] = {}
    for name, changes in ABLATIONS.items():
        path, spec = folder / "rules" / f"{name}.npz", gate_spec(config, **changes)
        rule, started = rules.build_rule(spec), time.monotonic()
        if not path.exists():
            print(f"meta-training: {name}", flush=True)
            params = meta_train(learner, rule, dataset, config)
            info = {"seconds": time.monotonic() - started}
            path.parent.mkdir(exist_ok=True)
            rules.save_rule(path, spec, params, info=info)
        saved = rules.load_rule(path)
        trained[name] = saved.params
        tested[name] = tester(learner, rule, dataset, "test", config)(saved.params)
        to = None if name == "all parts" else tested["all parts"]
        record(("ablation", name, trained_on), tested[name], to, **saved.info)
    for name, target in targets.items():
        validate = tester(target, sgd, dataset, "validation", config)
        score = each_point(lambda rate, v=validate: -v(np.float32(rate)).mean)
        tuned = tune(score, {"rate": SGD_RATES})
        rate = tuned.best["rate"]
        by_sgd = tester(target, sgd, dataset, "test", config)(np.float32(rate))
        rule = rules.build_rule(gate_spec(config))
        by_gates = tester(target, rule, dataset, "test", config)(trained["all parts"])
        record(("transfer", "learned gates", name), by_gates, by_sgd)
        about = {"rate": rate, "rate_inside_grid": tuned.inside["rate"]}
        record(("transfer", "tuned SGD", name), by_sgd, None, **about)
    bars = {f"{r['rule']}, {r['learner']}": (r["mean"], r["ci95"]) for r in rows}
    write_results(
        folder,
        config,
        [table(rows, dataset.name, config)],
        {"rows": rows, "checksum": dataset.checksum},
        {"gates.png": plots.accuracy_bars(bars, chance=1 / config.way)},
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
        accuracy = f"{Estimate(row['mean'], row['ci95']).percent:.1f}"
        difference = note = ""
        if "difference" in row:
            found = Estimate(row["difference"], row["difference_ci95"])
            difference = f"{found.percent:+.1f}"
        if "rate" in row:
            edge = "" if row["rate_inside_grid"] else " (at the edge of the grid)"
            note = f"rate {row['rate']:.3g}{edge}"
        names = row["part"], row["rule"], row["learner"]
        cells.append([*names, accuracy, difference, note])
    headings = ["part", "rule", "learner", "accuracy % (95% CI)", "paired difference"]
    return Table(caption, [*headings, "note"], cells, left=(0, 1, 2, 5))


STUDY = Study("gates", Config(), run, __doc__)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
