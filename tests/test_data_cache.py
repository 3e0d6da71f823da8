"""Caches: whole or not at all, and a damaged one is noticed."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from metalstm.data.cache import (
    Split,
    cache_folder,
    cached,
    cached_dataset,
    fingerprint,
)

ARRAYS = {"a": np.arange(5000, dtype=np.uint8).reshape(50, 100), "b": np.array("text")}


def build(calls: list):
    def make():
        calls.append(1)
        return ARRAYS

    return make


def check(arrays):
    assert set(arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_a_cache_is_built_once_and_leaves_nothing_else(tmp_path):
    calls: list = []
    path = tmp_path / "deep" / "x.npz"
    for _ in range(3):
        check(cached(path, build(calls)))
    assert len(calls) == 1
    assert os.listdir(path.parent) == ["x.npz"]


@pytest.mark.parametrize(
    "damage", ["truncated", "flipped", "empty", "garbage", "encrypted"]
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(tmp_path, damage):
    calls: list = []
    path = tmp_path / "x.npz"
    cached(path, build(calls))
    whole = path.read_bytes()
    directory = whole.index(b"PK\1\2")
    middle = len(whole) // 2  # inside the data of "a"
    path.write_bytes(
        {
            "truncated": whole[:middle],
            "flipped": whole[:middle]
            + bytes([whole[middle] ^ 1])
            + whole[middle + 1 :],
            "empty": b"",
            # a flag of the first entry in the zip's directory
            "encrypted": whole[: directory + 8] + b"\1" + whole[directory + 9 :],
            "garbage": b"not a zip at all",
        }[damage]
    )
    with pytest.warns(RuntimeWarning, match=r"x\.npz is damaged .*building it again"):
        check(cached(path, build(calls)))
    assert len(calls) == 2
    check(cached(path, build(calls)))
    assert len(calls) == 2


def test_a_writer_that_dies_leaves_no_file_under_the_name(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            cached(path, build([]))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    old, new, other = (
        tmp_path / f".part-{name}" for name in
        ("01234567-x.npz", "89abcdef-x.npz", "01234567-other-x.npz")
    )  # fmt: skip
    past = time.time() - 7200
    for left in (old, new, other):
        left.write_bytes(b"half")
        if left != new:
            os.utime(left, (past, past))
    cached(tmp_path / "x.npz", build([]))
    assert set(os.listdir(tmp_path)) == {new.name, other.name, "x.npz"}


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot write cache .*METALSTM_CACHE_DIR"):
        check(cached(tmp_path / "file" / "x.npz", build([])))


def test_cache_folder_asks_the_argument_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("METALSTM_CACHE_DIR", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("~/here") == Path.home() / "here"
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("METALSTM_CACHE_DIR")
    assert cache_folder() == tmp_path / "xdg" / "metalstm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == Path.home() / ".cache" / "metalstm"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "metalstm"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    assert cache_folder() == tmp_path / "metalstm" / "Cache"


def test_fingerprint_separates_its_parts():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])
    assert fingerprint([1, 2]) == fingerprint([1, 2])
    assert len(fingerprint([])) == 12


@pytest.mark.filterwarnings("ignore:all images of:RuntimeWarning")
def test_a_data_set_comes_back_from_its_cache_as_it_was(tmp_path):
    calls = []

    def splits():
        calls.append(1)
        made = {}
        for i, name in enumerate(("train", "validation", "test"), 1):
            images = np.full((i * 4, 2, 3, 1), i, np.uint8)
            groups = np.tile(np.arange(4, dtype=np.int32), (i, 1))
            counts = np.full(i, 4, np.int32)
            names = tuple(f"{name} {k}" for k in range(i))
            made[name] = Split(images, counts, names, groups if i == 2 else None)
        return made, {"rotations": False}

    first, second = (
        cached_dataset("toy", tmp_path / "toy.npz", splits) for _ in range(2)
    )
    assert len(calls) == 1
    assert first.name == second.name == "toy"
    assert first.image_shape == second.image_shape == (2, 3, 1)
    assert first.checksum == second.checksum
    assert len(first.checksum) == 16
    assert first.info == second.info == {"rotations": False}
    assert first.class_names == second.class_names
    assert second.class_names["test"] == ("test 0", "test 1", "test 2")
    for pool in ("train", "validation", "test"):
        a, b = first.pool(pool), second.pool(pool)
        np.testing.assert_array_equal(a.images, b.images)
        assert a.counts.tolist() == b.counts.tolist() == [4] * a.num_classes
    assert second.train.groups is None
    assert second.validation.groups.shape == (2, 4)
