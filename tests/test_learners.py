"""The learner contract, and what the networks of the literature promise."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from metalstm.base import Learner, LearnerState
from metalstm.nn import conv4, from_flax, mlp, resnet12

WAY = 3


class LinenNet(nn.Module):
    """What a user might bring: batch norm at flax's momentum, and dropout."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(6)(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.num_classes)(x)


class NNXNet(nnx.Module):
    def __init__(self, num_classes: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(self.dropout(nnx.relu(x)))


class DefaultNNXNet(NNXNet):
    def __init__(self, num_classes: int = WAY, *, rngs: nnx.Rngs):
        super().__init__(num_classes, rngs=rngs)


class OwnNorm(nnx.Module):
    """A user's norm layer that is not flax's, and stops gradients."""

    def __init__(self):
        self.mean = nnx.BatchStat(jnp.zeros(8))
        self.use_running_average = False

    def __call__(self, x):
        if self.use_running_average:
            return x - self.mean[...]
        mean = x.mean((0, 2, 3))
        self.mean[...] = jax.lax.stop_gradient(0.9 * self.mean[...] + 0.1 * mean)
        return x - mean[:, None, None]


class Case(NamedTuple):
    make: object
    shape: tuple[int, ...] = (8, 8, 1)
    statistics: bool = True
    dropout: bool = False


CASES = {
    "user_linen": Case(lambda: from_flax(LinenNet(WAY)), dropout=True),
    "user_nnx": Case(
        lambda: from_flax(lambda rngs: NNXNet(WAY, rngs=rngs)), dropout=True
    ),
    "conv4": Case(lambda: conv4(WAY, 4, num_blocks=2), shape=(8, 8, 2)),
    "conv4_strided_layer": Case(
        lambda: conv4(
            WAY, 4, num_blocks=1, downsample="stride", norm="layer", initializer="flax"
        ),
        statistics=False,
    ),
    "mlp": Case(lambda: mlp(WAY, (7, 5), activation=jnp.tanh), statistics=False),
    "resnet12": Case(
        lambda: resnet12(WAY, widths=(4,), drop_rate=0.3, drop_block=2), dropout=True
    ),
}


class Bench(NamedTuple):
    case: Case
    learner: Learner
    state: LearnerState
    x: jax.Array
    apply: object


@pytest.fixture(scope="module", params=CASES)
def bench(request):
    case = CASES[request.param]
    learner = case.make()
    x = jax.random.normal(jax.random.key(1), (6, *case.shape)) + 0.5
    state = jax.jit(learner.init)(jax.random.key(0), x)
    # Averages unlike anything a pass would produce, so that a wrong one shows.
    state = state._replace(stats=jax.tree.map(lambda leaf: leaf + 0.3, state.stats))
    apply = jax.jit(learner.apply, static_argnames="norm")
    return Bench(case, learner, state, x, apply)


def assert_close(a, b, **tolerance):
    jax.tree.map(
        lambda p, q: np.testing.assert_allclose(p, q, **(tolerance or {"rtol": 1e-5})),
        a,
        b,
    )


def assert_differs(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-4


def test_an_nnx_class_and_a_partial_are_what_a_function_makes():
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    makers = [
        functools.partial(NNXNet, num_classes=WAY),
        DefaultNNXNet,
        lambda rngs: NNXNet(WAY, rngs=rngs),
    ]
    states = [from_flax(make).init(jax.random.key(0), x) for make in makers]
    for state in states[:2]:
        assert_close(state, states[2], rtol=0)


def test_state_is_float32_arrays_and_outputs_have_a_column_per_class(bench):
    assert {leaf.dtype for leaf in jax.tree.leaves(bench.state)} == {
        jnp.dtype("float32")
    }
    assert bool(jax.tree.leaves(bench.state.stats)) == bench.case.statistics
    outputs, _ = bench.apply(bench.state, bench.x, norm="batch")
    assert outputs.shape == (6, WAY)


def test_jit_matches_eager(bench):
    key = jax.random.key(3)
    eager = bench.learner.apply(bench.state, bench.x, norm="gather", key=key)
    assert_close(
        bench.apply(bench.state, bench.x, norm="gather", key=key),
        eager,
        rtol=1e-4,
        atol=1e-5,
    )


def test_state_is_a_scan_carry_and_matches_a_python_loop(bench):
    keys = jax.random.split(jax.random.key(2), 3)

    def step(state, key):
        outputs, state = bench.learner.apply(state, bench.x, norm="batch", key=key)
        return state, outputs

    scanned, outputs = jax.jit(lambda s: jax.lax.scan(step, s, keys))(bench.state)
    state = bench.state
    for key, expected in zip(keys, outputs, strict=True):
        out, state = bench.apply(state, bench.x, norm="batch", key=key)
        assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert_close(state, scanned, rtol=1e-5, atol=1e-6)


def test_vmap_over_tasks_with_their_own_state_matches_a_loop(bench):
    states = jax.tree.map(
        lambda leaf: jnp.stack([leaf, leaf * 1.1, leaf - 0.1]), bench.state
    )
    xs = jnp.stack([bench.x, bench.x * 2, bench.x + 1])
    keys = jax.random.split(jax.random.key(5), 3)

    def one(state, x, key):
        return bench.learner.apply(state, x, norm="gather", key=key)

    together = jax.jit(jax.vmap(one))(states, xs, keys)
    for i in range(3):
        pick = functools.partial(jax.tree.map, lambda leaf, i=i: leaf[i])
        alone = bench.apply(pick(states), xs[i], norm="gather", key=keys[i])
        assert_close(alone, pick(together), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "gather", "stored"])
def test_gradient_is_finite_and_reaches_every_parameter(bench, norm):
    gathered = bench.apply(bench.state, bench.x, norm="gather")[1]

    def loss(params):
        state = gathered._replace(params=params)
        outputs, _ = bench.learner.apply(state, bench.x, norm=norm)
        labels = jnp.arange(6) % WAY
        return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()

    for path, grad in jax.tree.leaves_with_path(
        jax.jit(jax.grad(loss))(bench.state.params)
    ):
        assert np.isfinite(grad).all(), path
        hidden_bias = "conv" in str(path) and "bias" in str(path)
        if norm == "stored" or not hidden_bias:
            assert np.abs(grad).max() > 0, path


def test_stored_leaves_the_averages_alone_and_uses_them(bench):
    outputs, state = bench.apply(bench.state, bench.x, norm="stored")
    jax.tree.map(np.testing.assert_array_equal, state, bench.state)
    if bench.case.statistics:
        moved = bench.state._replace(
            stats=jax.tree.map(lambda leaf: leaf * 2, bench.state.stats)
        )
        assert_differs(bench.apply(moved, bench.x, norm="stored")[0], outputs)


def test_stored_output_of_one_query_does_not_depend_on_the_others(bench):
    _, state = bench.apply(bench.state, bench.x, norm="gather")
    changed = bench.x.at[1:].set(7.0)
    ours, _ = bench.apply(state, bench.x, norm="stored")
    theirs, _ = bench.apply(state, changed, norm="stored")
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    if bench.case.statistics:
        ours, _ = bench.apply(state, bench.x, norm="batch")
        theirs, _ = bench.apply(state, changed, norm="batch")
        assert_differs(ours[0], theirs[0])


def test_batch_and_gather_normalise_by_the_batch_and_gather_forgets(bench):
    batch, after_batch = bench.apply(bench.state, bench.x, norm="batch")
    gather, after_gather = bench.apply(bench.state, bench.x, norm="gather")
    assert_close(batch, gather, rtol=1e-5, atol=1e-6)
    far = bench.state._replace(
        stats=jax.tree.map(lambda leaf: leaf + 100, bench.state.stats)
    )
    _, again = bench.apply(far, bench.x, norm="gather")
    assert_close(again.stats, after_gather.stats, rtol=0, atol=0)
    if bench.case.statistics:
        _, drifted = bench.apply(far, bench.x, norm="batch")
        difference = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b).max()), drifted.stats, after_batch.stats
        )
        assert min(jax.tree.leaves(difference)) > 1


