"""`save`, `load` and predictors: what was trained predicts alike elsewhere."""

from __future__ import annotations

import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import metalstm
from metalstm import algorithms, data, nn, rules
from metalstm.batches import as_vectors
from metalstm.records import to_spec
from metalstm.runtime.splitting import split_function

WAY, SHOT = 3, 2
RNG = np.random.default_rng(0)
POOL = data.make_pool(RNG.integers(0, 256, (6, 8, 5, 5, 1)).astype(np.uint8))
SPEC = data.EpisodeSpec(WAY, SHOT, 3, normalise=data.Normalisation((0.4,), (0.3,)))
X = np.concatenate([np.asarray(POOL.of_class(c))[:SHOT] for c in range(WAY)])
LABELS = ["c", "c", "a", "a", "b", "b"]
QUERY = np.concatenate([np.asarray(POOL.of_class(c))[4:7] for c in range(WAY)])


def trained(algorithm, spec=SPEC, pool=POOL):
    """Meta-parameters for tasks like those of ``spec``."""
    episode = spec.sample(data.episode_key(0, "train", 0), pool)
    return algorithm.init(jax.random.key(0), algorithm.train_sampler(spec) and episode)


def mlp(num_classes=WAY, **options):
    return nn.mlp(num_classes, widths=(7,), **options)


BUILT_IN = {
    "anil": lambda: algorithms.anil(mlp(), num_steps=2),
    "chain": lambda: algorithms.learned_init(
        mlp(),
        rules.chain(rules.learned_sgd(0.1), rules.lstm_gates(hidden_size=2)),
        num_steps=2,
        differentiation=metalstm.second_order(last=1),
    ),
    "gradient_agreement": lambda: algorithms.gradient_agreement(algorithms.maml(mlp())),
    "hallucination": lambda: algorithms.hallucination(mlp(None)),
    "logistic_regression": lambda: algorithms.logistic_regression(penalty=2.0),
    "maml": lambda: algorithms.maml(mlp(), 0.3, num_steps=2),
    "mann": lambda: algorithms.mann(mlp(None), WAY, num_slots=9, slot_size=5),
    "matching": lambda: algorithms.matching(mlp(None), context_steps=2),
    "meta_lstm": lambda: algorithms.meta_lstm(
        nn.tied_head(mlp(None)), rules.lstm_gates(hidden_size=3), num_steps=2
    ),
    "meta_sgd": lambda: algorithms.meta_sgd(mlp(), (0.1, 0.2)),
    "nearest_neighbour": lambda: algorithms.nearest_neighbour(),
    "prototypical": lambda: algorithms.prototypical(mlp(None)),
    "siamese": lambda: algorithms.siamese(mlp(None)),
}


Y = jnp.asarray(np.unique(LABELS, return_inverse=True)[1], jnp.int32)


def scores_of(algorithm, params, *, x=X, y=Y):
    """What the method itself says of x, prepared as an episode is."""
    scale = lambda x: (jnp.asarray(x, jnp.float32) / 255 - 0.4) / 0.3  # noqa: E731
    predict = jax.jit(algorithm.predict, static_argnames="num_classes")
    support = metalstm.Batch(scale(x), y)
    return predict(params, jax.random.key(0), support, scale(QUERY), num_classes=WAY)


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_loaded_predicts_what_was_saved(name, tmp_path):
    algorithm = BUILT_IN[name]()
    params = trained(algorithm)
    path = metalstm.save(tmp_path / "it", algorithm, params, POOL, SPEC)
    predict = metalstm.load(path)
    jax.tree.map(np.testing.assert_array_equal, predict.params, params)
    assert jax.tree.structure(predict.params) == jax.tree.structure(params)
    scores, classes = predict.scores(X, LABELS, QUERY)
    assert classes.tolist() == ["a", "b", "c"]
    expected = scores_of(algorithm, params)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    again, _ = pickle.loads(pickle.dumps(predict)).scores(X, LABELS, QUERY)
    np.testing.assert_array_equal(again, scores)
    with zipfile.ZipFile(path) as archive:
        assert not any(b"pickle" in archive.read(name) for name in archive.namelist())
    # every argument is in the file: a spec builds the same method again
    spec, given = to_spec(algorithm)
    assert not given
    assert to_spec(predict.algorithm)[0] == json.loads(json.dumps(spec))


