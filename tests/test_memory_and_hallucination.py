"""Hallucination and the memory-augmented network, against numpy in float64."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import tiny
from reference import sigmoid
from test_algorithms import EPISODE, FEATURES, KEY, compiled_predict, meta_params

import metalstm
from metalstm import algorithms, data, nn
from metalstm.base import Batch, Learner

SUPPORT, QUERY = EPISODE
labels = np.asarray(SUPPORT.y)


def as_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Support and query as the learner inside a case embeds them."""
    state = algorithms.embedding_state(meta_params(name))
    embed = lambda x: as_float64(FEATURES.apply(state, x, norm="stored")[0])  # noqa: E731
    return embed(SUPPORT.x), embed(QUERY.x)


def maps() -> Learner:
    return Learner(
        FEATURES.init,
        lambda s, x, **options: (FEATURES.apply(s, x, **options)[0][:, None], s),
    )


# -- hallucination ---------------------------------------------------------------------


def test_prototypes_are_means_of_real_and_imagined_examples():
    params = meta_params("hallucination")
    support, query = features("hallucination")
    noise_key, _ = jax.random.split(KEY)
    noise = as_float64(jax.random.normal(noise_key, (2, *support.shape)))
    layers = as_float64(params.params["generator"])["layers"]
    examples, classes = [support], [labels]
    for z in noise:
        hidden = np.concatenate([support, z], 1)
        for layer in layers[:2]:
            hidden = np.maximum(hidden @ layer["kernel"] + layer["bias"], 0)
        examples.append(support + hidden @ layers[2]["kernel"] + layers[2]["bias"])
        classes.append(labels)
    examples, classes = np.concatenate(examples), np.concatenate(classes)
    means = np.stack([examples[classes == c].mean(0) for c in range(tiny.WAY)])
    expected = -np.sum((query[:, None] - means) ** 2, -1)
    scores = compiled_predict("hallucination")(params, SUPPORT, QUERY.x)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    real = np.stack([support[labels == c].mean(0) for c in range(tiny.WAY)])
    assert np.abs(real - means).max() > 1e-3  # imagination moves them


