"""The LSTM's step: its hand-written derivative is the derivative, of every kind."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
import tiny

from metalstm.rules.lstm_cell import lstm_step, tanh_sigmoid
from metalstm.runtime.compilation import traced_for

HIDDEN, FEATURES = 3, 2
FEW, MANY = 5, 40  # coordinates: the two layouts inside a step


def plain_step(kernel, bias, x, hidden, cell):
    """The same equations, differentiated by JAX."""
    z = kernel @ jnp.concatenate([x, hidden]) + bias[:, None]
    i, f, o, candidate = jnp.split(z, 4)
    cell = tanh_sigmoid(f) * cell + tanh_sigmoid(i) * jnp.tanh(candidate)
    return tanh_sigmoid(o) * jnp.tanh(cell), cell


def arguments(seed=0, dtype=None, coordinates=FEW):
    rows, columns = 4 * HIDDEN, FEATURES + HIDDEN
    state = (HIDDEN, coordinates)
    shapes = [(rows, columns), (rows,), (FEATURES, coordinates), state, state]
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def two_steps(step, args):
    """A scalar in which every argument and both outputs count."""
    kernel, bias, x, hidden, cell = args
    hidden, cell = step(kernel, bias, x, hidden, cell)
    hidden, cell = step(kernel, bias, x[::-1], hidden, cell)
    return jnp.sum(jnp.sin(hidden) + 0.3 * jnp.cos(2 * cell))


def kinds(step, coordinates=FEW) -> dict:
    """What may be asked of a derivative, each as a function of the arguments."""
    value = functools.partial(two_steps, step)
    along = arguments(1, coordinates=coordinates)

    def slope(args):  # a scalar made of the gradient
        dots = jax.tree.map(jnp.vdot, jax.grad(value)(args), along)
        return sum(dots)

    def stacked(args):
        return [jnp.stack([leaf, -0.5 * leaf]) for leaf in args]

    return {
        "value": value,
        "forward": lambda args: jax.jvp(value, (args,), (along,)),
        "reverse": jax.grad(value),
        "reverse over reverse": jax.grad(slope),
        "forward over reverse": lambda args: jax.jvp(
            jax.grad(value), (args,), (along,)
        ),
        "vmap": lambda args: jax.vmap(jax.grad(value))(stacked(args)),
    }


@functools.cache
def derivatives(step, coordinates, platform="cpu") -> dict:
    """Of every kind, in one program: they share most of their operations."""
    every = kinds(step, coordinates)
    fn = tiny.quick_jit(lambda args: {kind: fn(args) for kind, fn in every.items()})
    with traced_for(platform):
        return fn(arguments(coordinates=coordinates))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("coordinates", [FEW, MANY])
@pytest.mark.parametrize("kind", kinds(lstm_step))
def test_the_hand_written_derivative_is_that_of_the_equations(
    kind, coordinates, platform
):
    with jax.enable_x64(True):
        ours = derivatives(lstm_step, coordinates, platform)[kind]
        plain = derivatives(plain_step, coordinates)[kind]
        tiny.assert_close(ours, plain, rtol=1e-10, atol=1e-12)
        assert all(jnp.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(ours))


@pytest.mark.parametrize("coordinates", [FEW, MANY])
def test_less_is_kept_for_the_backward_pass_than_by_jax(coordinates):
    """Arrays [H, N]: jax 0.10 keeps 14 of the plain step, jax 0.12 keeps 11."""

    def kept(step):
        _, back = jax.vjp(step, *arguments(coordinates=coordinates))
        shapes = [leaf.shape for leaf in jax.tree.leaves(back)]
        return shapes.count((HIDDEN, coordinates))

    assert kept(lstm_step) == 6
    assert kept(plain_step) >= 11


@pytest.mark.parametrize(
    ("coordinates", "product"), [(FEW, (FEW, 4 * HIDDEN)), (MANY, (4 * HIDDEN, MANY))]
)
def test_few_coordinates_change_places_with_the_gates(coordinates, product):
    jaxpr = jax.make_jaxpr(lstm_step)(*arguments(coordinates=coordinates))
    assert f"f32[{product[0]},{product[1]}] = dot_general" in str(jaxpr)
