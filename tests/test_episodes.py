"""The sampler's promises, on small pools whose images name their class and slot."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalstm.data.drawing import draw_distinct, to_integers
from metalstm.data.episodes import (
    EpisodeSpec,
    episode_key,
    prepare_examples,
    sample_episode,
    sample_episodes,
    validate,
)
from metalstm.data.pools import ClassPool, Dataset, Normalisation, make_pool

COUNTS = (9, 12, 7, 8, 12, 10)
sample = jax.jit(sample_episode, static_argnames="spec")


def coded_pool(groups: bool = False) -> ClassPool:
    """Images 4x4x3 whose corner says class, slot and 255 (at [0, 0]); padding is 99."""
    images = np.zeros((6, 12, 4, 4, 3), np.uint8)
    images[:, :, 0, 0, 0] = np.arange(6)[:, None]
    images[:, :, 0, 0, 1] = np.arange(12)
    images[:, :, 0, 0, 2] = 255
    for row, count in zip(images, COUNTS, strict=True):
        row[count:] = 99
    # Groups of 2, 3 or 4 images, the ids spread over the slots and not in order.
    ids = (np.arange(12)[None] * 7 % (3 + np.arange(6) % 3)[:, None]) % 12
    return make_pool(images, np.array(COUNTS), ids if groups else None)


def dataset(pool: ClassPool, **info) -> Dataset:
    names = tuple(f"class {i}" for i in range(pool.num_classes))
    every = dict.fromkeys(("train", "validation", "test"), names)
    return Dataset("toy", pool, pool, pool, every, pool.images.shape[2:], "", info)


def decode(x) -> np.ndarray:
    """[N, 4, 4, 3] in [0, 1] -> [N, 3]: class, slot, quarter turns."""
    x = np.rint(np.asarray(x) * 255).astype(int)
    corners = [x[:, 0, 0], x[:, -1, 0], x[:, -1, -1], x[:, 0, -1]]
    rows = []
    for n in range(len(x)):
        turns = [k for k in range(4) if corners[k][n, 2] == 255]
        assert len(turns) == 1, "padding or a broken image was drawn"
        rows.append([*corners[turns[0]][n, :2], turns[0]])
    return np.array(rows)


@pytest.fixture(scope="module")
def pool() -> ClassPool:
    return coded_pool()


SPECS = [
    EpisodeSpec(way=3, shot=2, queries=4),
    EpisodeSpec(way=6, shot=1, queries=6),
    EpisodeSpec(way=4, shot=3, queries=2, rotations=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_episode_is_balanced_distinct_and_consistently_labelled(pool, spec, seed):
    episode = sample(jax.random.key(seed), pool, spec)
    for batch, per_class in (
        (episode.support, spec.shot),
        (episode.query, spec.queries),
    ):
        assert batch.x.dtype == jnp.float32
        assert batch.y.dtype == jnp.int32
        counts = np.bincount(batch.y, minlength=spec.way)
        assert counts.tolist() == [per_class] * spec.way
    rows = np.concatenate([decode(episode.support.x), decode(episode.query.x)])
    labels = np.concatenate([episode.support.y, episode.query.y])
    # Label -> (class, turn) is a function, and no class has two labels or two turns.
    pairs = {(label, row[0], row[2]) for label, row in zip(labels, rows, strict=True)}
    assert len(pairs) == spec.way == len({row[0] for row in rows})
    # Support and query together never repeat an image.
    assert len({(row[0], row[1]) for row in rows}) == len(rows)
    assert np.all(rows[:, 1] < np.array(COUNTS)[rows[:, 0]])
    if not spec.rotations:
        assert np.all(rows[:, 2] == 0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31 - 1))
def test_support_and_query_share_no_group(seed):
    pool, spec = coded_pool(groups=True), EpisodeSpec(way=4, shot=1, queries=3)
    episode = sample(jax.random.key(seed), pool, spec)
    groups = np.asarray(pool.groups)
    support, query = (
        {(c, groups[c, m]) for c, m, _ in decode(batch.x)} for batch in episode
    )
    assert not support & query
    rows = np.concatenate([decode(batch.x) for batch in episode])
    assert len({(c, m) for c, m, _ in rows}) == len(rows) == 16


def test_every_class_label_slot_turn_and_position_is_reached(pool):
    spec = EpisodeSpec(way=3, shot=1, queries=2, rotations=True)
    keys = jax.random.split(jax.random.key(0), 600)
    episodes = jax.jit(partial(sample_episodes, spec=spec))(keys, pool)
    rows = np.stack([decode(x) for x in np.asarray(episodes.support.x)])
    labels = np.asarray(episodes.support.y)
    pairs = np.stack([rows[..., 0], labels], -1).reshape(-1, 2)
    _, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(counts) == 6 * 3
    # 1,800 draws over 18 (class, label) pairs: 100 each, standard deviation 10.
    assert np.all(np.abs(counts - 100) < 45)
    assert np.all(np.abs(np.bincount(rows[..., 2].ravel()) - 450) < 110)
    slots = np.bincount(rows[rows[..., 0] == 1][:, 1], minlength=12)
    assert np.all(np.abs(slots - 25) < 23)  # about 300 draws of class 1, 12 slots
    # The order is shuffled: the first place holds every label equally often.
    for first in (labels[:, 0], np.asarray(episodes.query.y)[:, 0]):
        assert np.all(np.abs(np.bincount(first, minlength=3) - 200) < 60)


@pytest.mark.parametrize("grouped", [False, True])
def test_jit_and_vmap_change_nothing(grouped):
    source = coded_pool(groups=grouped)
    spec = EpisodeSpec(way=4, shot=1, queries=2, rotations=True)
    keys = jax.random.split(jax.random.key(3), 3)
    together = jax.jit(sample_episodes, static_argnames="spec")(keys, source, spec)
    for i in range(3):
        alone = sample(keys[i], source, spec)
        jax.tree.map(
            lambda leaf, of_all, i=i: np.testing.assert_array_equal(leaf, of_all[i]),
            alone,
            together,
        )
    if not grouped:  # eager compiles every operation on its own: once is enough
        eager = spec.sample(keys[2], source)
        jax.tree.map(np.testing.assert_array_equal, eager, alone)


def test_episode_keys_differ_in_every_argument():
    keys = [
        episode_key(seed, split, step, task)
        for seed in (0, 1)
        for split in ("train", "validation", "test")
        for step in (0, 1, 7)
        for task in (0, 1, 7)
    ]
    data = np.stack([jax.random.key_data(key) for key in keys])
    assert len(np.unique(data, axis=0)) == len(keys)
    traced = jax.jit(lambda s, t, i: episode_key(s, "validation", t, i))(1, 7, 1)
    again = jax.random.key_data(episode_key(1, "validation", 7, 1))
    np.testing.assert_array_equal(jax.random.key_data(traced), again)


def test_one_key_gives_one_episode_and_another_gives_another(pool):
    first, again, other = (
        sample(episode_key(0, "train", 3, task), pool, SPECS[0]) for task in (1, 1, 2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first.support.x, other.support.x)


def test_normalise_follows_augment(pool):
    plain = EpisodeSpec(way=3, shot=1, queries=2)
    spec = EpisodeSpec(
        way=3,
        shot=1,
        queries=2,
        augment=_halve,
        normalise=Normalisation((0.5, 0.25, 0.0), (0.5, 1.0, 2.0)),
    )
    key = jax.random.key(4)
    x = sample(key, pool, plain).query.x
    expected = (np.asarray(x) / 2 - [0.5, 0.25, 0.0]) / [0.5, 1.0, 2.0]
    np.testing.assert_allclose(sample(key, pool, spec).query.x, expected, atol=1e-6)


def _halve(key, images):
    return images / 2


def test_the_spec_is_static_and_compiles_once(pool):
    traces = []

    @partial(jax.jit, static_argnames="spec")
    def draw(key, pool, spec):
        traces.append(1)
        return spec.sample(key, pool)

    for seed in range(3):
        spec = EpisodeSpec(3, 1, 2, augment=_halve, normalise=([0.5], [0.5]))
        draw(jax.random.key(seed), pool, spec)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"way": 0, "shot": 1}, r"way=0: choose 1 or more"),
        ({"way": 5, "shot": 0}, r"shot=0: choose 1 or more"),
        ({"way": 5, "shot": 1, "queries": 0}, r"queries=0: choose 1 or more"),
        (
            {"way": 5, "shot": 1, "normalise": ((0.5,), (0.0,))},
            "finite and the latter above 0",
        ),
        ({"way": 5, "shot": 1, "augment": []}, "not hashable"),
    ],
)
def test_a_bad_spec_is_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSpec(**arguments)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            EpisodeSpec(7, 1, 2),
            "way=7 is more than the 6 classes of toy's test split; choose way <= 6",
        ),
        (EpisodeSpec(5, 1, 7), r"class 'class 2' of toy's test split has 7; choose"),
        (EpisodeSpec(5, 1, 12), r"class 'class 2' of toy's test split has 7; choose"),
        (EpisodeSpec(5, 1, 2, rotations=True), "choose rotations=False"),
        (
            EpisodeSpec(5, 1, 2, normalise=((0, 0), (1, 1))),
            "2 means for the 3 channels of toy's test split; give 1 or 3",
        ),
    ],
)
def test_validate_names_the_limit_and_the_remedy(pool, spec, message):
    with pytest.raises(ValueError, match=message):
        validate(spec, dataset(pool, rotations=False), "test")


def test_validate_accepts_what_fits_and_counts_groups(pool):
    validate(EpisodeSpec(6, 1, 6), dataset(pool), "test")
    grouped = dataset(coded_pool(groups=True))
    validate(EpisodeSpec(6, 2, 3), grouped)
    with pytest.raises(ValueError, match="queries=6: half the groups of class"):
        validate(EpisodeSpec(6, 2, 6), grouped)
    with pytest.raises(ValueError, match="split='valid': choose one of train"):
        validate(EpisodeSpec(6, 1, 6), dataset(pool), "valid")


@pytest.mark.filterwarnings("ignore:all .* examples are the same")
def test_shapes_alone_are_checked_under_jit(pool):
    with pytest.raises(ValueError, match="way=7 is more than the 6 classes of pool"):
        sample(jax.random.key(0), pool, EpisodeSpec(7, 1, 2))
    with pytest.raises(ValueError, match="8 images a class, but the smallest class of"):
        sample(jax.random.key(0), pool, EpisodeSpec(3, 2, 6))
    wide = make_pool(np.zeros((3, 4, 5, 6, 1), np.uint8))
    with pytest.raises(ValueError, match="square images, but those of pool are 5 x 6"):
        sample(jax.random.key(0), wide, EpisodeSpec(2, 1, 1, rotations=True))
    with pytest.raises(ValueError, match="split='val': choose one of"):
        episode_key(0, "val", 0)


@pytest.mark.parametrize("shape", [(7,), (4, 3), (2, 2, 3)])
def test_floats_come_as_they_are(shape):
    rng = np.random.default_rng(0)
    features = rng.normal(300, 100, (4, 6, *shape)).astype(np.float32)
    pool = make_pool(features)
    spec = EpisodeSpec(3, 2, 2)
    for part in sample(jax.random.key(0), pool, spec):
        assert part.x.shape == (6, *shape)
        for x in np.asarray(part.x):
            assert (features == x).reshape(4, 6, -1).all(-1).any()
    wide = make_pool(features[..., None])
    with pytest.raises(ValueError, match="rotations=True needs square images"):
        sample(jax.random.key(0), wide, EpisodeSpec(2, 1, 1, rotations=True))


@pytest.mark.filterwarnings("ignore:all .* examples are the same")
def test_make_pool_joins_classes_and_refuses():
    ragged = [np.full((n, 2, 2, 1), n, np.uint8) for n in (3, 1, 2)]
    pool = make_pool(ragged)
    assert pool.images.shape == (6, 2, 2, 1)
    assert pool.smallest == 1
    for index, images in enumerate(ragged):
        np.testing.assert_array_equal(pool.of_class(index), images)
    assert pool.counts.tolist() == [3, 1, 2]
    with pytest.raises(ValueError, match="images is empty"):
        make_pool([])
    with pytest.raises(ValueError, match="must be uint8 of shape"):
        make_pool(np.zeros((3, 2, 2, 1), np.uint8))
    with pytest.raises(ValueError, match=r"or floats .*, got complex64 of 1 classes"):
        make_pool([np.zeros((3, 2, 2, 1), np.complex64)])
    with pytest.raises(ValueError, match="span 0 to 2147483648: give integers"):
        make_pool([np.full((3, 2), 2**31)])
    with pytest.raises(ValueError, match="span -9223372036854775808 to 0: give inte"):
        make_pool([np.full((3, 2), -(2**63))])
    with pytest.raises(ValueError, match=r"images\[1\] are float32 and images"):
        make_pool([ragged[0], ragged[1].astype(np.float32)])
    images = np.zeros((2, 3, 2, 2, 1), np.uint8)
    with pytest.raises(ValueError, match=r"2 integers in \[1, 3\], got \[4, 1\]"):
        make_pool(images, np.array([4, 1]))
    with pytest.raises(ValueError, match=r"groups must have shape \[2, 3\]"):
        make_pool(images, groups=np.zeros((2, 2), int))
    with pytest.raises(
        ValueError, match=r"groups\[1\] has the ids \[2\]; a class needs"
    ):
        make_pool(images, groups=np.array([[0, 1, 1], [2, 2, 2]]))


@pytest.mark.parametrize(
    ("num", "size"), [(1, 1), (2, 2), (5, 64), (20, 20), (20, 23), (33, 40)]
)
def test_distinct_integers_are_drawn_as_floyd_draws_them(num, size):
    uniform = np.random.default_rng(num).random((40, 2, num), np.float32)
    found = jax.vmap(lambda u: draw_distinct(u, size))(jnp.asarray(uniform))
    for (numbers, order), ours in zip(uniform, found, strict=True):
        chosen = []
        for k in range(num):
            last = size - num + k
            drawn = int(to_integers(jnp.float32(numbers[k]), last + 1))
            chosen.append(last if drawn in chosen else drawn)
        np.testing.assert_array_equal(ours, np.array(chosen)[np.argsort(order)])
        assert len(set(ours.tolist())) == num


def test_a_jax_array_is_one_array_and_a_list_has_its_own_counts():
    images = np.arange(24.0, dtype=np.float32).reshape(3, 4, 2)
    for array in (images, jnp.asarray(images)):
        pool = make_pool(array, counts=np.array([4, 2, 3]))
        assert pool.counts.tolist() == [4, 2, 3]
        np.testing.assert_array_equal(pool.of_class(1), images[1, :2])
    with pytest.raises(ValueError, match=r"counts= is for one array"):
        make_pool(list(images), counts=np.array([4, 2, 3]))


def test_integers_that_are_normalised_become_floats():
    x = jnp.array([[0, 1], [2, 3]], jnp.int32)
    found = prepare_examples(x, Normalisation((0.5,), (0.25,)))
    np.testing.assert_allclose(found, (np.asarray(x) - 0.5) / 0.25)
