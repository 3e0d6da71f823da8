"""Images with labels: letters of the glyphs, and TFDS sets prepared here."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from metalstm.data import load_image_data
from metalstm.data.pools import Dataset, make_pool
from metalstm.data.sources import labelled

KINDS = 3


class ToyLabels(tfds.core.GeneratorBasedBuilder):
    """Three classes; a pixel's value names its image. Configs: what may be missing."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (how TFDS wants it)
        tfds.core.BuilderConfig(name=name)
        for name in ("whole", "train_only", "test_only", "sizes", "unlabelled")
    ]

    def _info(self):
        label = tfds.features.ClassLabel(names=[f"k{i}" for i in range(KINDS)])
        if self.builder_config.name == "unlabelled":
            label = np.int64
        features = {"image": tfds.features.Image(shape=(None, None, 1)), "label": label}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def _split_generators(self, dl_manager):
        config = self.builder_config.name
        splits = {"train": range(18), "test": range(18, 24)}
        splits.pop({"train_only": "test", "test_only": "train"}.get(config, ""), None)
        return {split: self._generate_examples(n) for split, n in splits.items()}

    def _generate_examples(self, numbers):
        for number in numbers:
            size = 6 + (self.builder_config.name == "sizes") * (number % 2)
            file = io.BytesIO()
            Image.new("L", (size, size), number).save(file, "png")
            file.seek(0)
            yield number, {"image": file, "label": number % KINDS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    for config in ToyLabels.BUILDER_CONFIGS:
        builder = ToyLabels(
            data_dir=folder, config=config.name, file_format="array_record"
        )
        builder.download_and_prepare()
    return folder


def load(name, folder, cache, **options):
    return load_image_data(f"toy_labels/{name}", folder, cache_dir=cache, **options)


def test_a_prepared_set_keeps_its_splits_and_labels(folder, tmp_path, monkeypatch):
    data = load("whole", folder, tmp_path)
    assert data.class_names == ("k0", "k1", "k2")
    assert data.num_classes == KINDS
    for part, numbers in (
        (data.train, set(range(18))),
        (data.test, set(range(18, 24))),
    ):
        assert part.x.dtype == np.uint8
        assert part.x.shape == (len(numbers), 6, 6, 1)
        pixels = np.asarray(part.x[:, 0, 0, 0])
        assert set(pixels.tolist()) == numbers
        np.testing.assert_array_equal(part.y, pixels % KINDS)
    # the second time from the cache
    monkeypatch.setattr(labelled, "_decode", None)
    again = load("whole", folder, tmp_path)
    assert again.checksum == data.checksum
    np.testing.assert_array_equal(again.test.x, data.test.x)


def test_without_a_test_split_some_of_train_is_held_out(folder, tmp_path):
    data = load("train_only", folder, tmp_path)
    pixels = [set(np.unique(part.x).tolist()) for part in (data.train, data.test)]
    assert [len(p) for p in pixels] == [15, 3]
    assert pixels[0] | pixels[1] == set(range(18))


@pytest.mark.fault("images of several sizes")
def test_images_of_several_sizes_are_resized_on_request(folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"several sizes, such as .*; choose an image_"
    ):
        load("sizes", folder, tmp_path)
    assert load("sizes", folder, tmp_path, image_size=4).train.x.shape[1:] == (4, 4, 1)


def test_what_cannot_be_classified_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"splits test, none called train; build an I"):
        load("test_only", folder, tmp_path)
    with pytest.raises(ValueError, match=r"features .*it needs 'image' and a 'label'"):
        load("unlabelled", folder, tmp_path)


def test_glyphs_are_ten_letters_of_the_training_pool(monkeypatch):
    images = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16, 1, 1, 1)
    pool = make_pool(images)
    names = tuple("abcdefghijkl")
    glyphs = Dataset("glyphs", pool, pool, pool, {"train": names}, (1, 1, 1), "", {})
    monkeypatch.setattr(labelled, "load_glyphs", lambda cache_dir: glyphs)
    data = load_image_data()
    assert data.class_names == names[:10]
    assert data.train.x.shape == (140, 1, 1, 1)
    assert data.test.x.shape == (20, 1, 1, 1)
    for part in data.train, data.test:
        np.testing.assert_array_equal(part.x[:, 0, 0, 0] // 16, part.y)
        assert set(np.asarray(part.y).tolist()) == set(range(10))
    assert not set(np.unique(data.train.x)) & set(np.unique(data.test.x))
    with pytest.raises(ValueError, match=r"image_size=14: glyphs are 28 x 28; omit"):
        load_image_data(image_size=14)


@pytest.mark.real_data
def test_the_test_split_of_mnist_is_read_whole(real_data_dir, tmp_path, monkeypatch):
    whole = tfds.builder("mnist", data_dir=real_data_dir / "tensorflow_datasets")
    assert whole.info.splits["train"].num_examples == 60_000
    parts = {"train": "train[:5000]", "test": "test"}
    builder = SimpleNamespace(
        info=whole.info,
        as_data_source=lambda split: whole.as_data_source(split=parts[split]),
    )
    monkeypatch.setattr(labelled, "open_builder", lambda *_: builder)
    data = load_image_data("mnist", cache_dir=tmp_path)
    assert data.train.x.shape == (5_000, 28, 28, 1)
    assert data.test.x.shape == (10_000, 28, 28, 1)
    assert np.bincount(data.test.y).tolist()[:2] == [980, 1135]
    assert 30 < float(data.train.x[:1000].mean()) < 36
