"""Images to vectors once: what comes out, what is cached, what is refused."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from metalstm import data
from metalstm.data.cache import Split, assemble
from metalstm.data.pools import SPLITS

RNG = np.random.default_rng(0)
RAGGED = [RNG.integers(0, 255, (n, 4, 4, 1), np.uint8) for n in (5, 2, 4)]
POOL = data.make_pool(RAGGED, groups=np.tile(np.arange(5) % 2, (3, 1)))
WEIGHTS = RNG.normal(size=(16, 6)).astype(np.float32)


class Backbone:
    """Counts its calls; ``scale`` makes it another function."""

    def __init__(self, scale: float = 1.0):
        self.scale, self.shapes = scale, []

    def __call__(self, images):
        self.shapes.append(images.shape)
        assert images.dtype == np.float32
        assert images.max() <= 1
        return self.scale * 1000 * images.reshape(len(images), -1) @ WEIGHTS


def expected(images) -> np.ndarray:
    return 1000 * (images.reshape(len(images), -1) / 255) @ WEIGHTS


def test_a_pool_of_vectors_keeps_classes_and_numbers(tmp_path):
    backbone = Backbone()
    pool = data.embed(backbone, POOL, batch_size=4)
    assert pool.images.shape == (11, 6)
    assert pool.images.dtype == jnp.float32
    np.testing.assert_array_equal(pool.counts, POOL.counts)
    np.testing.assert_array_equal(pool.groups, POOL.groups)
    for index, images in enumerate(RAGGED):
        vectors = pool.of_class(index)
        np.testing.assert_allclose(vectors, expected(images), rtol=1e-4, atol=1e-2)
    # 11 images, in three calls and one to see that it repeats
    assert backbone.shapes == [(4, 4, 4, 1)] * 4
    array = data.embed(backbone, RAGGED[0], batch_size=64)
    np.testing.assert_allclose(array, pool.of_class(0), rtol=1e-4, atol=1e-2)
    floats = data.embed(backbone, RAGGED[0].astype(np.float32) / 255)
    np.testing.assert_allclose(floats, array, rtol=1e-4, atol=1e-2)


def test_a_data_set_is_embedded_split_by_split(tmp_path):
    split = Split(*map(np.asarray, (POOL.images, POOL.counts)), ("a", "b", "c"))
    images = assemble("drawings", dict.fromkeys(SPLITS, split), {"split": "all"})
    features = data.embed(Backbone(), images, name="count", cache_dir=tmp_path)
    assert features.class_names == images.class_names
    assert features.image_shape == (6,)
    assert features.checksum != images.checksum == features.info["images_checksum"]
    assert features.info["backbone"] == "count"
    data.validate(data.EpisodeSpec(2, 1, 1), features)
    with pytest.raises(ValueError, match="class 'b' of drawings's train split has 2"):
        data.validate(data.EpisodeSpec(2, 1, 2), features)


def test_what_is_cached_is_computed_once_and_never_stale(tmp_path):
    first = Backbone()
    options = {"name": "net/1 of ours", "cache_dir": tmp_path, "batch_size": 2}
    pool = data.embed(first, POOL, **options)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("features-net-1-of-ours-")
    again = Backbone()
    np.testing.assert_array_equal(
        data.embed(again, POOL, **options).images, pool.images
    )
    assert len(first.shapes) == 7
    assert len(again.shapes) == 1
    with pytest.raises(ValueError, match=r"name='net/1 of ours' in .* another"):
        data.embed(Backbone(1.1), POOL, **options)
    # rounding of another machine is not another function
    data.embed(Backbone(1.001), POOL, **options)
    other = data.make_pool([*RAGGED[:2], RAGGED[2][::-1]])
    changed = data.embed(Backbone(1.1), other, **options)
    np.testing.assert_allclose(changed.of_class(0), 1.1 * pool.of_class(0), rtol=1e-4)
    data.embed(Backbone(1.1), POOL, **(options | {"name": "net 2"}))
    assert len(list(tmp_path.iterdir())) == 3
    # a damaged file is computed again
    file.write_bytes(file.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="damaged"):
        restored = data.embed(Backbone(), POOL, **options)
    np.testing.assert_array_equal(restored.images, pool.images)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda x: x, r"fn returned shape \[8, 4, 4, 1\] for 8 images: return vectors"),
        (lambda x: x.reshape(-1, 16)[:3], r"shape \[3, 16\] for 8 images"),
        (lambda x: np.log(0 * x.reshape(-1, 16)), "128 numbers that are not finite"),
        (lambda x: x.reshape(-1, 16) - x.mean(), "batch norm to stored averages"),
        (lambda x: x.reshape(-1, 16) * (RNG.random(16) > 0.5), "switch its dropout"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_function_of_another_kind_is_refused_and_leaves_no_cache(
    fn, message, tmp_path
):
    options = {"name": "f", "cache_dir": tmp_path, "batch_size": 8}
    with pytest.raises(ValueError, match=message):
        data.embed(fn, POOL, **options)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="batch_size=0: choose 1 or more"):
        data.embed(Backbone(), POOL, batch_size=0)
    with pytest.raises(ValueError, match=r"data has shape \[0, 4, 4, 1\]: give"):
        data.embed(Backbone(), RAGGED[0][:0])


def test_the_bar_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    data.embed(Backbone(), RAGGED[0])
    data.embed(Backbone(), RAGGED[0], progress=False)
