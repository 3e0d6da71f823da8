"""A gradient whose own derivative is taken forward over reverse (mixed mode).

The derivative of a gradient, in a backward pass, is a Hessian-vector product. Reverse
over reverse, JAX's own way, stores all that the gradient computed until it is needed.
But a Hessian is symmetric, so the product is also the derivative of the gradient
*along* the vector, for which nothing is stored but the point at which it is taken:
MixFlow-MG (Kemaev et al., 2025, arXiv:2505.00793).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from metalstm.base import Array, PyTree

__all__ = ["value_and_gradient"]


def value_and_gradient(
    loss_fn: Callable[..., tuple[Array, PyTree]], params: PyTree, *args: Any
) -> tuple[Array, PyTree, PyTree]:
    r"""Return (loss, aux, gradient by ``params``) of ``loss_fn(params, *args)``.

    ``loss_fn`` returns (loss, aux); a loss that is a vector counts as its sum. With
    cotangents l, s, v of the three outputs, and z for ``args`` and every array that
    ``loss_fn`` closes over, the backward pass gives (params, z)

    .. math:: \frac{d}{d\epsilon} \, G(\theta + \epsilon v, z; 1 + \epsilon l,
        \epsilon s) \Big|_{\epsilon = 0}

    G(theta, z; a, b) being the derivative of a . loss + b . aux by (theta, z). It is
    exact, in z too, and one pass. It has reverse derivatives of any order, and forward
    ones of these; `jax.jvp` of the function itself raises a TypeError.
    """
    # a custom_vjp may close over nothing that is traced, integers included, which
    # jax.closure_convert leaves where they are: here all of z becomes arguments
    closed, shapes = jax.make_jaxpr(loss_fn, return_shape=True)(params, *args)
    treedef = jax.tree.structure(shapes)
    given = jax.tree.leaves(args)
    z = [*given, *closed.consts]
    has_derivative = [_is_inexact(x) for x in z]

    def fn(params: PyTree, smooth: list, discrete: list) -> PyTree:
        smooth_z, discrete_z = iter(smooth), iter(discrete)
        z = [next(smooth_z if has else discrete_z) for has in has_derivative]
        pure = jaxpr_as_fun(closed.replace(consts=z[len(given) :]))
        out = pure(*jax.tree.leaves(params), *z[: len(given)])
        return jax.tree.unflatten(treedef, out)

    def gradient(params: PyTree, smooth: list, discrete: list):
        def total(params):
            loss, aux = fn(params, smooth, discrete)
            return jnp.sum(loss), (loss, aux)

        grads, (loss, aux) = jax.grad(total, has_aux=True)(params)
        return loss, aux, grads

    def forward(*inputs):
        return gradient(*inputs), inputs

    def backward(inputs, cotangents):
        params, smooth, discrete = inputs
        *of_values, along = cotangents  # l and s; v
        of_values = [c for c in jax.tree.leaves(of_values) if _is_inexact(c)]

        def pull_back(params, cotangents):  # G(theta, z; a, b)
            def values(params, smooth):
                leaves = jax.tree.leaves(fn(params, smooth, discrete))
                return [leaf for leaf in leaves if _is_inexact(leaf)]

            return jax.vjp(values, params, smooth)[1](cotangents)

        # at a = 1, b = 0, along (v, l, s)
        at = [jnp.ones_like(of_values[0]), *map(jnp.zeros_like, of_values[1:])]
        _, tangents = jax.jvp(pull_back, (params, at), (along, of_values))
        return *tangents, None

    # its forward pass is the undecorated function, which has derivatives of every mode
    mixed = jax.custom_vjp(gradient)
    mixed.defvjp(forward, backward)
    smooth = [x for x, has in zip(z, has_derivative, strict=True) if has]
    discrete = [x for x, has in zip(z, has_derivative, strict=True) if not has]
    return mixed(params, smooth, discrete)


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)
