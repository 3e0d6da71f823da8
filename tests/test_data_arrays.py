"""Labelled arrays from a .npz: whole, divided by label, and what is refused."""

from __future__ import annotations

import io

import jax
import jax.numpy as jnp
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
            np.testing.assert_array_equal(pool.of_class(index)[..., 0], x[y == name])
    other = data.load_arrays(path, seed=1)
    assert other.class_names != found.class_names
    assert data.load_arrays(path).checksum == found.checksum
    data.validate(data.EpisodeSpec(way=2, shot=1, queries=3), found, "test")


def test_labels_of_unequal_number_keep_their_examples_and_type(tmp_path):
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
    assert counts == {0: 2, 1: 3, 2: 5, 3: 10, 4: 20}
    assert all(type(name) is int for name in counts)


@pytest.mark.parametrize(
    "x",
    [
        np.random.default_rng(0).normal(50, 100, (30, 7)),  # embeddings
        np.random.default_rng(1).normal(size=(30, 9, 2)).astype(np.float32),  # series
        np.linspace(0, 1, 30 * 6, dtype=np.float16).reshape(30, 3, 2),  # spectrograms
        np.arange(30 * 4).reshape(30, 4) * 1000,  # token ids
    ],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
@pytest.mark.parametrize("folder", [False, True])
def test_what_is_no_byte_comes_as_it_is(tmp_path, x, folder):
    y = np.arange(30) % 6
    path = tmp_path / ("folder" if folder else "a.npz")
    if folder:
        for index, (example, label) in enumerate(zip(x, y, strict=True)):
            (path / f"c{label}").mkdir(parents=True, exist_ok=True)
            np.save(path / f"c{label}" / f"{index:02d}.npy", example)
    else:
        np.savez_compressed(path, x=x, y=y)
        np.testing.assert_array_equal(data.read_arrays(path)[0], x)
    found = data.load_arrays(path)
    assert found.image_shape == x.shape[1:]
    expected = jnp.asarray(x)
    for split in data.SPLITS:
        pool = found.pool(split)
        assert pool.images.dtype == expected.dtype
        for index, name in enumerate(found.class_names[split]):
            label = int(str(name).removeprefix("c"))
            np.testing.assert_array_equal(pool.of_class(index), expected[y == label])
    spec = data.EpisodeSpec(way=2, shot=2, queries=1)
    episode = data.sample_episode(jax.random.key(0), found.train, spec)
    assert episode.support.x.dtype == expected.dtype
    rows = {example.tobytes() for example in np.asarray(expected)}
    assert {example.tobytes() for example in np.asarray(episode.support.x)} <= rows


def test_arrays_of_a_folder_are_of_one_shape_and_others_are_counted(tmp_path):
    for k in range(6):
        (tmp_path / f"c{k % 3}").mkdir(exist_ok=True)
        np.save(tmp_path / f"c{k % 3}" / f"{k}.npy", np.full(4, k / 7))
    (tmp_path / "c0" / "note.txt").write_text("a note")
    with pytest.warns(RuntimeWarning, match="1 files in .* are not read: c0/note.txt"):
        found = data.load_arrays(tmp_path)
    assert found.info["omitted"] == 1
    np.save(tmp_path / "c1" / "9.npy", np.zeros(5))
    (tmp_path / "c0" / "note.txt").unlink()
    with pytest.raises(
        ValueError, match=r"9.npy is float64 \[5\] and .*: give all one"
    ):
        data.load_arrays(tmp_path)
    (tmp_path / "c1" / "9.npy").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"9.npy cannot be read .*np.save"):
        data.load_arrays(tmp_path)


X, Y = speakers(3, 2)
BAD = np.where(np.arange(30).reshape(1, 6, 5) == 7, np.nan, 0.5).repeat(6, 0)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, r"bad.npz holds no arrays x and y: write it with np.savez"),
        ({"x": X, "y": Y[:3]}, r"y of .* is <U9 \[3\]: give an integer or a string"),
        ({"x": X, "y": np.zeros(6)}, r"y of .* is float64 \[6\]: give an integer"),
        ({"x": X[0], "y": Y}, r"x of .* has the shape \[6, 5\]: give images \[N, H"),
        ({"x": X[:0], "y": Y[:0]}, r"has the shape \[0, 6, 5\]"),
        ({"x": X > 0, "y": Y}, "x of .* is bool: give bytes, floats or integers"),
        ({"x": BAD, "y": Y}, "x of .* has 6 numbers that are not finite: replace"),
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