def test_imagination_follows_the_key():
    algorithm, params = HALLUCINATION, meta_params("hallucination")
    fn = tiny.quick_jit(
        jax.vmap(
            lambda seed: algorithm.predict(
                params, jax.random.key(seed), SUPPORT, QUERY.x, num_classes=tiny.WAY
            )
        )
    )
    first, again, other = fn(np.array([1, 1, 2]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-4


def test_what_hallucination_refuses():
    with pytest.raises(ValueError, match=r"num_generated=0: choose 1 or more"):
        algorithms.hallucination(FEATURES, num_generated=0)
    with pytest.raises(ValueError, match=r"generator needs features \[N, d\]"):
        algorithms.hallucination(maps()).init(KEY, EPISODE)


HALLUCINATION = algorithms.hallucination(FEATURES, num_generated=2)


# -- the memory-augmented network ------------------------------------------------------


def memory_scores(net, sequence, late, *, num_slots, slot_size, num_reads):
    """Santoro et al. (2016), equations 2 to 8, a step and a head at a time."""
    hidden = net["keys"]["kernel"].shape[0]
    h, c = np.zeros(hidden), np.zeros(hidden)
    memory, usage = np.zeros((num_slots, slot_size)), np.zeros(num_slots)
    previous = [np.zeros(num_slots) for _ in range(num_reads)]
    reads = np.zeros(num_reads * slot_size)
    linear = lambda name, x: x @ net[name]["kernel"] + net[name]["bias"]  # noqa: E731
    for x, y in zip(sequence, late, strict=True):
        i, f, o, g = np.split(linear("controller", np.concatenate([x, y, reads, h])), 4)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        gates = sigmoid(linear("interpolation", h))
        keys = np.split(np.tanh(linear("keys", h)), num_reads)
        strengths = np.ones(num_reads)
        if "strength" in net:
            strengths = np.log1p(np.exp(linear("strength", h) + 5))
        free = np.argsort(usage, kind="stable")[:num_reads]
        memory = memory.copy()
        memory[free] = 0
        usage = 0.95 * usage
        for head, key in enumerate(keys):
            least = np.eye(num_slots)[free[head]]
            write = gates[head] * previous[head] + (1 - gates[head]) * least
            memory += np.outer(write, key)
            usage = usage + write
        lengths = np.sqrt(np.sum(memory**2, 1) + 1e-6)
        previous, parts = [], []
        for key, beta in zip(keys, strengths, strict=True):
            cosine = memory @ key / (lengths * np.sqrt(np.sum(key**2) + 1e-6))
            read = np.exp(beta * cosine) / np.exp(beta * cosine).sum()
            usage = usage + read
            parts.append(read @ memory)
            previous.append(read)
        reads = np.concatenate(parts)
    return linear("outputs", np.concatenate([h, reads]))


@pytest.mark.parametrize("strength", ["learned", "one"])
def test_a_query_reads_the_memory_of_the_support_sequence(strength):
    params = meta_params("mann")
    if strength == "one":
        sizes = {"hidden_size": 4, "num_slots": 5, "slot_size": 3, "num_reads": 2}
        algorithm = algorithms.mann(FEATURES, 3, **sizes, key_strength="one")
        drawn = algorithm.init(jax.random.key(0), EPISODE).params["memory_net"]
        parts = params.params | {"memory_net": drawn}
        params = params._replace(params=parts)
    support, query = features("mann")
    late = np.concatenate([np.zeros((1, tiny.WAY)), np.eye(tiny.WAY)[labels]])
    net = as_float64(params.params["memory_net"])
    expected = [
        memory_scores(
            net,
            np.concatenate([support, one[None]]),
            late,
            num_slots=5,
            slot_size=3,
            num_reads=2,
        )
        for one in query
    ]
    scores = compiled_predict("mann")(params, SUPPORT, QUERY.x)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


def test_labels_come_one_step_late_and_order_matters():
    params, fn = meta_params("mann"), compiled_predict("mann")
    before = fn(params, SUPPORT, QUERY.x)
    reverse = Batch(SUPPORT.x[::-1], SUPPORT.y[::-1])
    assert np.abs(fn(params, reverse, QUERY.x) - before).max() > 1e-4


def test_the_memory_network_learns_to_bind_images_to_labels():
    """Two Gaussian classes, new ones in each task: chance is a half."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(250, 1, 8))
    classes = (means + 0.2 * rng.normal(size=(250, 10, 8))).astype(np.float32)
    train, test = data.make_pool(classes[:200]), data.make_pool(classes[200:])
    algorithm = algorithms.mann(
        nn.mlp(None, widths=(16,)), 2, num_slots=8, slot_size=8, num_reads=1,
        hidden_size=64,
    )  # fmt: skip
    spec, optimizer = data.EpisodeSpec(2, 1, 2), metalstm.adam_clipped(1e-2, 10.0)
    loop = metalstm.make_train_loop(
        algorithm, optimizer, spec, num_tasks=16, steps_per_call=100
    )
    episode = spec.sample(data.episode_key(0, "train", 0), train)
    state = metalstm.init_train_state(algorithm, optimizer, 0, episode)
    for _ in range(3):
        state, _ = loop(state, train)
    evaluate = metalstm.make_evaluate(algorithm, spec, batch_size=16)
    found = evaluate(state.params, test, num_episodes=160, split="test")
    assert np.mean(found.accuracies) > 0.8


def test_a_kept_learner_is_that_of_the_test_and_has_no_gradient():
    found = {}
    for trained in (True, False):
        algorithm = algorithms.mann(
            FEATURES, tiny.WAY, num_slots=8, hidden_size=8, train_learner=trained
        )
        params = algorithm.init(KEY, EPISODE)
        params = params._replace(  # averages that are no batch's
            stats=jax.tree.map(lambda s: 1.5 * s + 0.5, params.stats)
        )
        (loss, aux), grads = jax.value_and_grad(
            lambda p, s=params, a=algorithm: a.loss(s._replace(params=p), KEY, EPISODE),
            has_aux=True,
        )(params.params)
        scores = algorithm.predict(params, KEY, SUPPORT, QUERY.x, num_classes=tiny.WAY)
        logs = jax.nn.log_softmax(scores)[np.arange(len(QUERY.y)), QUERY.y]
        found[trained] = float(loss + logs.mean())
        kept = jax.tree.map(lambda g: np.abs(g).max() == 0, grads["embedding"])
        assert all(jax.tree.leaves(kept)) == (not trained)
        assert np.abs(grads["memory_net"]["keys"]["kernel"]).max() > 0
        same = tiny.max_difference(aux.gathered, params.stats) == 0
        assert same == (not trained)
    assert abs(found[False]) < 1e-5 < abs(found[True])


def test_a_kept_learner_stays_under_weight_decay():
    algorithm = algorithms.mann(
        FEATURES, tiny.WAY, num_slots=8, hidden_size=8, train_learner=False
    )
    optimizer = optax.adamw(0.01, weight_decay=0.5)
    first = metalstm.init_train_state(algorithm, optimizer, 0, EPISODE)
    step = metalstm.make_train_step(algorithm, optimizer)
    after, _ = step(jax.tree.map(np.array, first), tiny.episodes(2))
    for before, now in zip(first.params, after.params, strict=True):
        tiny.assert_equal(before["embedding"], now["embedding"])
    kernels = (
        state.params.params["memory_net"]["keys"]["kernel"] for state in (first, after)
    )
    assert not np.array_equal(*kernels)


def test_what_the_memory_network_refuses():
    with pytest.raises(ValueError, match=r"num_reads=9: choose at least 1 and at most"):
        algorithms.mann(FEATURES, 3, num_slots=8, num_reads=9)
    with pytest.raises(ValueError, match=r"key_strength=2: choose one of learned, one"):
        algorithms.mann(FEATURES, 3, key_strength=2)
    with pytest.raises(ValueError, match=r"controller needs features \[N, d\]"):
        algorithms.mann(maps(), 3).init(KEY, EPISODE)
    three, five = algorithms.mann(FEATURES, 3), tiny.episode(way=5)
    params = three.init(KEY, five)
    with pytest.raises(ValueError, match=r"5 classes but the network was made for way"):
        three.predict(params, KEY, five.support, five.query.x, num_classes=5)
