"""Meta-training from a pool in the host's memory."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import metalstm
from metalstm import algorithms, data, nn
from metalstm.meta.fitting import fit, init_fit_state

RNG = np.random.default_rng(0)
COUNTS = np.array([9, 7, 9, 8, 9, 7])
IMAGES = RNG.integers(0, 256, (6, 9, 32, 32, 1), dtype=np.uint8)
CADENCE = {"steps_per_call": 2, "report_every": 2}
GROUPS = np.tile(np.arange(9) // 3, (6, 1))
EPISODES = data.EpisodeSpec(
    way=3, shot=2, queries=2, rotations=True, augment=data.augment.shift(1)
)


def of(kind: str):
    """A method, its spec, and what its pools are made of."""
    learner = nn.mlp(None, (4,))
    if kind == "classifier":
        method = algorithms.pretrained_features(learner, 24, batch_size=8)
        return method, EPISODES, (IMAGES, COUNTS)
    if kind == "groups":
        spec = data.EpisodeSpec(way=3, shot=2, queries=2)
        return algorithms.prototypical(learner), spec, (IMAGES, None, GROUPS)
    vectors = RNG.normal(size=(6, 9, 5)).astype(np.float32)
    if kind == "vectors":
        spec = data.EpisodeSpec(way=3, shot=1, queries=2)
        return algorithms.prototypical(learner), spec, (vectors,)
    return algorithms.prototypical(learner), EPISODES, (IMAGES, COUNTS)


@pytest.mark.parametrize("kind", ["turned", "groups", "vectors", "classifier"])
def test_the_steps_are_those_of_a_pool_on_the_device_to_the_bit(kind):
    algorithm, spec, parts = of(kind)
    on_device = data.make_pool(*parts)
    on_host = data.make_pool(*parts, in_host_memory=True)
    assert isinstance(on_host.stored, np.ndarray)
    np.testing.assert_array_equal(on_host.of_class(1), on_device.of_class(1))
    options = {"num_tasks": 2, "steps_per_call": 2}
    setup = algorithm, metalstm.adam_clipped()
    episode = algorithm.train_sampler(spec).sample(jax.random.key(0), on_device)

    def trained(make, pool, *ends):
        state = init_fit_state(metalstm.init_train_state(*setup, 3, episode))
        for end in ends:  # resumed after each
            loop = make(*setup, spec, **options)
            state = fit(loop, state, pool, num_steps=end, **CADENCE)
        return state

    expected = trained(metalstm.make_train_loop, on_device, 6)
    found = trained(metalstm.make_prefetching_train_loop, on_host, 2, 6)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_device_has_the_examples_of_a_call_alone():
    seen = []

    class Spec(data.EpisodeSpec):
        def sample(self, key, pool):
            seen.append(pool.stored.shape)
            return super().sample(key, pool)

    spec = Spec(way=3, shot=2, queries=2)
    algorithm, _, parts = of("turned")
    pool = data.make_pool(*parts, in_host_memory=True)
    optimizer = metalstm.adam_clipped()
    episode = spec.sample(jax.random.key(0), pool)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    make = metalstm.make_prefetching_train_loop
    loop = make(algorithm, optimizer, spec, num_tasks=1)
    seen.clear()
    state, _ = loop(state, pool)
    # to note the places, and within the step: 12 examples of 49
    assert set(seen) == {(), (12, 8, 128)}
    # a state of another step, and another pool, are served as well
    again = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    first, _ = loop(again, pool)
    jax.tree.map(np.testing.assert_array_equal, first, state)


def test_a_memory_mapped_pool_stays_where_it_is(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    pool = data.make_pool(images, in_host_memory=True)
    assert np.shares_memory(pool.stored, images)