def test_dropout_is_active_only_with_a_key(bench):
    for norm in ("batch", "stored"):
        plain, _ = bench.apply(bench.state, bench.x, norm=norm)
        again, _ = bench.apply(bench.state, bench.x, norm=norm)
        keyed, after = bench.apply(
            bench.state, bench.x, norm=norm, key=jax.random.key(7)
        )
        same, _ = bench.apply(bench.state, bench.x, norm=norm, key=jax.random.key(7))
        other, _ = bench.apply(bench.state, bench.x, norm=norm, key=jax.random.key(8))
        np.testing.assert_array_equal(plain, again)
        np.testing.assert_array_equal(keyed, same)
        assert jax.tree.structure(after) == jax.tree.structure(bench.state)
        if bench.case.dropout:
            assert_differs(plain, keyed)
            assert_differs(keyed, other)
        else:
            np.testing.assert_array_equal(plain, keyed)


@pytest.mark.parametrize("name", ["user_linen", "user_nnx"])
def test_gather_returns_the_closed_form_statistics(name):
    """Against numpy in float64, at flax's momentum of 0.99."""
    learner = CASES[name].make()
    x = np.random.default_rng(0).normal(1.5, 2.0, (20, 8, 8, 1)).astype(np.float32)
    state = learner.init(jax.random.key(0), x)
    _, state = learner.apply(state, x, norm="gather")
    layer = state.params["hidden" if name == "user_nnx" else "Dense_0"]
    kernel, bias = (np.asarray(layer[k], np.float64) for k in ("kernel", "bias"))
    hidden = x.astype(np.float64).reshape(20, -1) @ kernel + bias
    (stats,) = state.stats.values()
    np.testing.assert_allclose(stats["mean"], hidden.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["var"], hidden.var(0), rtol=1e-5)


