"""Models in other processes: loaded, pickled into workers, run without metalstm."""

from __future__ import annotations

import multiprocessing
import pickle
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen

import metalstm
from benchmarks.serving import LOADED, RUN_WITHOUT, in_fresh_process
from metalstm import algorithms, data, nn, rules

WAY = 3
RNG = np.random.default_rng(0)
POOL = data.make_pool(RNG.integers(0, 256, (6, 8, 5, 5, 1), np.uint8))
SPEC = data.EpisodeSpec(WAY, 2, 3, normalise=data.Normalisation((0.4,), (0.3,)))
X = np.concatenate([np.asarray(POOL.of_class(c))[:2] for c in range(WAY)])
Y = np.repeat(np.arange(WAY, dtype=np.int32), 2)
QUERY = np.concatenate([np.asarray(POOL.of_class(c))[4:7] for c in range(WAY)])


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """The rule in a module on the path, also of processes that this one starts."""
    (tmp_path / "rule_of_a_user.py").write_text(tiny.RULE_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    import rule_of_a_user  # noqa: F401

    yield tmp_path
    sys.modules.pop("rule_of_a_user")


def of_users_rule():
    return algorithms.learned_init(
        nn.mlp(WAY, widths=(7,)),
        rules.build_rule({"rule": "rule_of_a_user:tanh_descent", "rate": 0.3}),
        num_steps=2,
        differentiation=metalstm.first_order(),
    )


def of_library():
    return algorithms.prototypical(nn.mlp(None, widths=(7,)))


def saved(algorithm, path, pool=POOL, spec=SPEC):
    episode = spec.sample(data.episode_key(0, "train", 0), pool)
    params = algorithm.init(jax.random.key(0), episode)
    return metalstm.save(path, algorithm, params, pool, spec)


@pytest.mark.parametrize("make", [of_users_rule, of_library])
def test_fresh_processes_predict_the_same_with_and_without_metalstm(make, own_module):
    file = saved(make(), own_module / "it.npz")
    predict = metalstm.load(file)
    classifier = predict.adapt(X, Y)
    expected = classifier.scores(QUERY)
    program = predict.export(own_module / "a.bin", num_support=6, num_classes=WAY)
    adapted = classifier.export(own_module / "b.bin")

    everything, query = {"a": X, "b": Y, "c": QUERY}, {"c": QUERY}
    users = f"import sys; sys.path.append({str(own_module)!r}); import rule_of_a_user"
    for script, inputs, path, before in (
        (LOADED, everything, file, users),  # a file imports nothing
        (RUN_WITHOUT, everything, program, ""),
        (RUN_WITHOUT, query, adapted, ""),
        (RUN_WITHOUT, {"c": QUERY[:1]}, adapted, ""),  # any number of queries
    ):
        took, scores = in_fresh_process(script, inputs, path, before=before)
        assert took["first call"] > took["next call"]
        np.testing.assert_allclose(
            scores, expected[: len(inputs["c"])], rtol=1e-4, atol=1e-5
        )


def test_a_spawned_worker_predicts_the_same(tmp_path):
    predict = metalstm.load(saved(of_library(), tmp_path / "it.npz"))
    classifier = predict.adapt(X, Y)
    expected = classifier.scores(QUERY)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        scores, classes = pool.apply(predict.scores, (X, Y, QUERY))
        np.testing.assert_array_equal(scores, expected)
        assert classes.tolist() == [0, 1, 2]
        found = pool.apply(classifier.scores, (QUERY,))
        np.testing.assert_array_equal(found, expected)


class Tokens(linen.Module):
    @linen.compact
    def __call__(self, ids, mask):
        embedded = linen.Embed(9, 4)(ids) * mask[..., None]
        return linen.Dense(WAY)(embedded.sum(1) / mask.sum(1, keepdims=True))


class TokenSpec:
    """Episodes of token ids and a mask, in the structure of ``shape``."""

    way, regression = WAY, False

    def __init__(self, shape):
        self.shape = shape

    def sample(self, key, pool):
        del pool

        def batch(key, num):
            y = jnp.arange(num, dtype=jnp.int32) % WAY
            ids = jax.random.randint(key, (num, 5), 3 * y[:, None], 3 * y[:, None] + 3)
            mask = jnp.arange(5) < 2 + y[:, None]
            return metalstm.Batch(self.shape(ids, mask.astype(jnp.float32)), y)

        return metalstm.Episode(batch(key, 6), batch(jax.random.fold_in(key, 1), 5))


@pytest.mark.parametrize(
    "shape",
    [lambda ids, mask: {"ids": ids, "mask": mask}, lambda ids, mask: (ids, mask)],
    ids=["dict", "tuple"],
)
def test_examples_that_are_dicts_or_tuples_are_saved_and_served(shape, tmp_path):
    spec = TokenSpec(shape)
    net = {"learner": metalstm.from_flax(Tokens())}
    algorithm = algorithms.maml(**net, num_steps=2)
    file = saved(algorithm, tmp_path / "it.npz", None, spec)
    predict = metalstm.load(file, **net)
    support, query = spec.sample(jax.random.key(3), None)
    expected = algorithm.predict(
        predict.params, jax.random.key(0), support, query.x, num_classes=WAY
    )
    as_lists = jax.tree.map(lambda a: np.asarray(a).tolist(), query.x)
    x = jax.tree.map(np.asarray, support.x)
    for given in (query.x, as_lists):
        scores, _ = predict.scores(x, np.asarray(support.y), given)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    classifier = predict.adapt(x, np.asarray(support.y))
    fewer = jax.tree.map(lambda a: a[:2], query.x)
    np.testing.assert_allclose(
        classifier.scores(fewer), expected[:2], rtol=1e-4, atol=1e-5
    )
    program = jax.export.deserialize(
        bytearray(classifier.export(tmp_path / "it.bin").read_bytes())
    )
    np.testing.assert_allclose(program.call(query.x), expected, rtol=1e-4, atol=1e-5)

    ids, mask = jax.tree.leaves(x)
    with pytest.raises(ValueError, match="give arrays in the same dicts and tuples"):
        predict(ids, support.y, query.x)
    with pytest.raises(
        ValueError, match=r"examples\[.*\] have the shape \(6, 4\), but"
    ):
        predict(shape(ids, mask[:, :4]), support.y, query.x)
    with pytest.raises(ValueError, match=r"examples\[.*\] are float32, but this maml"):
        predict(shape(mask, mask), support.y, query.x)
    with pytest.raises(ValueError, match=r"parts of 6 examples .* each as many rows"):
        predict(shape(ids, mask[:5]), support.y, query.x)


def test_a_classifier_is_pickled_with_its_support_set(tmp_path):
    predict = metalstm.load(saved(of_library(), tmp_path / "it.npz"))
    classifier = predict.adapt(X, [*"ccaabb"], seed=3)
    again = pickle.loads(pickle.dumps(classifier))
    assert again.seed == 3
    assert again(QUERY).tolist() == classifier(QUERY).tolist()
