"""The trained methods of the package: they can be used, their results made again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import metalstm
from experiments.few_shot.saved_runs import read_runs
from metalstm import data

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "mini_imagenet"
NAMES = [f"mini-imagenet-{shot}shot-{seed}" for shot in (1, 5) for seed in range(3)]
CLASSIFIER = "mini-imagenet-classifier-0"
FEATURES = "mini-imagenet-48-classes-0"
METHODS = (
    "maml", "prototypical-cosine", "prototypical", "matching", "fomaml", "anil",
    "meta-sgd",
)  # fmt: skip
OTHERS = {f"mini-imagenet-{method}-0": method for method in METHODS}
OMNIGLOT = {
    f"omniglot-{method}-0": method
    for method in ("meta-lstm", "maml", "matching", "prototypical", "imaml")
}


def test_each_has_a_card_and_the_command_knows_how_to_test_it():
    cards = metalstm.pretrained_learner()
    names = [*NAMES, CLASSIFIER, FEATURES, *OTHERS, *OMNIGLOT]
    assert [card.name for card in cards] == sorted(names)
    for card in cards:
        assert "not stated" not in card
        (run,) = read_runs([Path(card.name)])
        episodes = 600 if card.name in OMNIGLOT else 2_000
        assert run.options.test.test_episodes == episodes


@pytest.mark.parametrize(
    "name", [*NAMES[::3], CLASSIFIER, FEATURES, *OTHERS, *OMNIGLOT]
)
def test_one_predicts_names(name):
    trained = metalstm.pretrained_learner(name)
    shape = (6, 28, 28, 1) if name in OMNIGLOT else (6, 84, 84, 3)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    labels = ["ant", "bee", "cat", "dog", "elk"]
    assert set(trained(images[:5], labels, images)) <= set(labels)


@pytest.mark.real_data
def test_the_first_episodes_of_a_published_number(real_data_dir):
    pool = data.load_mini_imagenet(real_data_dir / "mini_imagenet").test
    for shot, episodes, name, method, file in (
        (1, 40, NAMES[0], "meta-lstm", NAMES[0]),
        (5, 16, NAMES[3], "meta-lstm", NAMES[3]),
        (1, 40, CLASSIFIER, "feature-cosine", "baselines-1shot"),
        *((1, 8, name, OTHERS[name], "baselines-1shot") for name in list(OTHERS)[:2]),
    ):
        trained = metalstm.pretrained_learner(name)
        with np.load(RESULTS / f"{file}.npz") as arrays:
            published = arrays[method]
        assert len(published) == 2_000
        assert_same_episodes(
            trained, pool, data.EpisodeSpec(5, shot, 15), published[:episodes]
        )


@pytest.mark.real_data
def test_the_first_episodes_on_omniglot(real_data_dir):
    pool = data.load_omniglot(real_data_dir / "tensorflow_datasets").test
    with np.load(RESULTS.parent / "omniglot" / "episodes.npz") as arrays:
        published = dict(arrays)
    for name, method in OMNIGLOT.items():
        of_method = published[f"{method} 20w1s"]
        assert len(of_method) == 600
        trained = metalstm.pretrained_learner(name)
        assert_same_episodes(trained, pool, data.EpisodeSpec(20, 1, 5), of_method[:40])


def assert_same_episodes(trained, pool, spec, published):
    found = metalstm.evaluate(
        trained.algorithm,
        trained.params,
        pool,
        spec,
        num_episodes=len(published),
        seed=0,
        split="test",
        batch_size=4,
    )
    # a query near the boundary may flip on another CPU
    difference = np.asarray(found.accuracies) - published
    assert np.abs(difference).mean() < 0.002
