"""The layers that the networks of `metalstm.nn.networks` are built of.

Shapes: N images, H rows, W columns, C channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from metalstm.base import Array
from metalstm.batches import to_rank_of
from metalstm.nn.convolution import Method, conv2d
from metalstm.nn.pooling import max_pool, scaled_max_pool
from metalstm.runtime.products import full_precision, layer_product

__all__ = [
    "BatchNorm",
    "Conv",
    "Initializer",
    "NormKind",
    "ScaleInit",
    "dense_layer",
    "drop_block",
    "initializers_of",
    "linear_head",
    "normalise",
]

NormKind = Literal["batch", "group", "layer", "none"]
Initializer = Literal["torch", "flax"]
ScaleInit = Literal["ones", "uniform"]


class Conv(nn.Module):
    """The convolution [N, H, W, filters], and the bias still to be added to it."""

    filters: int
    size: int = 3
    strides: int = 1
    use_bias: bool = True
    initializer: Initializer = "torch"
    method: Method | None = None

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        shape = (self.size, self.size, x.shape[-1], self.filters)
        kernel_init, bias_init = initializers_of(self.initializer, math.prod(shape[:3]))
        kernel = self.param("kernel", kernel_init, shape)
        convolve = functools.partial(conv2d, strides=self.strides, method=self.method)
        x = layer_product(convolve, x, kernel)
        if not self.use_bias:
            return x, jnp.zeros(self.filters, x.dtype)
        return x, self.param("bias", bias_init, (self.filters,))


class BatchNorm(nn.Module):
    """`nn.BatchNorm` of x + bias as (slope, offset): its output is slope * x + offset.

    Because the two are kept apart, a pool may come before them, and the bias's
    gradient, a sum over every pixel, costs nothing.
    """

    momentum: float
    epsilon: float
    scale_init: Callable

    @nn.compact
    def __call__(self, x: Array, bias: Array, train: bool) -> tuple[Array, Array]:
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape, jnp.float32)
        shift = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        if not train:
            slope = scale * jax.lax.rsqrt(var.value + self.epsilon)
            return slope, shift + slope * (bias - mean.value)
        axes = tuple(range(x.ndim - 1))
        batch_mean = x.mean(axes)
        batch_var = jnp.maximum((x * x).mean(axes) - batch_mean * batch_mean, 0)
        if not self.is_initializing():
            new = 1 - self.momentum
            mean.value = self.momentum * mean.value + new * (batch_mean + bias)
            var.value = self.momentum * var.value + new * batch_var
        slope = scale * jax.lax.rsqrt(batch_var + self.epsilon)
        return slope, shift - slope * batch_mean


def normalise(
    module, name: str, x: Array, bias: Array, train: bool, pool: bool = False
):
    """Apply the norm that ``module`` is configured with to x + bias, then max-pool."""
    is_uniform = module.scale_init == "uniform"
    scale_init = _uniform(0.0, 1.0) if is_uniform else nn.initializers.ones
    if module.norm == "batch":
        norm = BatchNorm(module.momentum, module.epsilon, scale_init, name=name)
        slope, offset = (to_rank_of(part, x) for part in norm(x, bias, train))
        return (scaled_max_pool(x, slope) if pool else slope * x) + offset
    x = x + to_rank_of(bias, x)
    if module.norm != "none":
        num_groups = 1 if module.norm == "layer" else math.gcd(8, x.shape[-1])
        x = nn.GroupNorm(
            num_groups=num_groups,
            epsilon=module.epsilon,
            scale_init=scale_init,
            name=name,
        )(x)
    return max_pool(x) if pool else x


def linear_head(module: nn.Module, x: Array) -> Array:
    """Return the scores of ``module``'s head, or x where it has none."""
    if module.num_classes is None:
        return x
    kernel_init, bias_init = initializers_of(
        "zeros" if module.zero_head else module.initializer, x.shape[-1]
    )
    head = nn.Dense(
        module.num_classes,
        kernel_init=kernel_init,
        bias_init=bias_init,
        precision=full_precision(),
        name="head",
    )
    return head(x)


def dense_layer(width: int, fan_in: int, initializer: str, *, name: str) -> nn.Dense:
    """Make a dense layer of ``fan_in`` inputs."""
    kernel_init, bias_init = initializers_of(initializer, fan_in)
    return nn.Dense(
        width,
        kernel_init=kernel_init,
        bias_init=bias_init,
        dot_general=_dot_general,
        name=name,
    )


def _dot_general(x: Array, kernel: Array, dimensions: Any, **options: Any) -> Array:
    product = functools.partial(lax.dot_general, dimension_numbers=dimensions)
    return layer_product(functools.partial(product, **options), x, kernel)


def initializers_of(kind: str, fan_in: int) -> tuple[Callable, Callable]:
    """Return the initialisers of weights and of biases."""
    if kind == "torch":
        bound = fan_in**-0.5
        return _uniform(-bound, bound), _uniform(-bound, bound)
    if kind == "zeros":
        return nn.initializers.zeros, nn.initializers.zeros
    return nn.initializers.lecun_normal(), nn.initializers.zeros


def _uniform(low: float, high: float) -> Callable:
    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, low, high)

    return init


def drop_block(key: Array, x: Array, *, rate: float, block: int) -> Array:
    """Zero squares of ``block`` pixels so that a share ``rate`` of x is dropped."""
    height, width = x.shape[1:3]
    block = min(block, height, width)
    centres = (height - block + 1) * (width - block + 1)
    seed_rate = rate * height * width / (block**2 * centres)
    shape = (x.shape[0], height - block + 1, width - block + 1, x.shape[-1])
    seeds = jax.random.bernoulli(key, seed_rate, shape).astype(x.dtype)
    pad = ((0, 0), (block - 1, block - 1), (block - 1, block - 1), (0, 0))
    keep = 1 - nn.max_pool(jnp.pad(seeds, pad), (block, block), (1, 1))
    return x * keep / jnp.maximum(keep.mean(), 1e-6)
