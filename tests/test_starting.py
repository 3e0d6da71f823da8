"""A network that starts from another's weights, and a state that is built by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

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
    """Or gathers its own, which leave no trace of them."""
    trained = tiny.norm_net(4).init(KEY, tiny.episode().support.x)
    trained = trained._replace(stats=jax.tree.map(lambda s: s + 0.5, trained.stats))
    learner, optimizer = nn.tied_head(tiny.norm_net(4)), optax.adam(0.1)
    after = {}
    for frozen_stats in ("kept", "gathered"):
        algorithm = algorithms.maml(
            learner, 0.1, train_way=tiny.WAY, num_steps=1, query_norm="frozen",
            train_query_norm="frozen", frozen_stats=frozen_stats,
        )  # fmt: skip
        state = metalstm.init_train_state(
            algorithm, optimizer, 0, tiny.episode(), start=trained
        )
        state, _ = metalstm.make_train_step(algorithm, optimizer)(
            state, tiny.episodes(2)
        )
        after[frozen_stats] = state.params.learner
    tiny.assert_equal(after["kept"].stats, trained.stats)
    for name, gathered in after["gathered"].stats.items():
        assert not np.allclose(gathered["mean"], trained.stats[name]["mean"], atol=0.01)
    with pytest.raises(
        ValueError, match="frozen_stats='fresh': choose one of gathered"
    ):
        algorithms.maml(learner, 0.1, frozen_stats="fresh")
