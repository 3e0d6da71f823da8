"""Augmentations: what each promises, and that they are static and pure."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metalstm.data import augment
from metalstm.data.episodes import EpisodeSpec, sample_episode
from metalstm.data.pools import make_pool

IMAGES = np.random.default_rng(0).uniform(size=(64, 6, 8, 3)).astype(np.float32)
KEY = jax.random.key(0)

TABLE = {
    "shift": partial(augment.shift, 2),
    "flip": augment.flip,
    "crop": augment.crop,
    "jitter": augment.jitter,
    "crop_flip": augment.crop_flip,
    "crop_flip_jitter": augment.crop_flip_jitter,
}


@pytest.mark.parametrize("make", TABLE.values(), ids=TABLE)
def test_every_augmentation_keeps_shape_and_range_and_depends_on_the_key(make):
    apply = make()
    assert make() is apply  # so an EpisodeSpec made twice compiles once
    jitted = jax.jit(apply)
    out = jitted(KEY, IMAGES)
    assert out.shape == IMAGES.shape
    assert out.dtype == jnp.float32
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    np.testing.assert_array_equal(out, jitted(KEY, IMAGES))
    assert not np.array_equal(out, jitted(jax.random.key(1), IMAGES))
    # Alike images come out unlike: every image has its own draw.
    same = jitted(KEY, np.repeat(IMAGES[:1], 64, 0))
    assert len(np.unique(np.asarray(same).reshape(64, -1).round(4), axis=0)) > 1


def test_shift_moves_by_whole_pixels_and_fills_with_zero():
    marked = np.zeros((256, 7, 7, 1), np.float32)
    marked[:, 3, 3] = 1
    out = np.asarray(augment.shift(2)(KEY, marked))[..., 0]
    assert np.all(out.sum((1, 2)) == 1)
    places = np.argwhere(out)[:, 1:] - 3
    assert {tuple(p) for p in places} == {
        (a, b) for a in range(-2, 3) for b in range(-2, 3)
    }
    ones = np.asarray(augment.shift(2)(KEY, np.ones((64, 7, 7, 1), np.float32)))
    assert set(np.unique(ones)) == {0.0, 1.0}


def test_flip_mirrors_about_half():
    out = np.asarray(augment.flip()(KEY, IMAGES))
    mirrored = np.all(out == IMAGES[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(out == IMAGES, axis=(1, 2, 3))
    assert np.all(mirrored ^ kept)
    assert 16 < mirrored.sum() < 48


def test_crop_enlarges_a_box_of_the_stated_area():
    # A ramp stays a ramp under linear interpolation; its slope is the box's side.
    row = (np.arange(32) + 0.5) / 32
    ramp = np.broadcast_to(row[:, None, None] * [1, 0], (256, 32, 32, 2)).copy()
    ramp[..., 1] = row[None, None, :]
    out = np.asarray(jax.jit(augment.crop(0.5, 1.3))(KEY, ramp.astype(np.float32)))
    inner = out[:, 4:-4, 4:-4]
    tall = np.diff(inner[..., 0], axis=1).mean((1, 2)) * 32
    wide = np.diff(inner[..., 1], axis=2).mean((1, 2)) * 32
    area = tall * wide
    assert area.min() > 0.5 * 0.97
    assert area.max() <= 1.001
    assert area.max() - area.min() > 0.4
    assert np.abs(np.log(tall / wide)).max() < np.log(1.3) + 0.01
    assert np.abs(np.log(tall / wide)).max() > 0.8 * np.log(1.3)
    uncropped = jax.jit(augment.crop(1.0, 1.0))(KEY, IMAGES)
    np.testing.assert_allclose(uncropped, IMAGES, atol=1e-5)


def test_jitter_scales_each_property_alone():
    flat = np.full((200, 2, 2, 3), 0.5, np.float32)
    bright = np.asarray(augment.jitter(0.4, 0, 0)(KEY, flat))
    assert 0.3 <= bright.min() < 0.35
    assert 0.65 < bright.max() <= 0.7
    np.testing.assert_allclose(augment.jitter(0, 0.4, 0.4)(KEY, flat), flat, atol=1e-6)
    grey = np.repeat(IMAGES[..., :1], 3, -1)
    np.testing.assert_allclose(augment.jitter(0, 0, 1.0)(KEY, grey), grey, atol=1e-5)
    assert not np.allclose(augment.jitter(0, 0, 1.0)(KEY, IMAGES), IMAGES, atol=1e-2)
    assert not np.allclose(augment.jitter(0, 0.4, 0)(KEY, grey), grey, atol=1e-2)


def test_compose_runs_in_order_with_keys_of_their_own():
    seen = []

    def note(name, key, images):
        seen.append((name, tuple(np.asarray(jax.random.key_data(key)))))
        return images + (1 if name == "a" else images)

    both = augment.compose(partial(note, "a"), partial(note, "b"))
    np.testing.assert_allclose(both(KEY, IMAGES), 2 * (IMAGES + 1), rtol=1e-6)
    assert [name for name, _ in seen] == ["a", "b"]
    assert seen[0][1] != seen[1][1]


def test_an_augmented_episode_differs_from_the_plain_one_in_its_images_alone():
    pool = make_pool(
        np.random.default_rng(0).integers(0, 256, (4, 5, 8, 8, 1), np.uint8)
    )
    key = jax.random.key(3)
    plain = sample_episode(key, pool, EpisodeSpec(3, 1, 2))
    changed = sample_episode(key, pool, EpisodeSpec(3, 1, 2, augment=augment.shift(1)))
    np.testing.assert_array_equal(plain.query.y, changed.query.y)
    assert not np.array_equal(plain.query.x, changed.query.x)
    assert not np.array_equal(plain.support.x, changed.support.x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.shift(0), "pixels=0: choose 1 or more"),
        (lambda: augment.crop(0.0), r"min_area=0.0: choose a number in \(0, 1\]"),
        (lambda: augment.crop(0.5, 0.9), "max_stretch=0.9: choose 1 or more"),
        (
            lambda: augment.jitter(contrast=1.5),
            r"contrast=1.5: choose a number in \[0, 1\]",
        ),
    ],
)
def test_amounts_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
