"""A network that starts from another's weights, and a state that is built by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import metalstm
from metalstm import algorithms, nn

KEY, IMAGES = jax.random.key(0), jnp.zeros((1, 8, 8, 1))
BODY = {"filters": 2, "num_blocks": 2}


def drawn(learner, seed: int):
    """As `init` draws it, statistics unlike those at first too."""
    state = learner.init(jax.random.key(seed), IMAGES)
    return state._replace(stats=jax.tree.map(lambda leaf: leaf + seed, state.stats))


def test_a_tied_head_starts_from_a_classifier_and_back():
    classifier = drawn(nn.conv4(7, **BODY), 1)
    fresh = drawn(nn.tied_head(nn.conv4(None, **BODY)), 2)
    start = nn.init_from(fresh, classifier)
    body = {k: v for k, v in classifier.params.items() if k != "head"}
    tiny.assert_equal(start.state.params["body"], body)
    tiny.assert_equal(start.state.stats, classifier.stats)
    tiny.assert_equal(start.state.params["head"], fresh.params["head"])
    assert start.left == ("params.head.bias", "params.head.kernel")
    assert len(start.taken) == len(jax.tree.leaves((body, classifier.stats)))
    back = nn.init_from(classifier, start.state)
    tiny.assert_equal(back.state, classifier)


def test_a_head_that_fits_is_taken_and_arrays_are_copies():
    one, other = (drawn(nn.conv4(3, **BODY), seed) for seed in (1, 2))
    start = nn.init_from(one, other)
    assert not start.left
    tiny.assert_equal(start.state, other)
    assert not set(map(id, jax.tree.leaves(start.state))) & set(
        map(id, jax.tree.leaves(other))
    )


class OwnNames(nnx.Module):
    """Layers called as the library calls what it wraps."""

    def __init__(self, rngs):
        self.embedding = nnx.Linear(8, 8, rngs=rngs)
        self.body = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.body(self.embedding(x)))


@pytest.mark.parametrize("wrap", [lambda net: net, nn.tied_head])
def test_layers_that_are_called_like_wrappers_are_not_mixed_up(wrap):
    x, net = jnp.zeros((1, 8)), metalstm.from_flax(OwnNames)
    one, other = (wrap(net).init(jax.random.key(seed), x) for seed in (1, 2))
    start = nn.init_from(one, other)
    assert not start.left
    tiny.assert_equal(start.state, other)
    bare = net.init(jax.random.key(3), x)
    inside = nn.init_from(one, bare).state.params
    tiny.assert_equal(
        inside.get("body", inside) if wrap is nn.tied_head else inside, bare.params
    )


def test_a_classifier_of_a_network_with_a_head_starts_from_itself():
    """Both have a head: the one of the features, and that of the classes."""
    algorithm = algorithms.pretrained_features(nn.mlp(16), 30)
    states = [
        algorithm.init(jax.random.key(seed), tiny.episode()).learner for seed in (1, 2)
    ]
    start = nn.init_from(*states)
    assert not start.left
    tiny.assert_equal(start.state, states[1])
    alone = nn.init_from(nn.mlp(16).init(KEY, tiny.episode().support.x), states[1])
    tiny.assert_equal(alone.state.params, states[1].params["body"])


def test_a_start_is_a_learner_and_may_be_traced():
    learner = nn.mlp(3)
    one, other = (learner.init(jax.random.key(s), jnp.ones((1, 4))) for s in (1, 2))
    taken = jax.jit(lambda trained: nn.init_from(one, trained).state)(other)
    tiny.assert_equal(taken, other)
    with pytest.raises(TypeError, match="trained is a dict, not the LearnerState"):
        nn.init_from(one, other.params)
    method = metalstm.pretrained_learner("mini-imagenet-classifier-0")
    with pytest.raises(TypeError, match=r"trained is a Predictor.*: give the .params"):
        metalstm.init_train_state(
            algorithms.prototypical(learner), optax.adam(0.1), 0, tiny.episode(),
            start=method,
        )  # fmt: skip


def test_half_precision_becomes_the_type_of_the_new_learner():
    other = drawn(nn.conv4(3, **BODY), 1)
    halves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), other)
    state = nn.init_from(drawn(nn.conv4(3, **BODY), 2), halves).state
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    kernel = np.asarray(other.params["conv1"]["kernel"], np.float16)
    np.testing.assert_array_equal(state.params["conv1"]["kernel"], kernel)


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ({"filters": 3}, r"params.conv1.bias is \[2\] in the new"),
        ({"num_blocks": 1}, r"trained has no params.conv2.bias \[2\]"),
        ({"num_blocks": 3}, "params.conv3.bias.* the new learner lacks"),
        ({"norm": "none"}, r"trained has no params.norm1"),
    ],
)
def test_what_does_not_fit_is_named(trained, message):
    with pytest.raises(ValueError, match=message):
        nn.init_from(
            drawn(nn.conv4(3, **BODY), 0), drawn(nn.conv4(3, **BODY | trained), 1)
        )


def test_values_that_are_not_finite_are_refused():
    state = drawn(nn.conv4(3, **BODY), 1)
    bad = state._replace(stats=jax.tree.map(lambda leaf: leaf * jnp.nan, state.stats))
    with pytest.raises(ValueError, match=r"stats.norm1.mean that are NaN or infinite"):
        nn.init_from(state, bad)


def test_a_train_state_starts_from_a_trained_learner():
    trained = drawn(nn.conv4(None, **BODY), 1)
    learner = nn.tied_head(nn.conv4(None, **BODY))
    episode = metalstm.Episode(*(metalstm.Batch(IMAGES, jnp.zeros(1, int)),) * 2)
    for algorithm in (
        algorithms.meta_lstm(learner, num_steps=1, train_way=1),
        algorithms.prototypical(nn.conv4(None, **BODY)),
        algorithms.pretrained_features(nn.conv4(None, **BODY), num_classes=4),
    ):
        state = metalstm.init_train_state(
            algorithm, optax.adam(0.1), 0, episode, start=trained
        )
        learner = getattr(state.params, "learner", state.params)
        params = learner.params
        tiny.assert_equal(params.get("body", params), trained.params)
        tiny.assert_equal(learner.stats, trained.stats)
    with pytest.raises(ValueError, match="meta-parameters are no learner"):
        metalstm.init_train_state(
            algorithms.nearest_neighbour(), optax.adam(0.1), 0, episode, start=trained
        )


def test_a_state_that_holds_an_array_twice_can_be_donated():
    """Such as one built by hand from pre-trained arrays."""
    algorithm, optimizer = algorithms.maml(tiny.norm_net(), 0.1), optax.adam(1e-3)
    first = metalstm.init_train_state(algorithm, optimizer, 0, tiny.episode())
    moments = first.opt_state[0]._replace(mu=first.params)
    shared = first._replace(opt_state=(moments, *first.opt_state[1:]))
    copied = jax.tree.map(jnp.array, shared)
    step = metalstm.make_train_step(algorithm, optimizer)
    tiny.assert_equal(step(shared, tiny.episodes(2)), step(copied, tiny.episodes(2)))


def test_features_of_one_length():
    """Against numpy; a head's step then does not depend on the features' size."""
    x = tiny.episode().support.x
    body = tiny.norm_net(4)
    learner = nn.tied_head(body, feature_length=3.0)
    state = learner.init(KEY, x)
    kernel = jnp.arange(4.0)[:, None]
    state.params["head"]["kernel"] = kernel
    features, _ = body.apply(
        state._replace(params=state.params["body"]), x, norm="batch"
    )
    features = np.asarray(features, np.float64)
    expected = 3 * features / np.linalg.norm(features, axis=-1, keepdims=True)
    outputs, _ = learner.apply(state, x, norm="batch")
    np.testing.assert_allclose(outputs, expected @ kernel, rtol=1e-5)
    zeros = nn.tied_head(nn.mlp(None, ()), feature_length=3.0)
    state = zeros.init(KEY, x)
    gradient = jax.grad(lambda x: zeros.apply(state, x, norm="batch")[0].sum())(0 * x)
    assert np.isfinite(gradient).all()
    with pytest.raises(ValueError, match=r"feature_length=0: choose a number above 0"):
        nn.tied_head(body, feature_length=0)


def test_meta_training_keeps_the_statistics_that_theta_0_brings():
    """Or goes on from them: its first meta-step counts as one of a hundred."""
    first = tiny.norm_net(4).init(KEY, tiny.episode().support.x)
    trained = first._replace(stats=jax.tree.map(lambda s: s + 0.5, first.stats))
    learner, optimizer = nn.tied_head(tiny.norm_net(4)), optax.adam(0.1)

    def after_a_step(start, frozen_stats: str):
        algorithm = algorithms.maml(
            learner, 0.1, train_way=tiny.WAY, num_steps=1, query_norm="frozen",
            train_query_norm="frozen", frozen_stats=frozen_stats,
        )  # fmt: skip
        state = metalstm.init_train_state(
            algorithm, optimizer, 0, tiny.episode(), start=start
        )
        step = metalstm.make_train_step(algorithm, optimizer)
        return step(state, tiny.episodes(2))[0].params.learner.stats

    tiny.assert_equal(after_a_step(trained, "kept"), trained.stats)
    # averages that nobody gathered leave no trace
    fresh = after_a_step(first, "gathered")
    mixed = jax.tree.map(lambda s, f: s + 0.01 * (f - s), trained.stats, fresh)
    tiny.assert_close(after_a_step(trained, "gathered"), mixed)
    with pytest.raises(
        ValueError, match="frozen_stats='fresh': choose one of gathered"
    ):
        algorithms.maml(learner, 0.1, frozen_stats="fresh")
