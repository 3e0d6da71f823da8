"""Same or different? A run's embeddings on identities that it has not seen.

Claim: what few-shot methods learn to compare verifies identities as well: two images
of a person, a letter or a speaker are told from images of two (Koch et al., 2015).

    python -m experiments.studies.verification RUN     # the test classes of the run
    python -m experiments.studies.verification RUN --methods siamese,arcface
    python -m experiments.studies.verification RUN --dataset folders --data-dir DIR
    python -m experiments.studies.verification RUN --dataset arrays --data-dir FILE.npz

A minute on a CPU core. Expected: every trained embedding far below the equal error rate
of raw pixels. docs/data.md has an example.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import tyro

from experiments.common import cli
from experiments.common.study import Made, Study, StudyOptions
from experiments.common.tables import Table
from experiments.few_shot.data import load_source
from experiments.few_shot.methods import Spec
from experiments.few_shot.saved_runs import SavedRun, choose_methods, read_runs
from experiments.few_shot.test import load_saved
from metalstm import data, plots, verification
from metalstm.algorithms import embedding_state
from metalstm.base import Learner, LearnerState
from metalstm.specs import COMPARING, build_learner

FALSE_ACCEPTS = 0.01
PIXELS = "pixels"  # the baseline: no learning


class Config(StudyOptions, frozen=True, kw_only=True):
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a finished run of few_shot."""
    methods: cli.Names = ()
    """Which of the run's methods; default all that embed."""
    dataset: Literal["run", "folders", "arrays"] = "run"
    """run: the classes that the run tests on; folders: a folder of images for each
    identity; arrays: a .npz of x and y. All identities there are compared."""
    data_dir: Path | None = None
    """The folder or file; run: where the run's data are, if they have moved."""
    pairs: Annotated[int, msgspec.Meta(ge=200)] = 20_000
    """Half of one identity, half of two; the same for every method."""
    similarity: Literal["trained", "cosine", "euclidean"] = "trained"
    """How embeddings are compared; trained: as each method was trained."""
    bootstrap: cli.Pair = 1_000
    """Draws of identities for the intervals."""


def check(config: Config) -> None:
    (run,) = read_runs([config.run])
    _choose(run, config.methods)
    if config.dataset != "run" and config.data_dir is None:
        raise ValueError(
            f"--dataset {config.dataset}: say where they are with --data-dir"
        )


class Identities(NamedTuple):
    x: np.ndarray  # uint8 [N, H, W, ch]
    labels: np.ndarray  # [N]
    name: str
    checksum: str


def run(config: Config, folder: Path) -> Made:
    """Compare the same pairs by every method.

    Raises:
      ValueError: the run has no such method or none that embeds, or its data or those
        given cannot serve.
      FileNotFoundError: a file is not there.
    """
    (run,) = read_runs([config.run])
    given = _identities(config, run)
    pairs = verification.draw_pairs(given.labels, config.pairs, seed=config.seed)
    people = len(np.unique(given.labels))
    print(
        f"{config.run}: {given.name}, {people:,} identities, {len(given.labels):,} "
        f"examples, {len(pairs.same):,} pairs, half of them of one identity",
        flush=True,
    )
    x = _normalised(given.x, run.data.get("normalise"))
    rows: dict[str, dict[str, Any]] = {}
    curves, cells = {}, []
    for name in [*_choose(run, config.methods), PIXELS]:
        learner, state, similarity = _embedding(name, run)
        if config.similarity != "trained":
            similarity = config.similarity
        scores = verification.score_pairs(
            learner, state, x, pairs, similarity=similarity
        )
        found = verification.receiver_operating_characteristic(scores, pairs.same)
        values = found.summary(FALSE_ACCEPTS)._asdict()
        ci95 = verification.bootstrap_over_identities(
            scores,
            pairs,
            given.labels,
            false_accept_rate=FALSE_ACCEPTS,
            num_samples=config.bootstrap,
            seed=config.seed,
        )._asdict()
        rows[name] = {"similarity": similarity, **values, "ci95": ci95}
        curves[name] = found.false_accepts, found.true_accepts
        numbers = (
            f"{100 * values[key]:.1f} ({100 * low:.1f}-{100 * high:.1f})"
            for key, (low, high) in ci95.items()
        )
        cells.append([name, similarity, *numbers])
    accepts = f"true at {FALSE_ACCEPTS:.0%} false"
    table = Table(
        "verification, % (95% intervals over identities)",
        ["method", "compared by", "equal error rate", accepts, "area"],
        cells,
        left=(0, 1),
    )
    document = {
        "run": str(config.run),
        "data": {"name": given.name, "checksum": given.checksum},
        "split": "test" if config.dataset == "run" else "all that is given",
        "identities": people,
        "examples": len(given.labels),
        "pairs": {"same": found.num_same, "different": found.num_different},
        "false_accept_rate": FALSE_ACCEPTS,
        "methods": rows,
    }
    figure = plots.roc_curves(curves, title=f"{given.name}, {people:,} identities")
    return Made([table], document, {"verification.png": figure})


