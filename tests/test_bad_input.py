"""Data that is not what it says: refused by name, or left out and counted."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from metalstm.algorithms.common import accuracy
from metalstm.data import EpisodeSpec, make_pool
from metalstm.data.images import as_bytes
from metalstm.data.sources import labelled
from metalstm.data.sources import tfds as tfds_source
from metalstm.data.sources.folders import load_image_folders

IMAGE = np.full((4, 4, 1), 7, np.uint8)


def builder(*labels: int, image: np.ndarray = IMAGE, names=("a", "b", "c")):
    """What is read of a TFDS builder; every split holds the same labels."""
    examples = [{"image": image, "label": label} for label in labels]
    features = {"image": None, "label": SimpleNamespace(names=list(names))}
    splits = {"train": SimpleNamespace(num_examples=len(examples))}
    info = SimpleNamespace(full_name="toy", features=features, splits=splits)
    return SimpleNamespace(info=info, as_data_source=lambda split: examples)


@pytest.fixture
def load(monkeypatch, tmp_path):
    """Load a fake builder grouped by class, or with its labels."""
    caches = (tmp_path / str(i) for i in itertools.count())

    def run(made, *, grouped=True, train=("a",)):
        monkeypatch.setattr(tfds_source, "open_builder", lambda *args: made)
        monkeypatch.setattr(labelled, "open_builder", lambda *args: made)
        if not grouped:
            return labelled.load_image_data("toy", cache_dir=next(caches))
        splits = {"train": train, "validation": ["b"], "test": ["c"]}
        return tfds_source.load_tfds("toy", splits=splits, cache_dir=next(caches))

    return run


@pytest.mark.fault("labels out of range, or none")
@pytest.mark.parametrize("grouped", [True, False])
def test_a_label_that_is_no_class_is_refused(load, grouped):
    with pytest.raises(
        ValueError, match=r"toy's train split has an image of label 3, outside \[0, 3\)"
    ):
        load(builder(0, 1, 2, 3), grouped=grouped)


@pytest.mark.fault("labels out of range, or none")
def test_images_without_a_label_are_counted_or_refused(load):
    made = builder(0, -1, 1, 2, -1)
    assert load(made).info == {"tfds": "toy", "unlabelled": 2}
    with pytest.raises(ValueError, match=r"label -1 \(TFDS's mark of an unlabelled"):
        load(made, grouped=False)
    with pytest.raises(ValueError, match="the train split of toy is empty: prepare"):
        load(builder(), grouped=False)


@pytest.mark.fault("empty classes")
def test_an_empty_class_stands_in_the_info(load):
    made = builder(0, 1, 2, names=("a", "b", "c", "d"))
    assert load(made).info == {"tfds": "toy"}  # d is not asked for
    more = load(made, train=["a", "d"])
    assert more.info == {"tfds": "toy", "empty_classes": ["d"]}
    assert more.class_names["train"] == ("a",)
    with pytest.raises(ValueError, match="none of the classes b has an image"):
        load(builder(0, 2, 2))


@pytest.mark.fault("NaN, Inf and values that are no bytes")
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.full((4, 4, 1), np.nan), "float64 .*16 of them NaN or infinite"),
        (np.full((4, 4, 1), 0.5, np.float32), r"float32 .*\(0.5 to 0.5\)"),
        (np.full((4, 4, 1), 256), r"\(256 to 256\): prepare it as uint8"),
        (np.full((4, 4, 1), "x"), "not numbers"),
    ],
)
def test_pixels_that_are_no_bytes_are_refused(load, image, message, grouped):
    with pytest.raises(ValueError, match=rf"toy has an image of .*{message}"):
        load(builder(0, 1, 2, image=image), grouped=grouped)


def test_whole_numbers_of_any_type_are_bytes():
    for dtype in (np.uint8, np.int64, np.float32):
        np.testing.assert_array_equal(as_bytes(IMAGE.astype(dtype), "x"), IMAGE)
    assert as_bytes(np.eye(2, dtype=bool), "x").tolist() == [[1, 0], [0, 1]]


@pytest.mark.fault("images of several sizes")
@pytest.mark.filterwarnings("ignore:all .* examples are the same")
def test_classes_of_other_image_sizes_are_not_stretched():
    classes = [np.zeros((2, 4, 4, 3), np.uint8), np.ones((2, 1, 4, 3), np.uint8)]
    with pytest.raises(ValueError, match=r"images\[1\] are of shape \[1, 4, 3\] and "):
        make_pool(classes)
    with pytest.raises(ValueError, match="class 1 has no example: omit it"):
        make_pool([classes[0], classes[0][:0]])


@pytest.mark.fault("NaN, Inf and values that are no bytes")
def test_statistics_that_are_not_finite_are_refused():
    for mean, std in ((float("nan"), 1.0), (0.0, float("nan")), (0.0, float("inf"))):
        with pytest.raises(ValueError, match="deviations, finite and the latter above"):
            EpisodeSpec(2, 1, normalise=((mean,), (std,)))


@pytest.mark.fault("NaN, Inf and values that are no bytes")
def test_a_query_without_an_answer_is_not_correct():
    scores = jnp.array([[1.0, 0.0], [jnp.nan, 0.0], [0.0, -jnp.inf], [0.0, jnp.nan]])
    assert accuracy(scores, jnp.array([0, 0, 0, 0])) == 0.5


@pytest.mark.fault("NaN, Inf and values that are no bytes")
def test_a_predictor_refuses_images_with_nan():
    from metalstm.inputs import ExampleArray
    from metalstm.predictor import Predictor

    predict = Predictor("maml", None, None, 2, ExampleArray((1, 1, 1)), None)
    x = np.array([0.0, np.nan]).reshape(2, 1, 1, 1)
    with pytest.raises(ValueError, match=r"images span nan to nan: give uint8, or"):
        predict(x, [0, 1], x)


# -- image files -----------------------------------------------------------------------


def tree(root: Path) -> Path:
    for c in range(4):
        (root / f"class{c}").mkdir(parents=True)
        for m in range(4):
            Image.new("RGB", (9, 9), (50 * c, 50 * m, 7)).save(
                root / f"class{c}" / f"{m}.png"
            )
    return root


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path)


def bomb(path: Path) -> None:
    """A picture whose header says 60,000 by 60,000 pixels."""
    import struct
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head
        + struct.pack(">I", zlib.crc32(head)) + struct.pack(">I", 0) + b"IEND\xaeB`\x82"
    )  # fmt: skip


CORRUPT = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "text": lambda path: path.write_text("<html>404</html>"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("gone.png")),
    "16 bits": sixteen_bits,
    "a bomb": bomb,
}


@pytest.mark.fault("corrupt image files")
@pytest.mark.parametrize("kind", CORRUPT)
def test_files_that_are_no_images_are_named_or_skipped(tmp_path, kind):
    root = tree(tmp_path / "x")
    CORRUPT[kind](root / "class2" / "2.png")
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=r"class2/2\.png cannot be decoded \(.+\); "):
        load_image_folders(root, image_size=8, cache_dir=cache)
    dataset = load_image_folders(root, image_size=8, cache_dir=cache, skip_corrupt=True)
    assert dataset.info["skipped"] == 1
    assert dataset.info["skipped_files"] == [str(root / "class2" / "2.png")]


@pytest.mark.fault("corrupt image files")
def test_all_corrupt_files_are_counted_and_the_first_named(tmp_path):
    root = tree(tmp_path / "x")
    for c in range(4):
        for m in range(3):
            (root / f"class{c}" / f"{m}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"and 11 more: .*png, \.\.; replace"):
        load_image_folders(root, image_size=8, cache_dir=tmp_path / "cache")
