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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import metalstm
from experiments.common.cli import Count, Natural, Pair
from experiments.common.study import CharacterOptions, Study, write_results
from experiments.common.tables import Table
from experiments.common.tuning import each_point, tune
from metalstm import algorithms, nn, plots, rules
from metalstm.base import Learner, PyTree
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
HEADINGS = (
    "part", "rule", "learner", "accuracy % (95% CI)", "paired difference", "note",
)  # fmt: skip


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


class Adapted:
    """A learner that a rule adapts, compiled once; each episode draws theta_0."""

    def __init__(self, learner: Learner, spec: dict[str, Any], config: Config):
        self.config, self.episodes = config, EpisodeSpec(config.way, config.shot, 15)
        self.algorithm = algorithms.learned_init(
            learner,
            rules.build_rule(spec),
            num_steps=config.steps,
            differentiation=metalstm.first_order(),
            learn_init=False,
            scan_unroll=config.steps,
        )
        self._evaluate = metalstm.make_evaluate(
            self.algorithm, self.episodes, batch_size=10
        )

    def meta_train(self, dataset: Dataset) -> PyTree:
        """The rule's parameters."""
        config, optimizer = self.config, metalstm.adam_clipped(1e-2, 1.0)
        episode = self.episodes.sample(jax.random.key(0), dataset.train)
        start = metalstm.init_train_state(
            self.algorithm, optimizer, config.seed, episode
        )
        spec = dataclasses.replace(self.episodes, queries=5)
        loop = metalstm.make_train_loop(
            self.algorithm, optimizer, spec, num_tasks=config.meta_batch
        )

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

    def test(self, rule: PyTree, dataset: Dataset, split: str = "test") -> Evaluation:
        episode = self.episodes.sample(jax.random.key(0), dataset.train)
        params = self.algorithm.init(jax.random.key(0), episode)._replace(rule=rule)
        test, validation = self.config.test_episodes, self.config.validation_episodes
        number = test if split == "test" else validation
        pool = dataset.pool(split)
        return self._evaluate(params, pool, num_episodes=number, split=split)


def run(config: Config, folder: Path) -> None:
    """Meta-train what is not in ``folder``/rules yet; test all; write."""
    dataset, targets, rows = config.load(), learners(config), Rows()
    trained_on, learner = next(iter(targets.items()))
    # a first step of a useful size: i_0 = sigmoid(0) = 0.5
    gates = {"rule": "lstm_gates", "hidden_size": config.hidden}
    gates |= {"forget_bias": (4.0, 5.0), "input_bias": (0.0, 0.0)}
    trained: dict[str, PyTree] = {}
    tested: dict[str, Evaluation] = {}
    for name, changes in ABLATIONS.items():
        path, spec = folder / "rules" / f"{name}.npz", gates | changes
        adapted, started = Adapted(learner, spec, config), time.monotonic()
        if not path.exists():
            print(f"meta-training: {name}", flush=True)
            params = adapted.meta_train(dataset)
            path.parent.mkdir(exist_ok=True)
            info = {"seconds": time.monotonic() - started}
            rules.save_rule(path, spec, params, info=info)
        saved = rules.load_rule(path)
        trained[name], reference = saved.params, tested.get("all parts")
        tested[name] = adapted.test(saved.params, dataset)
        row = "ablation", name, trained_on
        rows.add(row, tested[name], reference, seconds=saved.info["seconds"])
    for name, target in targets.items():
        sgd = Adapted(target, {"rule": "learned_sgd"}, config)
        score = lambda rate, sgd=sgd: -sgd.test(rate, dataset, "validation").mean  # noqa: E731
        tuned = tune(each_point(score), {"rate": SGD_RATES})
        by_sgd = sgd.test(tuned.best["rate"], dataset)
        by_gates = Adapted(target, gates, config).test(trained["all parts"], dataset)
        rows.add(("transfer", "learned gates", name), by_gates, by_sgd)
        rate, inside = tuned.best["rate"], tuned.inside["rate"]
        row = "transfer", "tuned SGD", name
        rows.add(row, by_sgd, rate=rate, rate_inside_grid=inside)
    caption = (
        f"{dataset.name}, {config.way}-way {config.shot}-shot, {config.steps} updates, "
        "theta_0 drawn in every episode, first order, batch norm: support (inductive), "
        f"{config.meta_steps} meta-steps of {config.meta_batch} episodes, seed "
        f"{config.seed}, {config.test_episodes} test episodes."
    )
    bars = {f"{r['rule']}, {r['learner']}": (r["mean"], r["ci95"]) for r in rows.rows}
    write_results(
        folder,
        config,
        [Table(caption, HEADINGS, rows.cells, left=(0, 1, 2, 5))],
        {"rows": rows.rows, "checksum": dataset.checksum},
        {"gates.png": plots.accuracy_bars(bars, chance=1 / config.way)},
    )


class Rows:
    """For results.json, and as cells of the table."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.cells: list[list[str]] = []

    def add(
        self,
        names: tuple[str, str, str],
        found: Evaluation,
        to: Evaluation | None = None,
        **more: Any,
    ) -> None:
        row: dict[str, Any] = dict(zip(HEADINGS, names, strict=False))
        row |= {"mean": found.mean, "ci95": found.ci95, **more}
        difference = note = ""
        if to is not None:
            by = metalstm.paired_difference(found, to)
            row["difference"], row["difference_ci95"] = by
            difference = f"{by.percent:+.1f}"
        if "rate" in more:
            edge = "" if more["rate_inside_grid"] else " (at the edge of the grid)"
            note = f"rate {more['rate']:.3g}{edge}"
        accuracy = f"{Estimate(found.mean, found.ci95).percent:.1f}"
        self.rows.append(row)
        self.cells.append([*names, accuracy, difference, note])
        print("{:10} {:28} {:10}".format(*names), found, flush=True)


STUDY = Study("gates", Config(), run, __doc__)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
