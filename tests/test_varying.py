"""Masked episodes: a row that is no example changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import metalstm
from metalstm import Batch, Episode, MaskedBatch, algorithms, data, nn, rules
from metalstm.algorithms.common import accuracy, task_loss
from metalstm.batches import labels_of
from metalstm.data.varying import VaryingEpisodeSpec

RNG = np.random.default_rng(0)
POOL = data.make_pool(RNG.normal(size=(7, 9, 5)).astype(np.float32))
SPEC = VaryingEpisodeSpec(way=5, shot=4, queries=3, min_way=2, min_shot=1)


def net(**options):
    return nn.mlp(None, widths=(6,), **options)


METHODS = {
    "maml": lambda way: algorithms.maml(
        nn.tied_head(net()), 0.3, num_steps=3, train_way=way
    ),
    "maml, each query with the support set": lambda way: algorithms.maml(
        nn.tied_head(net()),
        0.3,
        num_steps=2,
        train_way=way,
        query_norm="support+1",
        train_query_norm="support+1",
    ),
    "anil": lambda way: algorithms.anil(
        nn.tied_head(net()), 0.3, num_steps=2, train_way=way
    ),
    "meta_lstm": lambda way: algorithms.meta_lstm(
        nn.tied_head(net()),
        rules.lstm_gates(hidden_size=3),
        num_steps=3,
        gradient_scale=1.0,
        train_way=way,
    ),
    "second order, clipped by norm": lambda way: algorithms.learned_init(
        nn.tied_head(net()),
        optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.5)),
        num_steps=2,
        differentiation=metalstm.second_order(),
        train_way=way,
    ),
    "prototypical": lambda way: algorithms.prototypical(net()),
    "matching": lambda way: algorithms.matching(net()),
    "nearest_centroid": lambda way: algorithms.nearest_centroid(),
}


def true_size(episode: Episode) -> tuple[Episode, int]:
    """The episode without its masked rows."""
    parts = []
    for part in episode:
        mask = np.asarray(part.mask)
        parts.append(Batch(part.x[mask], part.y[mask]))
    return Episode(*parts), int(parts[0].y.max()) + 1


def test_way_and_shots_vary_and_nothing_else_is_shown():
    keys = jax.random.split(jax.random.key(0), 400)

    @tiny.quick_jit
    def draw(keys):
        whole = data.EpisodeSpec(5, 4, 3)

        def both(key):
            part = jax.random.split(key, 3)[0]
            return SPEC.sample(key, POOL), whole.sample(part, POOL)

        return jax.vmap(both)(keys)

    drawn, whole = jax.device_get(draw(keys))
    ways, shots = [], []
    for task in range(len(keys)):
        one = jax.tree.map(lambda leaf, task=task: leaf[task], drawn)
        episode, way = true_size(one)
        counts = np.bincount(episode.support.y, minlength=way)
        assert np.bincount(episode.query.y).tolist() == [SPEC.queries] * way
        ways.append(way)
        shots += counts.tolist()
    # it is a part of the episode that EpisodeSpec draws by a part of the key
    for masked, full in zip(drawn, whole, strict=True):
        np.testing.assert_array_equal(masked.x, full.x)
        np.testing.assert_array_equal(masked.y[masked.mask], full.y[masked.mask])
    # 400 ways in [2, 5] and some 1,400 shots in [1, 4]: standard deviations 8.7 and 16
    assert np.abs(np.bincount(ways)[2:] - 100).max() < 40
    assert np.abs(np.bincount(shots)[1:] / len(shots) - 0.25).max() < 0.06


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_masked_episode_is_the_episode_of_its_true_size(name, seed):
    padded = SPEC.sample(jax.random.key(seed), POOL)
    episode, way = true_size(padded)
    masked, alone, key = METHODS[name](SPEC.way), METHODS[name](way), jax.random.key(7)
    assert masked.masked
    params = masked.init(jax.random.key(1), padded)

    def run(method, task, way):
        @tiny.quick_jit
        def of(params, x, task):
            scores = method.predict(params, key, task.support, x, num_classes=way)
            if not method.trainable:
                return scores, ()
            loss = jax.value_and_grad(method.loss, has_aux=True)
            (value, aux), grads = loss(params, key, task)
            return scores, (value, aux.metrics["accuracy"], grads)

        return jax.device_get(of(params, padded.query.x, task))

    scores, trained = run(masked, padded, SPEC.way)
    expected, of_true_size = run(alone, episode, way)
    np.testing.assert_allclose(scores[:, :way], expected, rtol=1e-4, atol=1e-4)
    assert np.all(scores[:, way:] == -np.inf)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, trained, of_true_size)


def test_losses_and_accuracy_are_means_over_what_is_there():
    scores = RNG.normal(size=(6, 3))
    scores[1] = [-np.inf, 1, 2]
    y = np.array([0, 0, 2, 1, 1, 9])
    mask = np.array([True, False, True, True, False, False])
    shifted = scores[mask] - scores[mask].max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -log_p[np.arange(3), y[mask]].mean()
    arrays = jnp.asarray(scores), jnp.asarray(y), jnp.asarray(mask)
    np.testing.assert_allclose(task_loss(*arrays), expected, rtol=1e-6)
    right = (scores[mask].argmax(-1) == y[mask]).mean()
    np.testing.assert_allclose(accuracy(*arrays), right, rtol=1e-6)
    assert np.isfinite(jax.grad(task_loss)(*arrays)).all()
    targets = RNG.normal(size=(6, 3))
    squared = np.square(scores - targets)[mask].mean()
    arrays = arrays[0].at[1].set(jnp.nan), jnp.asarray(targets), arrays[2]
    np.testing.assert_allclose(task_loss(*arrays), squared, rtol=1e-6)
    assert np.isfinite(jax.grad(task_loss)(*arrays)).all()


@pytest.mark.parametrize("name", ["maml", "prototypical"])
def test_training_and_evaluation_take_varying_tasks(name):
    algorithm, optimizer = METHODS[name](SPEC.way), optax.sgd(0.1)
    episode = SPEC.sample(data.episode_key(0, "train", 0), POOL)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    train = metalstm.make_train_loop(algorithm, optimizer, SPEC, num_tasks=2)
    state, metrics = train(state, POOL)
    assert np.isfinite(metrics["loss"]).all()
    found = metalstm.evaluate(algorithm, state.params, POOL, SPEC, num_episodes=4)
    expected = []
    for index in range(4):
        key = data.episode_key(0, "test", 0, index)
        episode, way = true_size(SPEC.sample(key, POOL))
        scores = METHODS[name](way).predict(
            state.params, key, episode.support, episode.query.x, num_classes=way
        )
        expected.append((scores.argmax(-1) == episode.query.y).mean())
    np.testing.assert_allclose(found.accuracies, expected, atol=1e-6)


REFUSED = {
    "reptile": lambda: algorithms.reptile(nn.mlp(5, widths=(4,))),
    "minibatches": lambda: algorithms.maml(nn.mlp(5), num_steps=1, batch_size=2),
    "context": lambda: algorithms.matching(net(), context_steps=1),
    "siamese": lambda: algorithms.siamese(net()),
    "ridge": lambda: algorithms.ridge(),
    "mann": lambda: algorithms.mann(net(), 5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_would_count_empty_rows_is_refused(name):
    algorithm = REFUSED[name]()
    said = "cannot tell rows that are no examples from those that are: choose tasks of"
    if algorithm.trainable:
        with pytest.raises(ValueError, match=said):
            metalstm.make_train_loop(algorithm, optax.sgd(0.1), SPEC, num_tasks=1)
    with pytest.raises(ValueError, match=said):
        metalstm.make_evaluate(algorithm, SPEC)
    support = SPEC.sample(jax.random.key(0), POOL).support
    with pytest.raises(ValueError, match=said):
        algorithm.predict((), jax.random.key(0), support, support.x, num_classes=5)


@pytest.mark.parametrize("method", [algorithms.prototypical, algorithms.maml])
def test_batch_norm_is_refused(method):
    images = data.make_pool(RNG.integers(0, 9, (5, 8, 8, 8, 1)).astype(np.uint8))
    learner = nn.conv4(5, filters=2, num_blocks=1)
    algorithm, spec = method(learner), VaryingEpisodeSpec(5, 2, 1)
    episode = spec.sample(jax.random.key(0), images)
    params = algorithm.init(jax.random.key(0), episode)
    with pytest.raises(ValueError, match="has batch norm, whose statistics would"):
        algorithm.loss(params, jax.random.key(0), episode)


def test_bad_ranges_are_refused():
    for options in ({"min_way": 6}, {"min_way": 0}, {"min_shot": 5}):
        with pytest.raises(ValueError, match=r"min_.*=.*: choose 1 to"):
            VaryingEpisodeSpec(5, 4, 3, **options)
    with pytest.raises(ValueError, match="choose tasks of one size"):
        metalstm.collect_scores(METHODS["prototypical"](5), (), POOL, SPEC)
    assert isinstance(SPEC.sample(jax.random.key(0), POOL).query, MaskedBatch)


def test_a_masked_row_is_no_class_whatever_integers_the_labels_are():
    x, mask = jnp.zeros((3, 1)), jnp.array([True, True, False])
    for dtype in (jnp.uint8, jnp.int32):
        batch = MaskedBatch(x, jnp.array([0, 1, 0], dtype), mask)
        assert labels_of(batch).tolist() == [0, 1, -1]