class Net(linen.Module):
    squared: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6)(as_vectors(x))
        return linen.Dense(WAY)(jnp.square(x) if self.squared else jnp.tanh(x))


def test_a_network_of_ones_own_is_given_again_and_is_the_same(tmp_path):
    algorithm = algorithms.learned_init(
        metalstm.from_flax(Net()),
        optax.sgd(0.1),
        num_steps=2,
        differentiation=metalstm.first_order(),
    )
    params = trained(algorithm)
    path = metalstm.save(tmp_path / "own.npz", algorithm, params, POOL, SPEC)
    own = {"learner": metalstm.from_flax(Net()), "rule": optax.sgd(0.1)}
    predict = metalstm.load(path, **own)
    assert predict.way == WAY
    expected = scores_of(algorithm, params)
    np.testing.assert_allclose(
        predict.scores(X, LABELS, QUERY)[0], expected, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(TypeError, match="without a file cannot be pickled"):
        pickle.dumps(predict)
    with pytest.raises(ValueError, match=r"give load learner=, rule= \(it got nothing"):
        metalstm.load(path)
    other = own | {"learner": metalstm.from_flax(Net(squared=True))}
    with pytest.raises(
        ValueError, match="learner=, rule= predicts otherwise than what"
    ):
        metalstm.load(path, **other)
    with pytest.raises(ValueError, match="predicts otherwise"):
        metalstm.load(path, **(own | {"rule": optax.sgd(0.7)}))
    wider = own | {"learner": mlp()}
    with pytest.raises(ValueError, match=r"not the algorithm's parameters: params\.le"):
        metalstm.load(path, **wider)
    # a field replaced is no longer what the constructor made
    changed = algorithm._replace(query_norm=None)
    metalstm.save(path, changed, params, POOL, SPEC)
    with pytest.raises(ValueError, match=r"give load algorithm= \(it got learner, ru"):
        metalstm.load(path, **own)
    assert metalstm.load(path, algorithm=changed).algorithm is changed


def test_what_is_no_file_of_save_is_refused(tmp_path):
    algorithm = algorithms.prototypical(mlp(None))
    path = tmp_path / "it.npz"
    with pytest.raises(ValueError, match="params: these are not the algorithm's param"):
        metalstm.save(path, algorithm, {"w": jnp.ones(2)}, POOL, SPEC)
    with pytest.raises(ValueError, match="info= must be JSON"):
        metalstm.save(path, algorithm, trained(algorithm), POOL, SPEC, info={"a": {1}})
    with pytest.raises(FileNotFoundError, match=r"metalstm\.save writes them"):
        metalstm.load(path)
    metalstm.save(path, algorithm, trained(algorithm), POOL, SPEC)
    whole = path.read_bytes()
    for content in (
        b"text",
        whole[:-9],
        whole.replace(b"prototypical", b"Prototypical"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a metalstm.* file|is damaged"):
            metalstm.load(path)
    rules.save_rule(path, {"rule": "l2l"}, rules.l2l().init(jax.random.key(0), 0.0))
    with pytest.raises(ValueError, match=r"is damaged \(its digest|is not a metalstm"):
        metalstm.load(path)
    nets = [metalstm.from_flax(Net()) for _ in range(2)]
    two = algorithms.relation(*nets, train_way=WAY)
    assert len(to_spec(two)[1]) == 2


@pytest.mark.parametrize("kind", ["embeddings", "bfloat16", "tokens", "regression"])
def test_examples_of_other_kinds_are_taken_as_in_training(kind, tmp_path):
    if kind == "regression":
        spec, pool = data.SinusoidSpec(shot=4), None
        algorithm = algorithms.maml(mlp(1), num_steps=1)
        x, y = np.linspace(-1, 1, 4)[:, None], np.arange(4.0)
    else:
        numbers = RNG.normal(9, 4, (5, 6, 3)).astype(np.float32)
        types = {"tokens": jnp.int32, "bfloat16": jnp.bfloat16}
        numbers = numbers.astype(types.get(kind, jnp.float32))
        pool, spec = data.make_pool(numbers), data.EpisodeSpec(2, 1, 1)
        algorithm = algorithms.nearest_neighbour()
        x, y = numbers[:2, 0], [7, 9]
    params = trained(algorithm, spec, pool)
    path = metalstm.save(tmp_path / "it.npz", algorithm, params, pool, spec)
    predict = metalstm.load(path)
    found = predict(x, y, x)
    if kind == "regression":
        support = metalstm.Batch(jnp.asarray(x, "f"), jnp.asarray(y, "f")[:, None])
        key = jax.random.key(0)
        same = algorithm.predict(params, key, support, support.x, num_classes=None)
        np.testing.assert_allclose(found, same, rtol=1e-5, atol=1e-6)
    else:
        assert found.tolist() == y
    if kind == "tokens":
        with pytest.raises(
            ValueError, match="examples are float32, but this nearest_n"
        ):
            predict(x.astype(np.float32), y, x)
        with pytest.raises(ValueError, match="8589934592, which int32 does not hold"):
            predict(x.astype(np.int64) + 2**33 * (x == x.max()) - x, y, x)


def test_scores_that_are_nan_are_no_answer(tmp_path):
    pool = data.make_pool(RNG.normal(size=(5, 6, 3)).astype(np.float32))
    spec, algorithm = data.EpisodeSpec(2, 1, 1), algorithms.prototypical(mlp(None))
    params = trained(algorithm, spec, pool)
    predict = metalstm.load(
        metalstm.save(tmp_path / "it.npz", algorithm, params, pool, spec)
    )
    classifier = predict.adapt(np.eye(3)[:2], ["a", "b"])
    queries = np.eye(3)[[0, 1, 1]]
    queries[1, 0] = np.nan
    assert np.isnan(classifier.scores(queries)).any(-1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"1 of 3 queries .* the first is query 1: "):
        classifier(queries)


def counted(predict, monkeypatch):
    """Count compilations of the method, by shapes."""
    shapes = []
    inner = predict.algorithm.predict

    def noted(params, key, support, query, *, num_classes):
        shapes.append((support.x.shape[0], query.shape[0]))
        return inner(params, key, support, query, num_classes=num_classes)

    object.__setattr__(predict, "algorithm", predict.algorithm._replace(predict=noted))
    return shapes


@pytest.mark.parametrize("name", ["maml", "prototypical"])
def test_few_programs_serve_any_number_of_queries(name, tmp_path, monkeypatch):
    algorithm = BUILT_IN[name]()
    params = trained(algorithm)
    predict = metalstm.load(
        metalstm.save(tmp_path / "it.npz", algorithm, params, POOL, SPEC)
    )
    shapes = counted(predict, monkeypatch)
    classifier = predict.adapt(X, LABELS)
    whole = classifier.scores(QUERY)
    for num in range(1, 9):
        np.testing.assert_allclose(
            classifier.scores(QUERY[:num]), whole[:num], rtol=1e-5, atol=1e-6
        )
    assert len(classifier._adapted) == 1  # adapted once
    assert classifier(QUERY[:0]).shape == (0,)
    # 6 support examples are 8 rows: 5 and 7 need no other program
    fewer, more = X[:5], np.concatenate([X, QUERY[:1]])
    for x, labels in ((fewer, LABELS[:5]), (more, [*LABELS, "c"])):
        found, _ = predict.scores(x, labels, QUERY)
        y = jnp.asarray(np.unique(labels, return_inverse=True)[1], jnp.int32)
        expected = scores_of(algorithm, params, x=x, y=y)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert sorted(shapes) == [(8, n) for n in (1, 2, 4, 8, 16)]


def test_queries_that_depend_on_each_other_are_found_out(tmp_path):
    net = nn.conv4(WAY, filters=3, num_blocks=1)
    algorithm = algorithms.maml(net, num_steps=1, query_norm="transductive")
    params = trained(algorithm)
    predict = metalstm.load(
        metalstm.save(tmp_path / "it.npz", algorithm, params, POOL, SPEC)
    )
    classifier = predict.adapt(X, LABELS)
    with pytest.warns(RuntimeWarning) as said:
        scores = classifier.scores(QUERY)
    assert [str(warning.message).split(" there")[0] for warning in said] == [
        f"an answer of this maml depends on how many {what}"
        for what in ("support examples", "queries")
    ]
    expected = scores_of(algorithm, params)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    few = classifier.scores(QUERY[:5])  # said once
    assert np.abs(few - scores[:5]).max() > 1e-4


def test_a_split_function_is_the_function():
    def fn(a, b, x):
        scale = jax.jit(lambda a: jnp.where(a > 0, a, 0.0) + 1)(a)
        total = jax.lax.fori_loop(0, 3, lambda _, c: c * b, jnp.ones(()))
        both = jax.jit(lambda s, x, two: (jnp.maximum(s, 0) * two, jax.nn.relu(x) + s))
        left, right = both(scale, x, 2.0)
        return {"alone": total, "left": left, "right": right @ a, "x": x}

    a, b, x = jnp.arange(3.0), jnp.float32(2), jnp.ones((4, 3))
    split = split_function(fn, a, b, x)
    kept = jax.jit(split.earlier)(a, b)
    expected = fn(a, b, -x)
    for later in (split.later, jax.jit(split.later)):
        jax.tree.map(np.testing.assert_array_equal, later(kept, -x), expected)
    later = str(jax.make_jaxpr(split.later)(kept, x))
    assert "while" not in later
    assert "scan" not in later


@pytest.mark.parametrize(
    "targets", [["a"] * 5, [np.nan] * 5, [[1.0], [2.0, 3.0]] * 2 + [[1.0]], [[]] * 5]
)
def test_targets_that_are_no_finite_numbers_are_refused(targets, tmp_path):
    spec = data.SinusoidSpec(shot=5)
    method = algorithms.maml(nn.mlp(1, (4,)))
    params = method.init(jax.random.key(0), spec.sample(jax.random.key(1), None))
    predict = metalstm.load(
        metalstm.save(tmp_path / "m.npz", method, params, None, spec)
    )
    x = np.linspace(-1, 1, 5, dtype=np.float32)[:, None]
    with pytest.raises(ValueError, match=r"targets are .* finite"):
        predict.adapt(x, targets)
    assert predict(x, x[:, 0], x).shape == (5, 1)


def test_a_transform_in_a_chain_is_given_again(tmp_path):
    clip = optax.clip(0.1)
    rule = rules.chain(rules.lstm_gates(hidden_size=0), clip)
    how = {"num_steps": 1, "differentiation": metalstm.first_order()}
    algorithm = algorithms.learned_init(mlp(WAY), rule, **how)
    params = trained(algorithm)
    path = metalstm.save(tmp_path / "it.npz", algorithm, params, POOL, SPEC)
    with pytest.raises(ValueError, match=r"parts="):
        metalstm.load(path)
    scores, _ = metalstm.load(path, parts=clip).scores(X, LABELS, QUERY)
    expected = scores_of(algorithm, params)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_pool_in_host_memory_stays_there(tmp_path, monkeypatch):
    numbers = RNG.normal(size=(5, 6, 3)).astype(np.float32)
    pool, spec = data.make_pool(numbers, in_host_memory=True), data.EpisodeSpec(2, 1, 1)
    algorithm = algorithms.prototypical(mlp(None))
    params = trained(algorithm, spec, pool)

    def refuse(pool):
        raise AssertionError("all of it is read")

    monkeypatch.setattr(type(pool), "images", property(refuse))
    path = metalstm.save(tmp_path / "it.npz", algorithm, params, pool, spec)
    x = numbers[:2, 0]
    assert metalstm.load(path)(x, [7, 9], x).tolist() == [7, 9]
