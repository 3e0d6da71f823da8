"""How far can the answers of simple heads on a frozen backbone be trusted?

A small Conv4 is meta-trained as a prototypical network and then frozen, or the network
of a file of `metalstm.save` is. Heads without anything to train classify its features
of held-out classes. Temperature, abstention and
label sets are fitted on some episodes and measured on others.
Claim (`metalstm.fit_confidence`): coverage is at least, and false alarms are at most,
what was asked for, if the episodes are exchangeable. With ``--fit-on test`` they are.

    python -m experiments.studies.frozen_backbone               # glyphs, no download
    python -m experiments.studies.frozen_backbone --dataset omniglot --data-dir DIR
    python -m experiments.studies.frozen_backbone --dataset mini-imagenet \
        --data-dir DIR --way 5 --learner-file FILE

5 minutes on a CPU core for Omniglot. Expected: a calibration error below 2%; what was
asked for to within a point with ``--fit-on test``, and to within 3 points from 90%
coverage up where alphabets differ; distances that notice more unknown classes than
logits do. docs/results/frozen_backbone.md has results, machine and time.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import metalstm
from experiments.common.cli import Count, Pair
from experiments.common.study import CharacterOptions, Made, Study, meta_train
from experiments.common.tables import Table
from metalstm import algorithms, data, nn, plots
from metalstm.data.episodes import prepare_examples
from metalstm.records import to_spec
from metalstm.specs import build_learner, learner_spec

HEADS = {
    "nearest centroid": algorithms.nearest_centroid(),
    "nearest neighbour": algorithms.nearest_neighbour(unit_length=True),
    "ridge": algorithms.ridge(),
    "logistic regression": algorithms.logistic_regression(),
}
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)  # of false alarms, and of labels not covered
COLUMNS = {
    "head": "{head}",
    "accuracy %": "{found.accuracy.percent:.1f}",
    "calibration error %": "{error:.1f}",
    "asked for": "{rate:.0%}",
    "coverage %": "{found.coverage.percent:.1f}",
    "labels in a set": "{found.set_size:.2f}",
    "false alarms %": "{found.false_alarms.percent:.1f}",
    "misses %": "{found.misses.percent:.1f}",
}


class Config(CharacterOptions, frozen=True, kw_only=True):
    dataset: Literal["glyphs", "omniglot", "mini-imagenet"] = "glyphs"  # type: ignore[assignment]
    """mini-imagenet stands for its validation classes: every second one is fitted on,
    the others are measured on, and its test classes are not looked at."""
    learner_file: str | None = None
    """A file of `metalstm.save`, or a name of `metalstm.pretrained_learner`: use its
    network as the backbone, and train none."""
    images_per_class: Count = 200
    """Of mini-ImageNet, that are embedded."""
    way: Pair = 20
    fit_on: Literal["validation", "test"] = "validation"
    """Classes whose episodes temperature and thresholds are fitted on."""
    filters: Count = 32
    """Of the backbone."""
    meta_steps: Count = 1500
    """Meta-steps of the backbone, of one 20-way 1-shot episode each."""
    episodes: Pair = 400
    """To fit on, and as many to measure on; with as many unknown classes as known, or
    all that there are."""

    def load(self) -> data.Dataset:
        if self.dataset != "mini-imagenet":
            return super().load()
        return halve_validation(
            data.load_mini_imagenet(self.data_dir), self.images_per_class
        )


def halve_validation(dataset: data.Dataset, num_images: int) -> data.Dataset:
    """Split the validation classes in two, in place of validation and test classes."""
    pools, names = {}, {}
    for split, source, classes in (
        ("train", "train", slice(None)),
        ("validation", "validation", slice(0, None, 2)),
        ("test", "validation", slice(1, None, 2)),
    ):
        pool = dataset.pool(source)
        chosen = range(pool.num_classes)[classes]
        images = [np.asarray(pool.of_class(c)[:num_images]) for c in chosen]
        pools[split] = data.make_pool(images)
        names[split] = dataset.class_names[source][classes]
    return dataset._replace(
        name=f"halves of {dataset.name}'s validation classes",
        train=pools["train"],
        validation=pools["validation"],
        test=pools["test"],
        class_names=names,
        checksum=data.checksum(*(np.asarray(pool.images) for pool in pools.values())),
    )


def load_backbone(file: str) -> tuple[Any, str]:
    """Return a trained method's function from images to features, and its name.

    The name has the parameters' checksum, since features are cached by it.
    """
    path = Path(file)
    trained = (
        metalstm.load(path) if path.exists() else metalstm.pretrained_learner(file)
    )
    spec = learner_spec(to_spec(trained.algorithm)[0]) or {}
    learner = build_learner(dict(spec.get("body", spec)) | {"num_classes": None})
    state = algorithms.embedding_state(trained.params)
    statistics = trained.normalise and data.Normalisation(*trained.normalise)

    def features(images: jax.Array) -> jax.Array:
        x = prepare_examples(images, statistics)
        return learner.apply(state, x, norm="stored")[0]

    digest = data.checksum(*map(np.asarray, jax.tree.leaves(state)))
    return jax.jit(features), f"{path.stem} {digest}"


def train_backbone(dataset: data.Dataset, config: Config) -> Any:
    """Return a function from images [N, H, W, 1] to features [N, D]."""
    learner = nn.conv4(None, config.filters, downsample="stride", momentum=0.05)
    rotations = dataset.info.get("rotations", True)
    params = meta_train(
        algorithms.prototypical(learner),
        metalstm.adam_clipped(1e-3, 10.0),
        data.EpisodeSpec(20, 1, 5, rotations=rotations),
        dataset.train,
        num_steps=config.meta_steps,
        num_tasks=1,
        seed=config.seed,
    )
    frozen = algorithms.embedding_state(params)
    return jax.jit(lambda images: learner.apply(frozen, images, norm="stored")[0])


def measure(
    head: metalstm.MetaAlgorithm, features: data.Dataset, config: Config
) -> list[metalstm.ConfidenceReport]:
    """Fit on some episodes, measure on those of test classes, at each of `RATES`."""
    num_unknown = unknown_classes(features, config)
    to_fit, to_measure = (
        metalstm.collect_scores(
            head,
            algorithms.base_mean(features.train),
            features.pool(split),
            data.EpisodeSpec(config.way, config.shot, 5),
            num_unknown=num_unknown,
            num_episodes=config.episodes,
            seed=seed,
            split=split,
        )
        for seed, split in ((config.seed + 1, config.fit_on), (config.seed, "test"))
    )
    fitted = [
        metalstm.fit_confidence(to_fit, false_alarm_rate=rate, coverage=1 - rate)
        for rate in RATES
    ]
    return [metalstm.measure_confidence(to_measure, each) for each in fitted]


def unknown_classes(dataset: data.Dataset, config: Config) -> int:
    pools = dataset.pool(config.fit_on), dataset.test
    return min(config.way, *(pool.num_classes - config.way for pool in pools))


def run(config: Config, folder: Path) -> Made:
    dataset = config.load()
    if config.learner_file is None:
        backbone, name = train_backbone(dataset, config), None
    else:
        backbone, name = load_backbone(config.learner_file)
    features = data.embed(backbone, dataset, name=name, batch_size=256)
    found = {name: measure(head, features, config) for name, head in HEADS.items()}
    caption = (
        f"{dataset.name}, {config.way}-way {config.shot}-shot, "
        f"{unknown_classes(dataset, config)} unknown "
        f"classes, {config.episodes} episodes, seed {config.seed}, fitted on "
        f"{config.fit_on} classes; asked for: this share of false alarms, and of "
        "labels outside their sets."
    )
    records = [
        {
            "head": name,
            "rate": rate,
            "found": one,
            "error": 100 * one.reliability.calibration_error,
        }
        for name, reports in found.items()
        for rate, one in zip(RATES, reports, strict=True)
    ]
    table = Table.of(caption, COLUMNS, records)
    figure = plots.confidence_panels([1 - rate for rate in RATES], found)
    about = {"rows": table.cells, "checksum": dataset.checksum}
    return Made([table], about, {"confidence.png": figure})


STUDY = Study("frozen_backbone", Config(), run, __doc__)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
