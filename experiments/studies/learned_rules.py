"""What does a learned update rule add to a learned theta_0?

Every rule starts from the same updates (f near 1, and one step size for the head, one
for the body), so that "start" is what theta_0 does without a learned rule. Then

    rates       a learned step size for each tensor and update
    forget      the same with a forget gate
    features    gates that read the gradient, the loss and theta, without an LSTM
    hidden-4    the Meta-LSTM (Ravi & Larochelle, 2017) with a small LSTM
    hidden-20   with one of the published size
    two-layer   gates on a memory of past gradients that starts as the gradient itself

(and hidden-4-f1, hidden-4 with f = 1) are meta-trained, each with several seeds, and
tested on the same episodes. With --start theta_0 is a trained method's, and stays as
it is unless --init-rate is above 0; with --left-out N meta-training uses the last N
classes alone, which the trained method must not have seen. Without --start theta_0 is
drawn and meta-learned with the rule.

    python -m experiments.studies.learned_rules --preset mini-imagenet --data-dir DIR \
        --start mini-imagenet-48-classes-0 --left-out 16

Each cell is kept in --workdir, so that a stopped study resumes. A cell takes a core
five minutes at 1-shot and ten at 5-shot; docs/results/learned_rules.md has the results.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import msgspec
import numpy as np
import optax

import metalstm
from experiments.common.cli import (
    AT_LEAST_0,
    Count,
    Names,
    Natural,
    Positive,
    check_names,
)
from experiments.common.study import Made, Study, StudyOptions, digest, kept, note_data
from experiments.common.tables import Table
from experiments.few_shot.starting import New, start_from
from metalstm import algorithms, data, nn
from metalstm.base import Learner, LearnerState, MetaAlgorithm, QueryNorm
from metalstm.records import to_spec
from metalstm.rules import lstm_gates, two_layer
from metalstm.statistics import mean_and_ci95

_CONSTANT: dict[str, Any] = {"input": "constant"}
RULES: dict[str, dict[str, Any]] = {
    "start": _CONSTANT | {"forget": "one"},
    "rates": _CONSTANT | {"forget": "one"},
    "forget": _CONSTANT | {"hidden_size": 0},
    "features": {"hidden_size": 0},
    "hidden-4": {"hidden_size": 4},
    "hidden-4-f1": {"hidden_size": 4, "forget": "one"},
    "hidden-20": {"hidden_size": 20},
    "two-layer": {},  # two_layer's own arguments for its gates
}
_FROM_GRADIENT = {"start": "gradient", "hidden_size": 4}
COLUMNS = {
    "shots": "{shot}",
    "rule": "{rule}",
    "order": "{order}",
    "accuracy, %": "{accuracy:.2f}",
    "seeds": "{lowest:.2f} to {highest:.2f}",
    "to start": "{to_start:+.2f}",
    "to rates": "{to_rates:+.2f}",
}
PRESETS = {
    "mini-imagenet": "--dataset mini-imagenet --norm frozen --steps 5 --train-way 5 "
    "--train-queries 15 --first-step 0.1 0.001 --meta-steps 400 --rule-rate 1e-2",
    "omniglot": "--dataset omniglot --norm support --steps 2 --train-way 20 "
    "--train-queries 5 --first-step 0.38 0.01 --meta-steps 4000 --clip 10 "
    "--init-rate 1e-3 --orders second",
}


Rate = Annotated[float, msgspec.Meta(gt=0, lt=1)]  # of a gate, without its ends


class Config(StudyOptions, frozen=True, kw_only=True):
    dataset: Literal["glyphs", "omniglot", "mini-imagenet"] = "glyphs"
    """glyphs needs no download; omniglot on held-out alphabets."""
    data_dir: Path | None = None
    """Where the data set is."""
    start: Path | None = None
    """theta_0: a trained method's, a name of the package or a file; default: drawn."""
    left_out: Natural = 0
    """Meta-train on the last N training classes alone; 0: on all."""
    rules: Names = (
        "start", "rates", "features", "hidden-4", "hidden-20", "two-layer",
    )  # fmt: skip
    orders: tuple[Literal["first", "second"], ...] = ("first",)
    shots: tuple[Count, ...] = (1, 5)
    norm: Literal["frozen", "support", "transductive"] = "support"
    """Batch norm, in meta-training and test."""
    steps: Count = 2
    """Inner updates."""
    first_step: tuple[Rate, Rate] = (0.38, 0.01)
    """Where the step sizes start: of the head, of the body."""
    train_way: Count = 20
    train_queries: Count = 5
    augment: bool = True
    """Crops and flips, or rotated characters as classes."""
    meta_steps: Count = 400
    """Of one task."""
    rule_rate: Annotated[float, AT_LEAST_0] = 1e-3
    """Adam's for the rule."""
    init_rate: Annotated[float, AT_LEAST_0] = 0.0
    """Adam's for theta_0; 0: it stays as it is."""
    clip: Positive = 0.25
    """Norm of a meta-gradient, of the rule's part and of theta_0's."""
    seeds: Count = 3
    split: Literal["validation", "test"] = "test"
    test_episodes: Count = 600


