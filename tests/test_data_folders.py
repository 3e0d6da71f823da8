"""Image folders: splits, the published class lists, and every way to be wrong."""

import os
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from metalstm.data.episodes import EpisodeSpec, sample_episode, validate
from metalstm.data.images import fit, read_images
from metalstm.data.pools import SPLITS, Normalisation
from metalstm.data.sources import mini_imagenet
from metalstm.data.sources.folders import load_image_folders
from metalstm.data.sources.mini_imagenet import load_mini_imagenet
from metalstm.data.splits import check_disjoint, split_classes
from metalstm.inputs import ExampleArray
from metalstm.predictor import Predictor


def write(path: Path, colour=(200, 30, 60), size=(12, 12)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def tree(root: Path, num_classes: int = 6, num_images: int = 4) -> Path:
    for c in range(num_classes):
        for m in range(num_images):
            write(root / f"class{c}" / f"{m}.png", (20 * c, 60 * m, 255))
    return root


def mini_tree(root: Path, num_images: int = 1) -> Path:
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        for c, wnid in enumerate(mini_imagenet.CLASSES[split]):
            for m in range(num_images):
                write(root / folder / wnid / f"{m}.jpg", (c, 100, 10), (84, 84))
    return root


def load(root, tmp_path, **arguments):
    arguments.setdefault("image_size", 8)
    return load_image_folders(root, cache_dir=tmp_path / "cache", **arguments)


@pytest.mark.filterwarnings("ignore:1 files in:RuntimeWarning")
def test_classes_of_one_folder_are_divided_alike_every_time(tmp_path):
    root = tree(tmp_path / "mine", 10)
    (root / ".hidden").mkdir()
    (root / "class0" / "notes.txt").write_text("not an image")
    first, again = (load(root, tmp_path) for _ in range(2))
    assert first.class_names == again.class_names
    assert [len(first.class_names[s]) for s in SPLITS] == [6, 2, 2]
    every = [name for s in SPLITS for name in first.class_names[s]]
    assert sorted(every) == [f"class{c}" for c in range(10)]
    other = load(root, tmp_path, seed=1)
    assert other.class_names != first.class_names
    assert first.name == "mine"
    assert first.image_shape == (8, 8, 3)
    for split in SPLITS:
        pool = first.pool(split)
        for index, name in enumerate(first.class_names[split]):
            images = pool.of_class(index)
            colours = np.unique(np.asarray(images).reshape(-1, 3), axis=0)
            expected = [[20 * int(name[5:]), 60 * m, 255] for m in range(4)]
            assert colours.tolist() == sorted(expected)


def test_train_val_and_test_folders_are_the_splits(tmp_path):
    for folder, c in (("train", 0), ("valid", 1), ("test", 2)):
        for k in range(2):
            write(tmp_path / "x" / folder / f"c{c}{k}" / "a.JPEG")
            write(tmp_path / "x" / folder / f"c{c}{k}" / "b.png")
    dataset = load(tmp_path / "x", tmp_path)
    assert dataset.class_names == {
        "train": ("c00", "c01"),
        "validation": ("c10", "c11"),
        "test": ("c20", "c21"),
    }
    assert dataset.info == {"split": "folders", "skipped": 0}


def test_classes_of_unequal_size_are_sampled_within_their_counts(tmp_path):
    root = tree(tmp_path / "x", 6, 4)
    write(root / "class0" / "more.png", (0, 250, 255))
    dataset = load(root, tmp_path)
    counts = {
        name: int(n)
        for s in SPLITS
        for name, n in zip(dataset.class_names[s], dataset.pool(s).counts, strict=True)
    }
    assert counts == {"class0": 5, **{f"class{c}": 4 for c in range(1, 6)}}
    spec = EpisodeSpec(way=1, shot=2, queries=2)
    validate(spec, dataset, "train")
    x = sample_episode(jax.random.key(0), dataset.train, spec).support.x
    assert np.asarray(x)[..., 2].min() == 1  # padding is black


@pytest.mark.fault("images of several sizes")
@pytest.mark.filterwarnings("ignore:all images of:RuntimeWarning")
def test_sizes_are_mixed_turned_and_grey(tmp_path):
    root = tmp_path / "x"
    for c in range(3):
        for m in range(2):
            write(root / f"c{c}" / f"{m}.png")
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle square
    Image.fromarray(wide).save(root / "c0" / "0.png")
    turned = Image.fromarray(
        np.repeat([[[255], [255], [0], [0]]], 4, 0).astype("uint8")[..., 0]
    )
    exif = turned.getexif()
    exif[0x0112] = 6  # camera held sideways: to be turned clockwise by a quarter
    turned.save(root / "c0" / "1.png", exif=exif)
    Image.new("RGBA", (5, 5), (10, 20, 30, 0)).save(root / "c1" / "0.png")
    dataset = load(root, tmp_path, image_size=4, channels=3)
    split = next(s for s in SPLITS if "c0" in dataset.class_names[s])
    images = np.asarray(dataset.pool(split).of_class(0))
    assert images[0].min() == 255
    assert images[1, :2].min() == 255
    assert images[1, 2:].max() == 0
    grey = load(root, tmp_path, image_size=4, channels=1)
    assert grey.image_shape == (4, 4, 1)


def test_the_cache_notices_changed_files(tmp_path):
    root = tree(tmp_path / "x", 3, 2)
    before = load(root, tmp_path)
    assert len(os.listdir(tmp_path / "cache")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(root, tmp_path).checksum == before.checksum
    assert len(os.listdir(tmp_path / "cache")) == 1
    write(root / "class0" / "0.png", (1, 2, 3))
    assert load(root, tmp_path).checksum != before.checksum


@pytest.mark.fault("corrupt image files")
def test_a_corrupt_file_is_named_or_skipped_on_request(tmp_path):
    root = tree(tmp_path / "x", 4, 4)
    broken = root / "class2" / "2.png"
    broken.write_bytes(broken.read_bytes()[:45])
    with pytest.raises(
        ValueError, match=r"class2/2\.png cannot be decoded .*replace or"
    ):
        load(root, tmp_path)
    dataset = load(root, tmp_path, skip_corrupt=True)
    assert dataset.info["skipped"] == 1
    assert min(int(dataset.pool(s).counts.min()) for s in SPLITS) == 3
    with pytest.raises(ValueError, match="class 'class2' has 3 images, at least 4 are"):
        load(root, tmp_path, skip_corrupt=True, min_images=4)
    for path in (root / "class2").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'class2': none of its files can be"):
        load(root, tmp_path, skip_corrupt=True)


@pytest.mark.fault("empty classes")
def test_folders_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no folder .*nowhere; give one with a"
    ):
        load(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"no images in .*empty: expected a folder"
    ):
        load(tmp_path / "empty", tmp_path)
    with pytest.raises(ValueError, match="2 classes cannot be divided"):
        load(tree(tmp_path / "two", 2), tmp_path)
    few = tree(tmp_path / "few", 4)
    for path in list((few / "class3").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="class 'class3' has 1 images, at least 2"):
        load(few, tmp_path)
    with pytest.raises(ValueError, match="channels=4: choose 3"):
        load(few, tmp_path, channels=4)
    part = tree(tmp_path / "part" / "train").parent
    with pytest.raises(ValueError, match="folders for train but none for test, valid"):
        load(part, tmp_path)
    for folder in ("val", "test"):
        tree(part / folder)
    with pytest.raises(
        ValueError, match="class 'class0' is in train and in validation"
    ):
        load(part, tmp_path)


def test_split_classes_and_check_disjoint():
    names = [f"c{i}" for i in range(100)]
    division = split_classes(names)
    assert [len(division[s]) for s in SPLITS] == [64, 16, 20]
    assert split_classes(names[::-1]) == division  # the order given does not matter
    # Frozen: a library upgrade must not move a class from test to train.
    assert division["validation"][:4] == EXPECTED_VALIDATION
    assert [len(split_classes(names[:3])[s]) for s in SPLITS] == [1, 1, 1]
    assert [len(split_classes(names[:3], fractions=(1, 9, 9))[s]) for s in SPLITS] == [
        1,
        1,
        1,
    ]
    with pytest.raises(ValueError, match="all three must be above 0"):
        split_classes(names, fractions=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="give classes for each of train, validation"):
        check_disjoint({"train": ["a"], "test": ["b"]})


EXPECTED_VALIDATION = ("c21", "c26", "c27", "c35")


def test_fit_takes_the_middle_square():
    image = np.zeros((4, 8, 1), np.uint8)
    image[:, 2:6] = 200
    assert fit(image, 2).tolist() == np.full((2, 2, 1), 200).tolist()
    assert fit(image[:, :4], 4) is not None
    np.testing.assert_array_equal(fit(image[:, :4], 4), image[:, :4])


def test_mini_imagenet_is_read_in_the_published_split(tmp_path):
    root = mini_tree(tmp_path / "mini")
    cache = tmp_path / "cache"
    dataset = load_mini_imagenet(
        root, images_per_class=1, image_size=8, cache_dir=cache
    )
    assert [dataset.pool(s).num_classes for s in SPLITS] == [64, 16, 20]
    assert dataset.class_names == mini_imagenet.CLASSES
    np.testing.assert_allclose(dataset.train.of_class(7)[0, 0, 0], [7, 100, 10], atol=3)
    assert dataset.name == "mini-imagenet"


def test_mini_imagenet_that_is_not_the_published_one_is_refused(tmp_path):
    for missing in (None, tmp_path):
        with pytest.raises(
            FileNotFoundError, match=r"no mini-ImageNet at .*docs/data\.md"
        ):
            load_mini_imagenet(missing, cache_dir=tmp_path)
    root = mini_tree(tmp_path / "mini")
    with pytest.raises(
        ValueError, match=r"n01532829 at .*has 1 images, not 600; unpack"
    ):
        load_mini_imagenet(root, cache_dir=tmp_path)
    moved = mini_imagenet.CLASSES["test"][0]
    (root / "test" / moved).rename(root / "train" / moved)
    message = rf"the train classes at .*0 missing \(\), 1 not expected \({moved}\)"
    with pytest.raises(ValueError, match=message):
        load_mini_imagenet(root, images_per_class=1, cache_dir=tmp_path)


def test_without_pillow_the_extra_is_named(tmp_path, monkeypatch):
    root = tree(tmp_path / "x", 3, 2)
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'metalstm\[images\]'"):
        load(root, tmp_path)


@pytest.mark.real_data
def test_real_mini_imagenet(real_data_dir, tmp_path):
    """Every file is there; the first 20 of each class are decoded."""
    root, some = real_data_dir / "mini_imagenet", tmp_path / "some"
    for folder in root.glob("*/*/"):
        files = sorted(folder.iterdir())
        assert len(files) == 600, folder
        (some / folder.relative_to(root)).mkdir(parents=True)
        for file in files[:20]:
            (some / file.relative_to(root)).symlink_to(file)
    dataset = load_mini_imagenet(some, images_per_class=20, cache_dir=tmp_path)
    for split, num in (("train", 64), ("validation", 16), ("test", 20)):
        pool = dataset.pool(split)
        assert pool.images.shape == (num * 20, 84, 84, 3)
        assert np.all(np.asarray(pool.counts) == 20)
    mean = np.asarray(dataset.test.images).mean((0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.47, 0.45, 0.40], atol=0.03)
    validate(EpisodeSpec(5, 5), dataset, "test")
    path = root / "val" / dataset.class_names["validation"][3]
    first = np.asarray(Image.open(sorted(path.iterdir())[0]))
    np.testing.assert_array_equal(dataset.validation.of_class(3)[0], first)


def test_images_to_predict_are_prepared_as_training_did(tmp_path):
    root = tmp_path / "photos"
    for name, images in (("a", 3), ("b", 3), ("c", 3)):
        (root / name).mkdir(parents=True)
        for k in range(images):
            pixels = np.random.default_rng(k).integers(0, 256, (9 + k, 12, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    dataset = load(root, tmp_path)
    split = next(s for s in SPLITS if "a" in dataset.class_names[s])
    files = sorted((root / "a").iterdir())
    size, _, channels = dataset.image_shape
    found = read_images(files, image_size=size, channels=channels)
    index = dataset.class_names[split].index("a")
    np.testing.assert_array_equal(found, dataset.pool(split).of_class(index))
    statistics = Normalisation((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    spec = EpisodeSpec(1, 2, 1, normalise=statistics)
    episode = spec.sample(jax.random.key(0), dataset.pool(split))
    predict = Predictor(
        "x", None, (), None, ExampleArray(dataset.image_shape), statistics
    )
    prepared = np.asarray(predict.prepare(dataset.pool(split).images))
    rows = {x.tobytes() for x in prepared}
    drawn = np.concatenate([episode.support.x, episode.query.x])
    assert {x.tobytes() for x in drawn} <= rows
    files[0].write_bytes(b"text")
    with pytest.raises(ValueError, match=r"1 of 3 images cannot be decoded: .*0.png"):
        read_images(files, image_size=8)
