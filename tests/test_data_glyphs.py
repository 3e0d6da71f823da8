"""The letters: no look-alikes, no script in two splits, no face in both sets."""

import unicodedata
from itertools import chain

import jax
import numpy as np
import pytest

from metalstm.data.episodes import EpisodeSpec, sample_episode, validate
from metalstm.data.pools import SPLITS
from metalstm.data.sources import glyphs

draw = jax.jit(sample_episode, static_argnames="spec")


@pytest.fixture(scope="module")
def letters():
    return glyphs.load_glyphs()  # rendered on a machine's first run, then cached


@pytest.fixture(scope="module")
def codes(letters):
    return {split: [ord(n[0]) for n in letters.class_names[split]] for split in SPLITS}


def test_there_are_enough_classes_of_forty_images(letters):
    sizes = [letters.pool(split).num_classes for split in SPLITS]
    assert sizes[0] > 600
    assert sizes[1] > 80
    assert sizes[2] > 130
    for split in SPLITS:
        pool = letters.pool(split)
        assert pool.images.shape == (40 * pool.num_classes, 28, 28, 1)
        assert np.all(np.asarray(pool.counts) == 40)
        assert len(letters.class_names[split]) == pool.num_classes
    assert letters.image_shape == (28, 28, 1)
    assert letters.info["merged"] > 1000


def test_no_script_is_in_two_splits_and_accents_are_gone(letters, codes):
    every = [*chain(*codes.values())]
    assert len(set(every)) == len(every)
    for split, scripts in glyphs.SCRIPTS.items():
        assert all(unicodedata.name(chr(c)).startswith(scripts) for c in codes[split])
        assert not any(
            unicodedata.name(chr(c), "").startswith(scripts) for c in codes["train"]
        )
    bases = {c: ord(unicodedata.normalize("NFKD", chr(c))[0]) for c in every}
    assert not [c for c in every if bases[c] != c and bases[c] in every]


@pytest.mark.parametrize("family", ["AΑАᎪ", "oOοОоօ೦", "ʌɅΛ", "HНΗ", "sS", "xХX"])
def test_look_alikes_are_one_class(codes, family):
    every = [*chain(*codes.values())]
    assert len({ord(letter) for letter in family} & set(every)) <= 1


def test_letters_of_other_shapes_are_all_there(codes):
    assert {ord(c) for c in "ABbdpqRrЖЯ"} <= set(codes["train"])


def test_pictures_are_ink_on_black_and_differ_within_a_class(letters):
    images = np.asarray(letters.train.images).reshape(-1, 40, 28, 28, 1)
    assert 0.08 < images.mean() / 255 < 0.2
    assert images.max((1, 2, 3, 4)).min() > 200
    ink = images.astype(np.float32).mean((2, 3, 4)) / 255
    assert ink.min() > 0.005
    assert ink.max() < 0.6
    assert images[..., 0, :, 0].mean() < 2  # next to nothing touches the border
    first = images[:100].reshape(100, 40, -1)
    assert all(len(np.unique(of_class, axis=0)) == 40 for of_class in first)


def test_a_class_is_recognised_across_faces_far_above_chance(letters):
    spec = EpisodeSpec(way=5, shot=1)
    scores = []
    for seed in range(60):
        support, query = draw(jax.random.key(seed), letters.test, spec)
        s, q = (np.asarray(b.x).reshape(len(b.x), -1) for b in (support, query))
        nearest = ((q[:, None] - s[None]) ** 2).sum(-1).argmin(1)
        scores.append((np.asarray(support.y)[nearest] == np.asarray(query.y)).mean())
    assert 0.4 < np.mean(scores) < 0.85  # learnable, and not done by pixels


def test_support_and_query_come_from_different_faces(letters):
    pool = letters.validation
    groups = np.asarray(pool.groups)
    num_faces = groups.max(1) + 1
    assert num_faces.min() >= 4
    assert num_faces.max() <= len(glyphs.FACES)
    sizes = np.stack([np.bincount(g, minlength=16) for g in groups])
    assert sizes[sizes > 0].min() >= 2
    flat = np.asarray(pool.images).reshape(-1, 28 * 28)
    where = {image.tobytes(): divmod(i, 40) for i, image in enumerate(flat)}
    for seed in range(20):
        episode = draw(jax.random.key(seed), pool, EpisodeSpec(5, 5))
        faces = []
        for batch in episode:
            images = np.rint(np.asarray(batch.x) * 255).astype(np.uint8)
            found = [where[image.tobytes()] for image in images]
            faces.append({(c, groups[c, m]) for c, m in found})
        assert not faces[0] & faces[1]


def test_rotations_and_too_many_images_are_refused(letters):
    validate(EpisodeSpec(20, 5), letters, "test")
    with pytest.raises(ValueError, match="turned class of glyphs can be another"):
        validate(EpisodeSpec(5, 1, rotations=True), letters)
    with pytest.raises(ValueError, match="queries=30: half the groups of class"):
        validate(EpisodeSpec(5, 1, queries=30), letters)


def test_drawing_is_a_pure_function_of_the_seed(letters, codes):
    fonts = [glyphs._font_folder() / f"{face}.ttf" for face in glyphs.FACES]
    wanted = codes["test"][0]
    letter = next(x for x in glyphs._bitmaps(fonts) if x.code == wanted)
    noise = glyphs._noise_fields(np.random.RandomState(0))
    drawn = glyphs._draw(letter, 0, noise)
    np.testing.assert_array_equal(drawn, np.asarray(letters.test.of_class(0)))
    assert not np.array_equal(drawn, glyphs._draw(letter, 1, noise))


def test_faces_with_private_encodings_are_left_out():
    assert all(face.startswith(("DejaVu", "STIXGeneral")) for face in glyphs.FACES)
    folder = glyphs._font_folder()
    assert all((folder / f"{face}.ttf").exists() for face in glyphs.FACES)


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'metalstm\[experiments\]'"):
        glyphs.load_glyphs()