class Tested(NamedTuple):
    accuracies: np.ndarray  # [episodes]


def check(config: Config) -> None:
    check_names("--rules", config.rules, RULES)
    if not config.rules:
        raise ValueError(f"--rules is empty: choose from {', '.join(RULES)}")
    if config.start is None and not config.init_rate:
        raise ValueError(
            "--init-rate 0 with a drawn theta_0 learns nothing: give --start, a "
            "trained method, or a rate"
        )
    if config.start is None and config.norm == "frozen":
        raise ValueError(
            "--norm frozen keeps the statistics of a trained method: give --start, or "
            "choose another"
        )


def load(config: Config) -> data.Dataset:
    if config.dataset == "glyphs":
        return data.load_glyphs()
    if config.dataset == "omniglot":
        return data.load_omniglot(config.data_dir)
    return data.load_mini_imagenet(config.data_dir)


def learner_of(dataset: str) -> Learner:
    """Features of one length, so that a step size fits any number of shots."""
    if dataset == "mini-imagenet":
        body = nn.conv4(None, filters=32, final_relu=False, momentum=0.95)
        return nn.tied_head(body, feature_length=5.0)
    strided: dict[str, Any] = {"downsample": "stride", "norm": "layer"}
    return nn.tied_head(nn.conv4(None, filters=32, final_relu=False, **strided))


def algorithm_of(rule: str, order: str, config: Config) -> MetaAlgorithm:
    head, body = (float(np.log(i / (1 - i))) for i in config.first_step)
    norm: QueryNorm = config.norm
    gates: dict[str, Any] = RULES[rule] | {
        "forget_bias": (10.0, 10.0),
        "input_bias": (body, body),
        "input_bias_of": {"head": (head, head)},
        "bias_per": "tensor_and_step",
        "num_bias_steps": config.steps,
    }
    two = rule == "two-layer"
    return algorithms.meta_lstm(
        learner_of(config.dataset),
        two_layer(memory=_FROM_GRADIENT, gates=gates) if two else lstm_gates(**gates),
        num_steps=config.steps,
        differentiation=(
            metalstm.first_order() if order == "first" else metalstm.second_order()
        ),
        query_norm=norm,
        train_query_norm=norm,
        frozen_stats="kept" if norm == "frozen" else "gathered",
        gradient_scale="way",
        train_way=config.train_way,
        train_queries=config.train_queries,
    )


def optimizer_of(config: Config, *, meta_trains_rule: bool) -> Any:
    """Adam with a cosine to a tenth, for the rule and for theta_0 apart."""

    def adam(rate: float) -> optax.GradientTransformation:
        if not rate:
            return optax.set_to_zero()
        schedule = optax.cosine_decay_schedule(rate, config.meta_steps, 0.1)
        return metalstm.adam_clipped(schedule, config.clip)

    rule_rate = config.rule_rate if meta_trains_rule else 0.0
    both = {"learner": adam(config.init_rate), "rule": adam(rule_rate)}

    def parts(params: Any) -> Any:
        return type(params)(
            *(
                jax.tree.map(lambda _, part=part: part, getattr(params, part))
                for part in both
            )
        )

    return optax.multi_transform(both, parts)


def learns(rule: str, config: Config) -> bool:
    return rule != "start" or config.init_rate > 0


class Cell:
    """One rule in one order at one number of shots, compiled once for all seeds."""

    def __init__(
        self, rule: str, order: str, shot: int, config: Config, dataset: data.Dataset
    ):
        self.rule, self.config, self.dataset = rule, config, dataset
        mini = config.dataset == "mini-imagenet"
        self.test_episodes = data.EpisodeSpec(5, shot, 15)
        self.train_episodes = dataclasses.replace(
            self.test_episodes,
            augment=data.augment.crop_flip() if mini and config.augment else None,
            rotations=config.dataset == "omniglot" and config.augment,
        )
        self.algorithm = algorithm_of(rule, order, config)
        self.optimizer = optimizer_of(config, meta_trains_rule=rule != "start")
        self._train = metalstm.make_train_loop(
            self.algorithm, self.optimizer, self.train_episodes, num_tasks=1
        )
        self._test = metalstm.make_evaluate(
            self.algorithm, self.test_episodes, batch_size=4
        )

    def __call__(self, seed: int, start: Any, pool: Any) -> Tested:
        config = self.config
        episode = self.train_episodes.sample(data.episode_key(seed, "train", 0), pool)
        state = metalstm.init_train_state(
            self.algorithm, self.optimizer, seed, episode, start=start
        )
        for _ in range(config.meta_steps if learns(self.rule, config) else 0):
            state, _ = self._train(state, pool)
        return Tested(
            self._test(
                state.params,
                self.dataset.pool(config.split),
                num_episodes=config.test_episodes,
                split=config.split,
            ).accuracies
        )


