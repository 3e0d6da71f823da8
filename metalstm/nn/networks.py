"""The networks of the few-shot literature, as flax Linen modules.

Shapes: N images, H rows, W columns, C channels, way classes. Every module takes
``(x, train)``; ``train`` only says whether a batch norm uses its batch (True) or its
moving averages (False). ``metalstm.learners`` turns them into learners.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from metalstm.base import Array
from metalstm.nn.convolution import Method, conv2d
from metalstm.nn.pooling import max_pool

__all__ = ["MLP", "Conv4", "RelationNet", "ResNet12"]

NormKind = Literal["batch", "group", "layer", "none"]
Initializer = Literal["torch", "flax"]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, norm, ReLU and halving; then a linear head.

    ``num_classes=None`` leaves the head out and returns the features [N, d]. The
    defaults are Ravi & Larochelle's learner, whose batch norm gives the *new* value the
    weight 0.95 (5-shot) or 0.9 (1-shot): in flax's convention ``momentum`` is 0.05 or
    0.1.

    Attributes:
      downsample: "max_pool" (2x2, an odd last row or column is dropped) or "stride"
        (the convolution itself moves by 2, MAML's Omniglot network).
      norm: "batch"; "group" or "layer", which look at one image only; or "none".
      initializer: "torch" draws weights and biases from U(+-1/sqrt(fan_in)), as
        published; "flax" is lecun_normal and zero biases.
      scale_init: of the norm's scale, "ones" or "uniform" for U(0, 1).
      final_relu: False leaves the last block's ReLU out: features keep their sign.
      zero_head: start from equal scores for every class.
      num_halvings: only the first so many blocks halve; None: all.
      feature_maps: without a head, return maps [N, h, w, filters], not flattened.
      method: see `metalstm.nn.convolution.conv2d`; None lets the backend choose.
    """

    num_classes: int | None
    filters: int = 32
    num_blocks: int = 4
    downsample: Literal["max_pool", "stride"] = "max_pool"
    norm: NormKind = "batch"
    epsilon: float = 1e-3
    momentum: float = 0.05
    initializer: Initializer = "torch"
    scale_init: Literal["ones", "uniform"] = "ones"
    final_relu: bool = True
    zero_head: bool = False
    num_halvings: int | None = None
    feature_maps: bool = False
    method: Method | None = None

    def __post_init__(self):
        if self.feature_maps and self.num_classes is not None:
            raise ValueError(
                f"feature_maps=True leaves no place for num_classes={self.num_classes}:"
                " choose num_classes=None"
            )
        _one_of("downsample", self.downsample, ("max_pool", "stride"))
        _one_of("norm", self.norm, ("batch", "group", "layer", "none"))
        _one_of("initializer", self.initializer, ("torch", "flax"))
        _one_of("scale_init", self.scale_init, ("ones", "uniform"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        halvings = self.num_blocks if self.num_halvings is None else self.num_halvings
        pools = self.downsample == "max_pool"
        _check_images(x, 2**halvings if pools else 1)
        for index in range(1, self.num_blocks + 1):
            halves = index <= halvings
            pooled = pools and halves
            x, bias = _Conv(
                self.filters,
                strides=2 if halves and not pools else 1,
                initializer=self.initializer,
                method=self.method,
                name=f"conv{index}",
            )(x)
            x = _norm(self, f"norm{index}", x, bias, train, pooled)
            if index < self.num_blocks or self.final_relu:
                x = jax.nn.relu(x)
        return x if self.feature_maps else _head(self, x.reshape(x.shape[0], -1))


class RelationNet(nn.Module):
    """The relation module of Sung et al. (2018): how alike is each pair?

    ``x`` is (classes [way, ...], queries [M, ...]); returns logits [M, way]. A pair is
    the two side by side along the last axis. Maps [h, w, c] go through two blocks of
    3x3 convolution, norm, ReLU and 2x2 max-pool (where there are 2 x 2 pixels left),
    vectors [d] through a hidden layer of ``filters`` units; then come a layer of
    ``hidden`` units, ReLU, and one output. Other attributes are `Conv4`'s.

    The first layer is linear in the pair, so it is computed for each class and each
    query, and summed for each pair: a way-th of the work, to rounding the same.
    """

    filters: int = 64
    hidden: int = 8
    norm: NormKind = "batch"
    epsilon: float = 1e-3
    momentum: float = 0.05
    initializer: Initializer = "torch"
    scale_init: Literal["ones", "uniform"] = "ones"
    method: Method | None = None

    def __post_init__(self):
        _one_of("norm", self.norm, ("batch", "group", "layer", "none"))
        _one_of("initializer", self.initializer, ("torch", "flax"))
        _one_of("scale_init", self.scale_init, ("ones", "uniform"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: tuple[Array, Array], train: bool) -> Array:
        classes, queries = x
        shape = (queries.shape[0], classes.shape[0])
        options: dict[str, Any] = {"method": self.method}
        options["initializer"] = self.initializer
        pair = _PairLayer(self.filters, **options, name="pair")
        features, bias = pair(classes, queries)
        if classes.ndim == 4:
            features = self._block(features, bias, "norm1", train)
            conv = _Conv(self.filters, **options, name="conv")
            features = self._block(*conv(features), "norm2", train)
            features = features.reshape(features.shape[0], -1)
        else:
            features = jax.nn.relu(features + bias)
        features = jax.nn.relu(self._dense(self.hidden, features, "hidden"))
        return self._dense(1, features, "output").reshape(shape)

    def _block(self, x: Array, bias: Array, name: str, train: bool) -> Array:
        pooled = min(x.shape[1:3]) >= 2
        return jax.nn.relu(_norm(self, name, x, bias, train, pooled))

    def _dense(self, width: int, x: Array, name: str) -> Array:
        return _dense(width, x.shape[-1], self.initializer, name=name)(x)


class _PairLayer(nn.Module):
    """A 3x3 convolution of maps, or a dense layer of vectors, for every pair.

    Returns [M * way, ..., filters] in the order of the queries, and the bias.
    """

    filters: int
    initializer: Initializer
    method: Method | None

    @nn.compact
    def __call__(self, classes: Array, queries: Array) -> tuple[Array, Array]:
        channels = classes.shape[-1]
        window = (3, 3) if classes.ndim == 4 else ()
        shape = (*window, 2 * channels, self.filters)
        kernel_init, bias_init = _initializers(self.initializer, math.prod(shape[:-1]))
        kernel = self.param("kernel", kernel_init, shape)
        bias = self.param("bias", bias_init, (self.filters,))

        def layer(x: Array, kernel: Array) -> Array:
            return conv2d(x, kernel, method=self.method) if window else x @ kernel

        of_classes = layer(classes, kernel[..., :channels, :])
        of_queries = layer(queries, kernel[..., channels:, :])
        pairs = of_queries[:, None] + of_classes[None]
        return pairs.reshape(-1, *pairs.shape[2:]), bias


class MLP(nn.Module):
    """Flatten, hidden layers of the given widths, a linear head.

    ``num_classes`` may also be the number of regression targets, or None to return the
    last hidden layer.
    """

    num_classes: int | None
    widths: Sequence[int] = (64, 64)
    activation: Callable[[Array], Array] = jax.nn.relu
    initializer: Initializer = "flax"
    zero_head: bool = False

    def __post_init__(self):
        _one_of("initializer", self.initializer, ("torch", "flax"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1)
        for index, width in enumerate(self.widths, 1):
            layer = _dense(width, x.shape[-1], self.initializer, name=f"dense{index}")
            x = self.activation(layer(x))
        return _head(self, x)


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, mean over pixels, linear head.

    Each block: (convolution, norm, leaky ReLU 0.1) three times with a 1x1 shortcut
    added before the last leaky ReLU, then 2x2 max-pool, then DropBlock (Ghiasi et al.,
    2018) when ``drop_rate`` is positive and the pass was given a key.
    """

    num_classes: int | None
    widths: Sequence[int] = (64, 160, 320, 640)
    norm: NormKind = "batch"
    epsilon: float = 1e-5
    momentum: float = 0.9
    initializer: Initializer = "flax"
    scale_init: Literal["ones", "uniform"] = "ones"
    zero_head: bool = False
    drop_rate: float = 0.0
    drop_block: int = 5
    method: Method | None = None

    def __post_init__(self):
        _one_of("norm", self.norm, ("batch", "group", "layer", "none"))
        _one_of("initializer", self.initializer, ("torch", "flax"))
        _one_of("scale_init", self.scale_init, ("ones", "uniform"))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        _check_images(x, 2 ** len(self.widths))
        for block, width in enumerate(self.widths, 1):
            inputs = x
            for index in (1, 2, 3):
                x = self._conv_norm(x, width, 3, f"{block}_{index}", train)
                x = jax.nn.leaky_relu(x, 0.1) if index < 3 else x
            x = x + self._conv_norm(inputs, width, 1, f"{block}_shortcut", train)
            x = max_pool(jax.nn.leaky_relu(x, 0.1))
            if self.drop_rate and self.has_rng("dropout"):
                key = self.make_rng("dropout")
                x = _drop_block(key, x, rate=self.drop_rate, block=self.drop_block)
        return _head(self, x.mean((1, 2)))

    def _conv_norm(self, x, width, size, name, train):
        x, bias = _Conv(
            width,
            size=size,
            use_bias=False,
            initializer=self.initializer,
            method=self.method,
            name=f"conv{name}",
        )(x)
        return _norm(self, f"norm{name}", x, bias, train)


class _Conv(nn.Module):
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
        kernel_init, bias_init = _initializers(self.initializer, math.prod(shape[:3]))
        kernel = self.param("kernel", kernel_init, shape)
        x = conv2d(x, kernel, strides=self.strides, method=self.method)
        if not self.use_bias:
            return x, jnp.zeros(self.filters, x.dtype)
        return x, self.param("bias", bias_init, (self.filters,))


class _BatchNorm(nn.Module):
    """`nn.BatchNorm` of x + bias as (slope, offset): its output is slope * x + offset.

    Apart, they let a pool come before them, and the bias's gradient, a sum over every
    pixel, costs nothing.
    """

    momentum: float
    epsilon: float
    scale_init: Callable

    @nn.compact
    def __call__(self, x: Array, bias: Array, train: bool) -> tuple[Array, Array]:
        shape = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        scale = self.param("scale", self.scale_init, shape)
        shift = self.param("bias", nn.initializers.zeros, shape)
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


def _norm(module, name: str, x: Array, bias: Array, train: bool, pool: bool = False):
    """The norm that ``module`` was configured with, of x + bias, then 2x2 max-pool."""
    uniform = module.scale_init == "uniform"
    scale_init = _uniform(0.0, 1.0) if uniform else nn.initializers.ones
    if module.norm == "batch":
        norm = _BatchNorm(module.momentum, module.epsilon, scale_init, name=name)
        slope, offset = norm(x, bias, train)
        if pool:
            # The maximum of slope * x is |slope| times that of sign * x: a quarter of
            # the pixels is left to normalise, forward and back.
            sign = jnp.where(jax.lax.stop_gradient(slope) < 0, -1.0, 1.0)
            x, slope = max_pool(sign * x), sign * slope
        return slope * x + offset
    x = x + bias
    if module.norm != "none":
        num_groups = 1 if module.norm == "layer" else math.gcd(8, x.shape[-1])
        x = nn.GroupNorm(
            num_groups=num_groups,
            epsilon=module.epsilon,
            scale_init=scale_init,
            name=name,
        )(x)
    return max_pool(x) if pool else x


def _head(module: nn.Module, x: Array) -> Array:
    if module.num_classes is None:
        return x
    initializer = "zeros" if module.zero_head else module.initializer
    return _dense(module.num_classes, x.shape[-1], initializer, name="head")(x)


def _dense(width: int, fan_in: int, initializer: str, *, name: str) -> nn.Dense:
    kernel_init, bias_init = _initializers(initializer, fan_in)
    return nn.Dense(width, kernel_init=kernel_init, bias_init=bias_init, name=name)


def _initializers(kind: str, fan_in: int) -> tuple[Callable, Callable]:
    """Initialisers of (weights, biases)."""
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


def _drop_block(key: Array, x: Array, *, rate: float, block: int) -> Array:
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


def _check_images(x: Array, smallest: int) -> None:
    if x.ndim != 4 or min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"x has shape {x.shape}: expected images [N, H, W, C] of at least "
            f"{smallest} x {smallest} pixels; resize them or use fewer blocks"
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")