def _choose(run: SavedRun, wanted: Sequence[str]) -> list[str]:
    embed = [n for n, spec in run.specs.items() if spec["algorithm"] in COMPARING]
    for name in wanted:
        if name not in run.specs:
            raise ValueError(
                f"--methods {name}: {run.folder} has {', '.join(run.specs)}"
            )
        if name not in embed:
            others = (
                f"choose from {', '.join(embed)}" if embed else "train one that does"
            )
            raise ValueError(f"--methods {name} does not embed: {others}")
    if not embed:
        raise ValueError(
            f"no method of {run.folder} embeds (it has {', '.join(run.specs)}): train "
            "prototypical, siamese or arcface, say"
        )
    return list(dict.fromkeys(wanted)) or embed


def _identities(config: Config, run: SavedRun) -> Identities:
    trained, where = run.options.data, config.data_dir
    if config.dataset == "run":
        # no episodes are drawn, so none need be possible
        own = cli.replace(
            trained, shot=1, queries=1, data_dir=where or trained.data_dir
        )
        found = load_source(own, {}).dataset
        if found.checksum != run.data["checksum"]:
            print("note: the data differ from those of the run (another checksum)")
        return _pooled(found, ["test"])
    assert where is not None, "refused by check"
    if trained.data_dir and trained.data_dir.resolve() == where.resolve():
        print("note: the run was trained on some of these identities")
    shape = tuple(run.data["image_shape"])
    if config.dataset == "arrays":
        x, y = data.read_arrays(where)
        if x.shape[1:] != shape:
            raise ValueError(
                f"--data-dir {where} has examples of {list(x.shape[1:])}, and "
                f"{run.folder} was trained on {list(shape)}: make them alike"
            )
        return Identities(x, y, where.stem, data.checksum(x))
    height, width, channels = shape
    if height != width:
        raise ValueError(
            f"--dataset folders gives squares, and {run.folder} was trained on "
            f"{list(shape)}: give --dataset arrays"
        )
    images = data.load_image_folders(where, image_size=height, channels=channels)
    return _pooled(images, [*data.SPLITS])


def _pooled(dataset: data.Dataset, splits: Sequence[str]) -> Identities:
    xs, labels = [], []
    for split in splits:
        x, which = verification.pool_examples(dataset.pool(split))
        xs.append(x)
        labels.append(np.array(dataset.class_names[split])[which])
    return Identities(
        np.concatenate(xs), np.concatenate(labels), dataset.name, dataset.checksum
    )


def _normalised(x: np.ndarray, normalise: Any) -> np.ndarray:
    if normalise is None:
        return x
    mean, std = (np.asarray(a, np.float32) for a in normalise)
    return (x.astype(np.float32) / 255 - mean) / std


def _embedding(name: str, run: SavedRun) -> tuple[Learner, LearnerState, Any]:
    """What embeds, its state, and the similarity that it was trained for."""
    empty = LearnerState({}, {}, {})
    if name == PIXELS:
        as_they_are = Learner(
            lambda key, x: empty, lambda state, x, *, norm, key=None: (x, state)
        )
        return as_they_are, empty, "euclidean"
    spec = run.specs[name]
    (method,) = choose_methods([run], [name])
    params, message = load_saved(method, run.data["image_shape"])
    if message:
        print(f"note: {message}")
    learner = build_learner(spec["learner"])
    return learner, embedding_state(params), _trained_similarity(spec)


def _trained_similarity(spec: Spec) -> str:
    name = spec["algorithm"]
    if name in ("margin_classifier", "siamese"):
        return "cosine"  # of a distance between vectors of length 1 too
    if "cosine" in (spec.get("compare"), spec.get("classifier")):
        return "cosine"
    return spec.get("distance", "cosine" if name == "relation" else "euclidean")


STUDY = Study("verification", Config(run=tyro.MISSING), run, __doc__, check=check)
main = STUDY.main

if __name__ == "__main__":
    sys.exit(main())
