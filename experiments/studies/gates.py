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
from pathlib import Path
from typing import Any

import jax

import metalstm
from experiments.common import study
from experiments.common.cli import Count, Natural, Pair
from experiments.common.tables import Table
from experiments.common.tuning import each_point, tune
from metalstm import algorithms, nn, plots, rules
from metalstm.base import Learner
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
COLUMNS = {
    "part": "{part}",
    "rule": "{rule}",
    "learner": "{learner}",
    "accuracy % (95% CI)": "{accuracy.percent:.1f}",
    "paired difference": "{paired.percent:+.1f}",
    "note": "rate {rate:.3g}{edge}",
}


class Config(study.CharacterOptions, frozen=True, kw_only=True):
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


class Adapted:
    """A learner that a rule adapts, compiled once; each episode draws theta_0."""

    def __init__(
        self, learner: Learner, spec: dict[str, Any], dataset: Dataset, config: Config
    ):
        self.config, self.pool = config, dataset.train
        self.episodes = EpisodeSpec(config.way, config.shot, 15)
        self.algorithm = algorithms.learned_init(
            learner,
            rules.build_rule(spec),
            num_steps=config.steps,
            differentiation=metalstm.first_order(),
            learn_init=False,
            scan_unroll=config.steps,
        )
        self._test = study.tester(self.algorithm, self.episodes, dataset, config)

    def meta_train(self) -> Any:
        """The rule's parameters."""
        params = study.meta_train(
            self.algorithm,
            metalstm.adam_clipped(1e-2, 1.0),
            dataclasses.replace(self.episodes, queries=5),
            self.pool,
            num_steps=self.config.meta_steps,
            num_tasks=self.config.meta_batch,
            seed=self.config.seed,
        )
        return params.rule

    def test(self, rule: Any, split: str = "test") -> Evaluation:
        key = jax.random.key(0)
        params = self.algorithm.init(key, self.episodes.sample(key, self.pool))
        return self._test(params._replace(rule=rule), split)


def run(config: Config, folder: Path) -> study.Made:
    """Meta-train what is not in ``folder``/rules yet; test all."""
    dataset, targets = config.load(), learners(config)
    rows: list[dict[str, Any]] = []

    def add(
        part: str, rule: str, learner: str, found: Evaluation, to: Any = None, **more
    ) -> None:
        row: dict[str, Any] = {"part": part, "rule": rule, "learner": learner}
        row |= {"mean": found.mean, "ci95": found.ci95, **more}
        if to is not None:
            by = metalstm.paired_difference(found, to)
            row["difference"], row["difference_ci95"] = by
        rows.append(row)
        print(f"{part:10} {rule:28} {learner:10}", found, flush=True)

    # a first step of a useful size: i_0 = sigmoid(0) = 0.5
    gates = {"rule": "lstm_gates", "hidden_size": config.hidden}
    gates |= {"forget_bias": (4.0, 5.0), "input_bias": (0.0, 0.0)}
    (trained_on, learner), *_ = targets.items()
    tested: dict[str, Evaluation] = {}
    for name, changes in ABLATIONS.items():
        path, spec = folder / "rules" / f"{name}.npz", gates | changes
        adapted, started = Adapted(learner, spec, dataset, config), time.monotonic()
        if not path.exists():
            print(f"meta-training: {name}", flush=True)
            params = adapted.meta_train()
            path.parent.mkdir(exist_ok=True)
            info = {"seconds": time.monotonic() - started}
            rules.save_rule(path, spec, params, info=info)
        saved, reference = rules.load_rule(path), tested.get("all parts")
        tested[name], seconds = adapted.test(saved.params), saved.info["seconds"]
        add("ablation", name, trained_on, tested[name], reference, seconds=seconds)
    all_parts = rules.load_rule(folder / "rules" / "all parts.npz").params
    for name, target in targets.items():
        sgd = Adapted(target, {"rule": "learned_sgd"}, dataset, config)
        score = lambda rate, sgd=sgd: -sgd.test(rate, "validation").mean  # noqa: E731
        tuned = tune(each_point(score), {"rate": SGD_RATES})
        by_sgd = sgd.test(tuned.best["rate"])
        by_gates = Adapted(target, gates, dataset, config).test(all_parts)
        add("transfer", "learned gates", name, by_gates, by_sgd)
        at = {"rate": tuned.best["rate"], "rate_inside_grid": tuned.inside["rate"]}
        add("transfer", "tuned SGD", name, by_sgd, **at)
    caption = (
        f"{dataset.name}, {config.way}-way {config.shot}-shot, {config.steps} updates, "
        "theta_0 drawn in every episode, first order, batch norm: support (inductive), "
        f"{config.meta_steps} meta-steps of {config.meta_batch} episodes, seed "
        f"{config.seed}, {config.test_episodes} test episodes."
    )
    table = Table.of(caption, COLUMNS, map(for_table, rows), left=(0, 1, 2, 5))
    bars = {f"{r['rule']}, {r['learner']}": (r["mean"], r["ci95"]) for r in rows}
    figure = plots.accuracy_bars(bars, chance=1 / config.way)
    about = {"rows": rows, "checksum": dataset.checksum}
    return study.Made([table], about, {"gates.png": figure})


def for_table(row: dict[str, Any]) -> dict[str, Any]:
    shown = row | {"accuracy": Estimate(row["mean"], row["ci95"])}
    if "difference" in row:
        shown["paired"] = Estimate(row["difference"], row["difference_ci95"])
    if "rate" in row:
        shown["edge"] = "" if row["rate_inside_grid"] else " (at the edge of the grid)"
    return shown


STUDY = study.Study("gates", Config(), run, __doc__)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
