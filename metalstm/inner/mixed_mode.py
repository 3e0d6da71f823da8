"""A gradient whose own derivative is taken forward over reverse (mixed mode).

The derivative of a gradient on the way back is a Hessian-vector product. Reverse over
reverse, JAX's own way, stores all that the gradient computed, until it is there. But a
Hessian is symmetric, so the product may as well be the derivative of the gradient
*along* the vector, and for that nothing is stored but where it is taken: MixFlow-MG
(Kemaev et al., 2025, arXiv:2505.00793).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from metalstm.base import Array, PyTree

__all__ = ["value_and_gradient"]


def value_and_gradient(
    loss_fn: Callable[..., tuple[Array, PyTree]], params: PyTree, *args: Any
) -> tuple[Array, PyTree, PyTree]:
    r"""Return (loss, aux, gradient by ``params``) of ``loss_fn(params, *args)``.

    ``loss_fn`` returns (loss, aux); a loss that is a vector counts as its sum. With
    cotangents l, s, v of the three outputs, and z for ``args`` and every array that
    ``loss_fn`` closes over, what goes back to (params, z) is

    .. math:: \frac{d}{d\epsilon} \, G(\theta + \epsilon v, z; 1 + \epsilon l,
        \epsilon s) \Big|_{\epsilon = 0}

    G(theta, z; a, b) being the derivative of a . loss + b . aux by (theta, z). It is
    exact, in z too, and one pass. It has reverse derivatives of any order, and forward
    ones of these; `jax.jvp` of the function itself raises a TypeError.
    """
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    treedef = jax.tree.structure(shapes)
    # a custom_vjp may close over nothing that is traced: all of z becomes arguments
    given = jax.tree.leaves(args)
    z = [*given, *closed.consts]
    smooth = [_is_inexact(x) for x in z]

    def fn(params: PyTree, moving: list, fixed: list) -> PyTree:
        moving_z, fixed_z = iter(moving), iter(fixed)
        z = [next(moving_z if own else fixed_z) for own in smooth]
        pure = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, z[len(given) :]))
        out = pure(*jax.tree.leaves(params), *z[: len(given)])
        return jax.tree.unflatten(treedef, out)

    def gradient(params: PyTree, moving: list, fixed: list):
        def total(params):
            loss, aux = fn(params, moving, fixed)
            return jnp.sum(loss), (loss, aux)

        grads, (loss, aux) = jax.grad(total, has_aux=True)(params)
        return loss, aux, grads

    def forward(*inputs):
        return gradient(*inputs), inputs

    def backward(inputs, cotangents):
        params, moving, fixed = inputs
        *of_values, along = cotangents
        of_values = [c for c in jax.tree.leaves(of_values) if _is_inexact(c)]

        def pull_back(params, cotangents):
            def values(params, moving):
                leaves = jax.tree.leaves(fn(params, moving, fixed))
                return [leaf for leaf in leaves if _is_inexact(leaf)]

            return jax.vjp(values, params, moving)[1](cotangents)

        at = [jnp.ones_like(of_values[0]), *map(jnp.zeros_like, of_values[1:])]
        _, products = jax.jvp(pull_back, (params, at), (along, of_values))
        return *products, None

    # its forward pass is the undecorated function, which has derivatives of every mode
    mixed = jax.custom_vjp(gradient)
    mixed.defvjp(forward, backward)
    moving = [x for x, own in zip(z, smooth, strict=True) if own]
    fixed = [x for x, own in zip(z, smooth, strict=True) if not own]
    return mixed(params, moving, fixed)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
