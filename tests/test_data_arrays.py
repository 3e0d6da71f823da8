"""Labelled arrays from a .npz: whole, divided by label, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest

from metalstm import data


def speakers(people: int = 10, each: int = 4, seed: int = 0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (people * each, 6, 5), np.uint8)
    y = np.array([f"speaker {k % people}" for k in range(people * each)])
    return x, y


@pytest.fixture
def path(tmp_path):
    x, y = speakers()
    np.savez(tmp_path / "speakers.npz", x=x, y=y)
    return tmp_path / "speakers.npz"


def test_nobody_is_in_two_splits_and_nothing_is_lost(path):
    x, y = speakers()
    found = data.load_arrays(path)
    assert (found.name, found.image_shape) == ("speakers", (6, 5, 1))
    sizes = [found.pool(split).num_classes for split in data.SPLITS]
    assert sizes == [6, 2, 2]
    names = [name for split in data.SPLITS for name in found.class_names[split]]
    assert sorted(names) == sorted(set(y))
    for split in data.SPLITS:
        pool = found.pool(split)
        for index, name in enumerate(found.class_names[split]):
            np.testing.assert_array_equal(pool.images[index, ..., 0], x[y == name])
    other = data.load_arrays(path, seed=1)
    assert other.class_names != found.class_names
    assert data.load_arrays(path).checksum == found.checksum
    data.validate(data.EpisodeSpec(way=2, shot=1, queries=3), found, "test")


def test_labels_of_unequal_number_are_padded(tmp_path):
    x, _ = speakers()
    y = np.repeat(np.arange(5), [2, 3, 5, 10, 20])
    np.savez(tmp_path / "a.npz", x=x, y=y)
    found = data.load_arrays(tmp_path / "a.npz")
    counts = {
        name: int(count)
        for split in data.SPLITS
        for name, count in zip(
            found.class_names[split], found.pool(split).counts, strict=True
        )
    }
    assert counts == {"0": 2, "1": 3, "2": 5, "3": 10, "4": 20}


def test_floats_are_kept_in_256_levels_and_channels_as_they_are(tmp_path):
    x = np.linspace(0, 1, 2 * 3 * 4 * 2, dtype=np.float32).reshape(2, 3, 4, 2)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=[1, 1])
    found, labels = data.read_arrays(tmp_path / "a.npz")
    assert found.shape == x.shape
    np.testing.assert_allclose(found / 255, x, atol=0.5 / 255 + 1e-6)
    np.testing.assert_array_equal(labels, [1, 1])
    np.savez(tmp_path / "b.npz", x=x.astype(np.float16), y=[1, 1])
    assert np.abs(data.read_arrays(tmp_path / "b.npz")[0].astype(int) - found).max() < 2


X, Y = speakers(3, 2)
BAD = np.where(np.arange(30).reshape(1, 6, 5) == 7, np.nan, 0.5).repeat(6, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"bad.npz holds no arrays x and y: write it with np.savez"),
        ({"x": X, "y": Y[:3]}, r"y of .* is <U9 \[3\]: give an integer or a string"),
        ({"x": X, "y": np.zeros(6)}, r"y of .* is float64 \[6\]: give an integer"),
        ({"x": X[0], "y": Y}, r"x of .* has the shape \[6, 5\]: give \[N, H, W\] or"),
        ({"x": X[:0], "y": Y[:0]}, r"has the shape \[0, 6, 5\]"),
        ({"x": X.astype(np.int32), "y": Y}, r"is int32: give uint8, or floats in"),
        (
            {"x": X / 100, "y": Y},
            r"is float64 from .* to 2\.\d+: give uint8, or floats",
        ),
        ({"x": X - 1.0, "y": Y}, r"is float64 from -1 to .*scaled the same way"),
        ({"x": BAD, "y": Y}, r"is float64 from nan to nan: give uint8"),
        ({"x": X, "y": Y.astype(object)}, r"bad.npz cannot be read \(Object arrays"),
        ({"x": X, "y": np.arange(6)}, r"label 0 of .* has 1 examples, at least 2"),
        ({"x": X[:4], "y": np.array(list("aabb"))}, r"2 classes cannot be divided"),
    ],
)
def test_what_is_no_set_of_labelled_arrays_is_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        data.load_arrays(tmp_path / "bad.npz")


def test_what_is_no_npz_is_refused(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none.npz; give a .npz"):
        data.load_arrays(tmp_path / "none.npz")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 3] ^= 255
    alone = io.BytesIO()
    np.save(alone, np.zeros(3))
    for content in (b"text", whole[: len(whole) // 2], bytes(damaged)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"speakers.npz cannot be read"):
            data.load_arrays(path)
    path.write_bytes(alone.getvalue())
    with pytest.raises(ValueError, match=r"speakers.npz holds no arrays x and y"):
        data.load_arrays(path)
