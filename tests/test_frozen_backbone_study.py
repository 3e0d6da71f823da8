"""The study of heads on a frozen backbone, on features drawn in place."""

from __future__ import annotations

import json

import jax
import numpy as np

import metalstm
from experiments.studies import frozen_backbone as study
from metalstm import algorithms, data, nn
from metalstm.data.cache import Split, assemble
from metalstm.data.pools import SPLITS


def drawn_classes() -> object:
    rng = np.random.default_rng(0)
    splits = {}
    for split in SPLITS:
        centres = rng.normal(size=(12, 1, 8))
        features = (centres + 0.5 * rng.normal(size=(12, 9, 8))).astype(np.float32)
        counts = np.full(12, 9, np.int32)
        features = features.reshape(-1, 8)
        splits[split] = Split(features, counts, tuple(f"{split}{c}" for c in range(12)))
    return assemble("drawn", splits, {})


def test_the_study_measures_what_it_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study.Config, "load", lambda config: drawn_classes())
    monkeypatch.setattr(study, "train_backbone", lambda dataset, config: lambda x: x)
    monkeypatch.setattr(study, "HEADS", {"ridge": study.HEADS["ridge"]})
    options = ["--way", "3", "--shot", "2", "--episodes", "200", "--fit-on", "test"]
    assert study.main([*options, "--workdir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "drawn, 3-way 2-shot, 3 unknown classes, 200 episodes" in said
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row[3] for row in rows] == ["1%", "2%", "5%", "10%", "20%", "30%"]
    for row in rows:
        asked = float(row[3].rstrip("%"))
        coverage, false_alarms = (float(row[k].split()[0]) for k in (4, 6))
        assert abs(100 - asked - coverage) < 4
        assert abs(asked - false_alarms) < 4
    assert (tmp_path / "run" / "confidence.png").exists()


def test_a_saved_network_embeds_half_of_the_validation_classes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pools = {
        split: data.make_pool(rng.integers(0, 256, (6, 5, 8, 8, 3), np.uint8))
        for split in SPLITS
    }
    names = {split: tuple(f"{split}{c}" for c in range(6)) for split in SPLITS}
    whole = data.Dataset("mini", **pools, class_names=names, image_shape=(8, 8, 3),
                         checksum="", info={})  # fmt: skip
    monkeypatch.setattr(data, "load_mini_imagenet", lambda folder: whole)
    config = study.Config(dataset="mini-imagenet", images_per_class=4, way=2)
    halves = config.load()
    assert halves.class_names["validation"] == (
        "validation0",
        "validation2",
        "validation4",
    )
    assert halves.class_names["test"] == ("validation1", "validation3", "validation5")
    assert halves.train.images.shape == (24, 8, 8, 3)
    expected = pools["validation"].of_class(3)[:4]
    np.testing.assert_array_equal(halves.test.of_class(1), expected)
    assert study.unknown_classes(halves, config) == 1

    body = nn.conv4(None, 2, num_blocks=1)
    algorithm = algorithms.maml(nn.tied_head(body, feature_length=5.0), train_way=2)
    statistics = data.Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    spec = data.EpisodeSpec(2, 1, 1, normalise=statistics)
    episode = spec.sample(data.episode_key(0, "train", 0), whole.train)
    params = algorithm.init(jax.random.key(0), episode)
    file = metalstm.save(tmp_path / "it.npz", algorithm, params, whole.train, spec)
    x = np.asarray(expected, np.float32) / 255
    backbone, name = study.load_backbone(str(file))
    found = backbone(x)
    normalised = np.float32((x - statistics.mean) / statistics.std)
    state = algorithms.embedding_state(params)
    features, _ = body.apply(state, normalised, norm="stored")
    np.testing.assert_allclose(found, features, rtol=1e-4, atol=1e-5)

    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    metalstm.save(file, algorithm, changed, whole.train, spec)
    assert (
        study.load_backbone(str(file))[1] != name
    )  # its features are not those cached