def run(config: Config, folder: Path) -> Made:
    """Meta-train and test what ``folder`` does not have yet."""
    dataset = load(config)
    pool = last_classes(dataset.train, config.left_out)
    if pool.num_classes < config.train_way:
        raise ValueError(
            f"--train-way {config.train_way}: meta-training has {pool.num_classes} "
            "classes: choose so many at most, or --left-out more"
        )
    start = trained(config, dataset)
    of_start = {} if start is None else {"start": digest(start)}
    note_data(folder, {"checksum": dataset.checksum} | of_start)
    seeds = range(config.seed, config.seed + config.seeds)
    rows: list[dict[str, Any]] = []
    for shot in config.shots:
        found: dict[tuple[str, str], np.ndarray] = {}
        for order, rule in itertools.product(config.orders, config.rules):
            if rule == "start" and not config.init_rate and order != config.orders[0]:
                continue  # nothing is learned, in either order
            cell = Cell(rule, order, shot, config, dataset)
            accuracies = []
            # what learns nothing from a given start is the same for every seed
            once = start is not None and not learns(rule, config)
            for seed in seeds[:1] if once else seeds:
                name = f"{rule} {order}-order {shot}-shot {seed}"
                make = functools.partial(cell, seed, start, pool)
                one = kept(folder / f"{name}.npz", Tested, make).accuracies
                print(f"{name}: {100 * one.mean():.2f}", flush=True)
                accuracies.append(one)
            found[rule, order] = np.stack(accuracies)
        rows += [row_of(rule, order, shot, found) for rule, order in found]
    note = (
        f"{config.meta_steps:,} meta-steps, {config.test_episodes:,} {config.split} "
        "episodes, the same for all; accuracy: of all seeds together, spread: their "
        "lowest and highest; differences paired over episodes"
    )
    table = Table.of("", COLUMNS, rows, notes=[note])
    about = {"rows": rows, "name": dataset.name, "checksum": dataset.checksum}
    return Made([table], about, {})


def trained(config: Config, dataset: data.Dataset) -> LearnerState | None:
    """theta_0 of ``--start``, if it is the same function here.

    Raises:
      ValueError: its network, the images or their normalisation differ.
    """
    if config.start is None:
        return None
    algorithm = algorithm_of("start", "first", config)
    episode = data.EpisodeSpec(5, 1, 1).sample(jax.random.key(0), dataset.train)
    new = New(
        name="every rule",
        spec=to_spec(algorithm)[0],
        params=algorithm.init(jax.random.key(0), episode),
        reads_averages=config.norm == "frozen",
        is_trained=True,
        data={"image_shape": dataset.image_shape, "normalise": None},
        flag="--start",
    )
    return start_from(str(config.start), new)


def last_classes(pool: data.ClassPool, number: int) -> data.ClassPool:
    """The last classes of a pool; 0: all of them."""
    if not number:
        return pool
    if number > pool.num_classes:
        raise ValueError(f"--left-out {number}: there are {pool.num_classes} classes")
    chosen = range(pool.num_classes - number, pool.num_classes)
    groups = None if pool.groups is None else np.asarray(pool.groups)[-number:]
    return data.make_pool(
        [np.asarray(pool.of_class(index)) for index in chosen], groups=groups
    )


def row_of(
    rule: str, order: str, shot: int, found: Mapping[tuple[str, str], np.ndarray]
) -> dict[str, Any]:
    """Of one cell: accuracies [seeds, episodes], against the start's and the rates'."""
    accuracies = found[rule, order]
    of_seeds = 100 * accuracies.mean(1)
    row: dict[str, Any] = {
        "rule": rule,
        "order": "" if rule == "start" else order,
        "shot": shot,
        "accuracy": mean_and_ci95(100 * accuracies.mean(0)),
        "lowest": of_seeds.min(),
        "highest": of_seeds.max(),
    }
    for other in ("start", "rates"):
        reference = found.get((other, order))
        if other == "start" and reference is None:  # it learns nothing in any order
            reference = next((found[key] for key in found if key[0] == other), None)
        if rule not in ("start", other) and reference is not None:
            gain = 100 * (accuracies.mean(0) - reference.mean(0))
            row[f"to_{other}"] = mean_and_ci95(gain)
    return row


STUDY = Study(
    "learned_rules",
    Config(),
    run,
    __doc__,
    presets=PRESETS,
    check=check,
    may_change=("rules", "orders", "shots", "seeds"),
)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
