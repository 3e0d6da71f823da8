"""Modules that users bring: their signatures, inputs, types, and a part of them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tiny import quick_jit

from metalstm import algorithms, rules
from metalstm.base import Batch, Episode
from metalstm.nn import from_flax


class WithTrain(nnx.Module):
    def __init__(self, num_classes: int = 3, *, rngs: nnx.Rngs):
        self.layer = nnx.Linear(4, num_classes, rngs=rngs)
        self.norm = nnx.BatchNorm(num_classes, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, train):
        x = self.norm(self.layer(x), use_running_average=not train)
        return self.dropout(x, deterministic=not train)


class WithDeterministic(WithTrain):
    def __call__(self, x, *, deterministic):  # type: ignore[override]
        return self.dropout(self.norm(self.layer(x)), deterministic=deterministic)


class LinenWithTrain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))
        return nn.Dropout(0.5, deterministic=not train)(x)


class Tokens(nn.Module):
    @nn.compact
    def __call__(self, ids, mask):
        embedded = nn.Embed(7, 4)(ids) * mask[..., None]
        return nn.Dense(3)(embedded.sum(1) / mask.sum(1, keepdims=True))


class TokensNNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(7, 4, rngs=rngs)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, ids, mask):
        embedded = self.embed(ids) * mask[..., None]
        return self.out(embedded.sum(1) / mask.sum(1, keepdims=True))


class OneDict(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Tokens()(x["ids"], x["mask"])


MODULES = {
    "x, train": functools.partial(WithTrain, 3),
    "x, *, deterministic": WithDeterministic,
    "Linen x, train": LinenWithTrain(),
    "a function of rngs": lambda rngs: WithTrain(3, rngs=rngs),
    "a function of keyword rngs": lambda *, rngs: WithTrain(3, rngs=rngs),
}


@pytest.mark.parametrize("name", MODULES)
def test_switches_are_passed_and_the_key_alone_switches_dropout(name):
    learner = from_flax(MODULES[name])
    x = jax.random.normal(jax.random.key(0), (20, 4)) + 2
    state = learner.init(jax.random.key(1), x)
    batch, after = learner.apply(state, x, norm="batch")
    np.testing.assert_allclose(batch.mean(0), 0, atol=1e-5)
    assert all(
        bool((a != b).any())
        for a, b in zip(
            jax.tree.leaves(after.stats), jax.tree.leaves(state.stats), strict=True
        )
    )
    stored, _ = learner.apply(state, x, norm="stored")
    assert jnp.abs(stored.mean(0)).max() > 0.1
    dropped, _ = learner.apply(state, x, norm="batch", key=jax.random.key(2))
    assert 0.2 < (dropped == 0).mean() < 0.8


IDS = jnp.array([[1, 2, 3], [4, 5, 0], [6, 0, 0], [2, 2, 2]])
MASK = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1.0]])
PAIR, NAMED = (IDS, MASK), {"mask": MASK, "ids": IDS}


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (Tokens(), PAIR),
        (Tokens(), NAMED),
        (TokensNNX, PAIR),
        (TokensNNX, NAMED),
        (OneDict(), NAMED),
    ],
)
def test_inputs_of_several_parts_are_the_arguments(module, x):
    learner = from_flax(module)
    maml = algorithms.maml(learner, 0.1, num_steps=2)
    y = jnp.array([0, 1, 2, 0])
    episode = Episode(Batch(x, y), Batch(x, y))
    params = maml.init(jax.random.key(0), episode)
    grads = quick_jit(jax.grad(lambda p: maml.loss(p, jax.random.key(1), episode)[0]))(
        params
    )
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    expected, _ = learner.apply(params.learner, x, norm="batch")
    changed = jax.tree.map(lambda a: a.at[..., -1].set(0), x)  # what the mask hides
    same, _ = learner.apply(params.learner, changed, norm="batch")
    np.testing.assert_allclose(same[1:3], expected[1:3], rtol=1e-6)


@pytest.mark.parametrize("module", [Tokens(), TokensNNX])
def test_inputs_that_do_not_fit_are_refused(module):
    for x in (IDS, (IDS,), (IDS, MASK, MASK), {"ids": IDS, "masks": MASK}):
        with pytest.raises(ValueError, match="__call__ takes ids, mask, and x has"):
            from_flax(module).init(jax.random.key(0), x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("linen", [True, False])
def test_any_float_type_adapts(dtype, linen):
    with jax.enable_x64(dtype == "float64"):
        options = {"dtype": dtype, "param_dtype": dtype}
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4, 4, 1)), dtype)
        if linen:
            flat = lambda a: a.reshape(a.shape[0], -1)  # noqa: E731
            layers = [nn.Conv(2, (3, 3), **options), flat, nn.Dense(3, **options)]
            learner = from_flax(nn.Sequential(layers))
        else:
            learner = from_flax(
                lambda rngs: nnx.Sequential(
                    nnx.Conv(1, 2, (3, 3), rngs=rngs, **options),
                    lambda a: nnx.max_pool(a, (2, 2), (2, 2)).reshape(len(a), -1),
                    nnx.Linear(8, 3, rngs=rngs, **options),
                )
            )
        maml = algorithms.maml(learner, 0.1, num_steps=2)
        episode = Episode(*[Batch(x, jnp.arange(6) % 3)] * 2)
        params = maml.init(jax.random.key(0), episode)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
        loss = lambda p: maml.loss(p, jax.random.key(1), episode)[0]  # noqa: E731
        grads = quick_jit(jax.grad(loss))(params)
        assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))


class Large(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.body(x)))


class LargeLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="body")(x)))


def is_head(path, parameter):
    del parameter
    return "head" in path


@pytest.mark.parametrize(
    ("module", "wrt", "count"),
    [
        (Large, nnx.LoRAParam, 4 * 2 + 2 * 8),
        (Large, (nnx.LoRAParam, nnx.PathContains("head")), 24 + 27),
        (Large, is_head, 27),
        (LargeLinen(), nnx.PathContains("head"), 27),
        (LargeLinen(), is_head, 27),
    ],
)
def test_a_part_is_adapted_and_learned_and_the_rest_is_fixed(module, wrt, count):
    learner, x = from_flax(module, wrt=wrt), jnp.ones((6, 4))
    maml = algorithms.maml(learner, 0.1, num_steps=2)
    episode = Episode(*[Batch(x, jnp.arange(6) % 3)] * 2)
    params = maml.init(jax.random.key(0), episode)
    assert sum(leaf.size for leaf in jax.tree.leaves(params.learner.params)) == count
    whole = from_flax(module)
    state = whole.init(jax.random.key(0), x)
    drawn = learner.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        learner.apply(drawn, x, norm="batch")[0], whole.apply(state, x, norm="batch")[0]
    )
    grads = quick_jit(jax.grad(lambda p: maml.loss(p, jax.random.key(1), episode)[0]))(
        params
    )
    assert all(not g.any() for g in jax.tree.leaves(grads.learner.other))
    assert any(bool(g.any()) for g in jax.tree.leaves(grads.learner.params))
    with pytest.raises(ValueError, match=r"selects no parameter of .*head.kernel"):
        from_flax(module, wrt=nnx.PathContains("neck")).init(jax.random.key(0), x)


@pytest.mark.parametrize("part", ["head", is_head])
def test_a_part_is_adapted_and_all_of_it_is_learned(part):
    learner, x = from_flax(LargeLinen()), jnp.ones((6, 4))
    rule = rules.only(optax.sgd(0.1), part)
    state = learner.init(jax.random.key(0), x)
    tx = rule.bind(rule.init(jax.random.key(0), state.params))
    moved, _ = tx.update(state.params, tx.init(state.params), state.params)
    assert not moved["body"]["kernel"].any()
    assert moved["head"]["kernel"].any()