def test_gather_is_exact_for_a_norm_layer_that_is_not_flaxs():
    learner = from_flax(lambda rngs: OwnNorm())
    x = np.random.default_rng(0).normal(1.5, 2.0, (20, 8, 8, 1)).astype(np.float32)
    state = learner.init(jax.random.key(0), x)
    _, state = learner.apply(state, x, norm="gather")
    np.testing.assert_allclose(state.stats["mean"], x.mean((0, 2, 3)), rtol=1e-5)


def test_gather_keeps_what_the_pass_does_not_average():
    class Counter(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            seen = self.variable("batch_stats", "seen", jnp.zeros, (), jnp.int32)
            fixed = self.variable("batch_stats", "fixed", lambda: jnp.float32(4))
            if train:
                seen.value += 1
            return x * fixed.value

    learner = from_flax(Counter())
    state = learner.init(jax.random.key(0), jnp.ones(2))
    for _ in range(2):
        _, state = learner.apply(state, jnp.ones(2), norm="gather")
    assert (int(state.stats["seen"]), float(state.stats["fixed"])) == (2, 4.0)


def test_batch_moves_the_average_by_the_modules_momentum():
    learner = conv4(WAY, 4, momentum=0.25, num_blocks=1)
    x = jax.random.normal(jax.random.key(0), (6, 8, 8, 1))
    state = jax.jit(learner.init)(jax.random.key(1), x)
    apply = jax.jit(learner.apply, static_argnames="norm")
    _, once = apply(state, x, norm="batch")
    _, exact = apply(state, x, norm="gather")
    expected = jax.tree.map(lambda a, b: 0.25 * a + 0.75 * b, state.stats, exact.stats)
    assert_close(once.stats, expected, rtol=1e-5, atol=1e-7)


def test_variables_of_other_kinds_are_carried():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            calls = self.variable("cache", "calls", lambda: jnp.float32(0))
            if not self.is_initializing():
                calls.value += 1
            return x

    class Calls(nnx.Variable):
        pass

    class NNX(nnx.Module):
        def __init__(self):
            self.calls = Calls(jnp.float32(0))

        def __call__(self, x):
            self.calls[...] += 1
            return x

    for module in (Linen(), lambda rngs: NNX()):
        learner = from_flax(module)
        state = learner.init(jax.random.key(0), jnp.ones(2))
        for _ in range(3):
            _, state = learner.apply(state, jnp.ones(2), norm="batch")
        assert jax.tree.leaves(state.other) == [3.0]


@pytest.mark.parametrize(
    ("options", "shape", "count"),
    [
        ({"filters": 32}, (84, 84, 3), 32_901),  # Ravi & Larochelle
        ({"filters": 32, "downsample": "stride"}, (28, 28, 1), 28_965),
        ({"filters": 64}, (28, 28, 1), 111_936 + 5 * 64 + 5),
    ],
)
def test_conv4_has_the_published_number_of_parameters(options, shape, count):
    learner = conv4(5, **options)
    state = jax.eval_shape(learner.init, jax.random.key(0), jnp.zeros((1, *shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == count


@pytest.mark.parametrize("downsample", ["max_pool", "stride"])
def test_conv4_computes_what_flax_layers_compute(downsample):
    """Pooling before normalising, and the folded bias, change nothing."""

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            pooled = downsample == "max_pool"
            for i in (1, 2):
                x = nn.Conv(4, (3, 3), 1 if pooled else 2, name=f"conv{i}")(x)
                x = nn.BatchNorm(
                    not train, epsilon=1e-3, momentum=0.05, name=f"norm{i}"
                )(x)
                x = nn.relu(x)
                x = nn.max_pool(x, (2, 2), (2, 2)) if pooled else x
            return nn.Dense(WAY, name="head")(x.reshape(len(x), -1))

    ours = conv4(WAY, 4, num_blocks=2, downsample=downsample)
    theirs = from_flax(Plain())
    x = jax.random.normal(jax.random.key(1), (6, 9, 10, 2)) + 0.5
    state = jax.jit(ours.init)(jax.random.key(0), x)
    # Scales and biases of either sign, averages away from their start.
    state = jax.tree.map(
        lambda leaf: leaf + jax.random.uniform(jax.random.key(2), leaf.shape), state
    )
    for name in ("norm1", "norm2"):
        scale = state.params[name]["scale"]
        state.params[name]["scale"] = scale * jnp.array([1, -1, 1, -1])

    def run(learner, norm):
        def loss(params):
            outputs, after = learner.apply(state._replace(params=params), x, norm=norm)
            return jnp.sin(outputs).sum(), (outputs, after)

        return jax.jit(jax.grad(loss, has_aux=True))(state.params)

    for norm in ("batch", "gather", "stored"):
        leaves = (jax.tree.leaves(run(learner, norm)) for learner in (ours, theirs))
        for a, b in zip(*leaves, strict=True):
            # A bias before a batch norm has gradient 0, in flax up to rounding.
            atol = 1e-5 + 1e-3 * np.abs(b).max()
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol)


def test_resnet12_has_the_usual_number_of_parameters():
    state = jax.eval_shape(
        resnet12(5).init, jax.random.key(0), jnp.zeros((1, 84, 84, 3))
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == 12_424_320 + 5 * 640 + 5


def test_initialisation_follows_the_options():
    x = jnp.zeros((1, 16, 16, 3))
    torch = conv4(5, 8, scale_init="uniform", num_blocks=1)
    torch = jax.jit(torch.init)(jax.random.key(0), x).params
    bound = (9 * 3) ** -0.5
    assert bound * 0.9 < float(jnp.abs(torch["conv1"]["kernel"]).max()) <= bound
    assert 0 < float(jnp.abs(torch["conv1"]["bias"]).max()) <= bound
    assert (
        0
        < float(torch["norm1"]["scale"].min())
        < float(torch["norm1"]["scale"].max())
        < 1
    )
    flax = conv4(5, 8, initializer="flax", zero_head=True, num_blocks=1)
    flax = jax.jit(flax.init)(jax.random.key(0), x)
    assert float(jnp.abs(flax.params["conv1"]["kernel"]).max()) > bound
    assert not flax.params["conv1"]["bias"].any()
    assert not flax.params["head"]["kernel"].any()
    assert (flax.params["norm1"]["scale"] == 1).all()


@pytest.mark.parametrize(
    "learner",
    [conv4(None, 4, num_blocks=1), mlp(None, (9,)), resnet12(None, widths=(2,))],
)
def test_without_classes_the_features_come_out(learner):
    x = jnp.ones((2, 8, 8, 1))

    def init_and_apply(key):
        state = learner.init(key, x)
        return learner.apply(state, x, norm="batch")

    outputs, state = jax.eval_shape(init_and_apply, jax.random.key(0))
    assert outputs.ndim == 2
    assert "head" not in state.params


def test_drop_block_zeroes_squares_at_its_rate():
    from metalstm.nn import layers

    x = jnp.ones((64, 12, 12, 3))
    dropped = layers.drop_block(jax.random.key(0), x, rate=0.2, block=3)
    assert 0.12 < float((dropped == 0).mean()) < 0.25
    assert float(dropped.mean()) == pytest.approx(1, abs=1e-3)


def test_mistakes_name_the_remedy():
    x = jnp.ones((2, 8, 8, 1))
    with pytest.raises(ValueError, match=r"already drawn.*lambda rngs: NNXNet"):
        from_flax(NNXNet(5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"pass a Linen module \(an instance\)"):
        from_flax(LinenNet)
    with pytest.raises(
        ValueError, match=r"needs num_classes too: .*num_classes=\.\.\."
    ):
        from_flax(NNXNet)
    with pytest.raises(ValueError, match="returned a LinenNet"):
        from_flax(lambda rngs: LinenNet(5)).init(jax.random.key(0), x)

    class NoSwitch(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=False)(x)

    with pytest.raises(ValueError, match="take `train: bool`"):
        from_flax(NoSwitch()).init(jax.random.key(0), x)
    learner = mlp(5)
    state = learner.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="norm='own': choose"):
        learner.apply(state, x, norm="own")
    with pytest.raises(ValueError, match="at least 16 x 16 pixels"):
        conv4(5).init(jax.random.key(0), x)
    for name, value in [
        ("downsample", "average"),
        ("norm", "instance"),
        ("initializer", "he"),
        ("scale_init", "zeros"),
    ]:
        with pytest.raises(ValueError, match=f"{name}='{value}': choose one of"):
            conv4(5, **{name: value})
