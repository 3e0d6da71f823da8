"""TFDS sets: one prepared here without TensorFlow, and every way to be missing."""

import importlib.util
import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from metalstm.data.pools import SPLITS
from metalstm.data.sources.tfds import load_tfds, open_builder


class ToyShapes(tfds.core.GeneratorBasedBuilder):
    """Seven classes of unequal size in two splits; a pixel's value names its image."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(6, 6, 1)),
                    "kind": tfds.features.ClassLabel(names=[f"k{i}" for i in range(7)]),
                    "number": np.int64,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(0, 3),
            "test": self._generate_examples(3, 5),
        }

    def _generate_examples(self, start, stop):
        for kind in range(7):
            for m in range(start, stop + (kind == 2 and stop == 5)):
                # As a PNG file: encoding an array is where TFDS needs TensorFlow.
                image = io.BytesIO()
                Image.new("L", (6, 6), 10 * kind + m).save(image, "png")
                image.seek(0)
                yield (
                    f"{kind}-{m}",
                    {"picture": image, "kind": kind, "number": m},
                )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = ToyShapes(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder


def load(folder, tmp_path, **arguments):
    keys = {"image_key": "picture", "label_key": "kind"} | arguments
    return load_tfds("toy_shapes", folder, cache_dir=tmp_path, **keys)


def test_images_of_all_splits_are_regrouped_by_class(folder, tmp_path):
    dataset = load(folder, tmp_path)
    assert sorted(n for s in SPLITS for n in dataset.class_names[s]) == [
        f"k{i}" for i in range(7)
    ]
    assert [dataset.pool(s).num_classes for s in SPLITS] == [5, 1, 1]
    for split in SPLITS:
        pool = dataset.pool(split)
        for row, name in enumerate(dataset.class_names[split]):
            kind = int(name[1:])
            count = 6 if kind == 2 else 5
            assert pool.counts[row] == count
            seen = {int(v) for v in np.asarray(pool.of_class(row)).ravel()}
            assert seen == {10 * kind + m for m in range(count)}
    again = load(folder, tmp_path)
    assert again.checksum == dataset.checksum
    assert len(os.listdir(tmp_path)) == 1


def test_splits_size_and_number_of_images_are_the_users(folder, tmp_path):
    splits = {"train": ["k0", "k6"], "validation": ["k2"], "test": ["k1", "k3"]}
    dataset = load(folder, tmp_path, splits=splits, image_size=3, max_per_class=2)
    assert dataset.class_names == {k: tuple(v) for k, v in splits.items()}
    assert dataset.train.images.shape == (2 * 2, 3, 3, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_key": "image"}, "image_key='image': the features of toy_shapes are"),
        ({"label_key": "number"}, "label_key='number' of toy_shapes is not a class"),
        (
            {"splits": {"train": ["k0"], "validation": ["k1"], "test": ["k9"]}},
            "splits names k9, which are not classes of toy_shapes; those begin with k0",
        ),
        (
            {"splits": {"train": ["k0"], "validation": ["k1"], "test": ["k0"]}},
            "class 'k0' is in train and in test",
        ),
    ],
)
def test_features_and_classes_that_are_not_there_are_refused(
    folder, tmp_path, arguments, message
):
    with pytest.raises(ValueError, match=message):
        load(folder, tmp_path, **arguments)


class FakeBuilder:
    """As much of a builder as is read, with examples of choice."""

    def __init__(self, examples, names):
        labels = SimpleNamespace(names=names)
        self.examples = examples
        self.info = SimpleNamespace(
            full_name="fake/1.0.0",
            features={"image": None, "label": labels},
            splits={"train": SimpleNamespace(num_examples=len(examples))},
        )

    def as_data_source(self, split):
        return self.examples


@pytest.mark.filterwarnings("ignore:all images of:RuntimeWarning")
def test_images_of_several_sizes_need_a_size(tmp_path, monkeypatch):
    sizes = [4, 4, 5, 4]
    examples = [
        {"image": np.zeros((s, s, 3), np.uint8), "label": i % 3}
        for i, s in enumerate(sizes)
    ]
    fake = FakeBuilder(examples, ["a", "b", "c"])
    monkeypatch.setattr("metalstm.data.sources.tfds.open_builder", lambda *_: fake)
    with pytest.raises(
        ValueError, match=r"have several sizes, such as .*an image_size"
    ):
        load_tfds("fake", cache_dir=tmp_path)
    dataset = load_tfds("fake", cache_dir=tmp_path, image_size=2)
    assert dataset.image_shape == (2, 2, 3)


def test_a_split_without_images_is_refused(tmp_path, monkeypatch):
    examples = [{"image": np.zeros((2, 2, 1), np.uint8), "label": i} for i in range(2)]
    fake = FakeBuilder(examples, ["a", "b", "c"])
    monkeypatch.setattr("metalstm.data.sources.tfds.open_builder", lambda *_: fake)
    splits = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    with pytest.raises(ValueError, match="none of the classes c has an image"):
        load_tfds("fake", cache_dir=tmp_path, splits=splits)


def test_not_prepared_says_how_and_that_tensorflow_is_needed(tmp_path, monkeypatch):
    def pretend(there):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: object() if there else None
        )

    pretend(there=False)
    message = r"mnist is not prepared.*TensorFlow is not installed: pip install"
    with pytest.raises(FileNotFoundError, match=message):
        open_builder("mnist", tmp_path)
    pretend(there=True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    message = r"nothing at .*Prepare it with tfds.builder\('mnist'.*array_record"
    with pytest.raises(FileNotFoundError, match=message) as caught:
        open_builder("mnist")
    assert str(tmp_path) in str(caught.value)
    assert "not installed" not in str(caught.value)


def test_prepared_as_tfrecord_is_said(folder, tmp_path):
    whole = folder / "toy_shapes" / "1.0.0"
    other = tmp_path / "toy_shapes" / "1.0.0"
    other.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (whole / name).read_text()
        (other / name).write_text(text.replace("array_record", "tfrecord"))
    message = r"is prepared as tfrecord, which only TensorFlow reads. Prepare it again"
    with pytest.raises(ValueError, match=message):
        open_builder("toy_shapes", tmp_path)


def test_unknown_names_and_a_missing_tfds_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="TFDS knows no data set 'omniglott'"):
        open_builder("omniglott", tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'metalstm\[tfds\]'"):
        open_builder("mnist", tmp_path)


@pytest.mark.real_data
def test_real_mnist(real_data_dir, tmp_path, monkeypatch):
    """The first images of each split; `test_data_labelled` reads one split whole."""
    whole = open_builder("mnist", real_data_dir / "tensorflow_datasets")
    first = SimpleNamespace(
        info=whole.info,
        as_data_source=lambda split: whole.as_data_source(split=f"{split}[:2000]"),
    )
    monkeypatch.setattr("metalstm.data.sources.tfds.open_builder", lambda *_: first)
    dataset = load_tfds("mnist", cache_dir=tmp_path, max_per_class=100)
    assert sorted(n for s in SPLITS for n in dataset.class_names[s]) == list(
        "0123456789"
    )
    assert dataset.train.images.shape == (6 * 100, 28, 28, 1)
    assert dataset.test.num_classes == 2
    assert 0.08 < np.asarray(dataset.train.images).mean() / 255 < 0.2
