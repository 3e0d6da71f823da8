"""The networks of the few-shot literature, as Linen modules and as learners.

Shapes: N images, H rows, W columns, C channels, way classes. Every module takes
``(x, train)``; ``train`` is whether a batch norm uses its batch (True) or its
moving averages (False).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from metalstm.base import Array, Learner
from metalstm.batches import flatten_examples, to_rank_of
from metalstm.checks import check_choice
from metalstm.nn.convolution import Method, conv2d
from metalstm.nn.flax_modules import from_flax
from metalstm.nn.layers import (
    Conv,
    Initializer,
    NormKind,
    ScaleInit,
    dense_layer,
    drop_block,
    initializers_of,
    linear_head,
    normalise,
)
from metalstm.nn.pooling import max_pool
from metalstm.records import recorded
from metalstm.runtime.products import layer_product

__all__ = [
    "MLP",
    "Conv4",
    "RelationNet",
    "ResNet12",
    "conv4",
    "mlp",
    "relation_net",
    "resnet12",
]


class Conv4(nn.Module):
    """Four blocks of 3x3 convolution, norm, ReLU and halving; then a linear head.

    ``num_classes=None`` omits the head and returns the features [N, d]. The
    defaults are Ravi & Larochelle's learner, whose batch norm gives the *new* value the
    weight 0.95 (5-shot) or 0.9 (1-shot): in flax's convention ``momentum`` is 0.05 or
    0.1.

    Attributes:
      filters: of each convolution.
      num_blocks: how many blocks.
      downsample: "max_pool" (2x2, an odd last row or column is dropped) or "stride"
        (the convolution itself moves by 2, MAML's Omniglot network).
      norm: "batch"; "group" or "layer", which look at one image only; or "none".
      momentum: weight of the old value in the batch norm's moving average.
      initializer: "torch" draws weights and biases from U(+-1/sqrt(fan_in)), as
        published; "flax" is lecun_normal and zero biases.
      scale_init: of the norm's scale, "ones" or "uniform" for U(0, 1).
      final_relu: False omits the last block's ReLU, so that features keep their sign.
      zero_head: start from equal scores for every class.
      num_halvings: how many blocks halve, the first ones; None: all.
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
    scale_init: ScaleInit = "ones"
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
        check_choice("downsample", self.downsample, ("max_pool", "stride"))
        _check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        halvings = self.num_blocks if self.num_halvings is None else self.num_halvings
        pools = self.downsample == "max_pool"
        _check_images(x, 2**halvings if pools else 1)
        for index in range(1, self.num_blocks + 1):
            halves = index <= halvings
            pooled = pools and halves
            x, bias = Conv(
                self.filters,
                strides=2 if halves and not pools else 1,
                initializer=self.initializer,
                method=self.method,
                name=f"conv{index}",
            )(x)
            x = normalise(self, f"norm{index}", x, bias, train, pooled)
            if index < self.num_blocks or self.final_relu:
                x = jax.nn.relu(x)
        return x if self.feature_maps else linear_head(self, flatten_examples(x))


class RelationNet(nn.Module):
    """The relation module of Sung et al. (2018): how similar is each pair?

    ``x`` is (classes [way, ...], queries [M, ...]); returns logits [M, way]. A pair is
    the two joined along the last axis. Maps [h, w, c] go through two blocks of
    3x3 convolution, norm, ReLU and 2x2 max-pool (where there are 2 x 2 pixels left),
    vectors [d] through a hidden layer of ``filters`` units; then come a layer of
    ``hidden`` units, ReLU, and one output. Other attributes are `Conv4`'s.

    The first layer is linear in the pair, so it is computed for each class and each
    query and summed for each pair: a way-th of the work, and the same up to rounding.
    """

    filters: int = 64
    hidden: int = 8
    norm: NormKind = "batch"
    epsilon: float = 1e-3
    momentum: float = 0.05
    initializer: Initializer = "torch"
    scale_init: ScaleInit = "ones"
    method: Method | None = None

    def __post_init__(self):
        _check_options(self)
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
            conv = Conv(self.filters, **options, name="conv")
            features = self._block(*conv(features), "norm2", train)
            features = flatten_examples(features)
        else:
            features = jax.nn.relu(features + to_rank_of(bias, features))
        features = jax.nn.relu(self._dense(self.hidden, features, "hidden"))
        return self._dense(1, features, "output").reshape(shape)

    def _block(self, x: Array, bias: Array, name: str, train: bool) -> Array:
        pooled = min(x.shape[1:3]) >= 2
        return jax.nn.relu(normalise(self, name, x, bias, train, pooled))

    def _dense(self, width: int, x: Array, name: str) -> Array:
        return dense_layer(width, x.shape[-1], self.initializer, name=name)(x)


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
        kernel_init, bias_init = initializers_of(
            self.initializer, math.prod(shape[:-1])
        )
        kernel = self.param("kernel", kernel_init, shape)
        bias = self.param("bias", bias_init, (self.filters,))

        def layer(x: Array, kernel: Array) -> Array:
            convolve = functools.partial(conv2d, method=self.method)
            return layer_product(convolve if window else jnp.matmul, x, kernel)

        of_classes = layer(classes, kernel[..., :channels, :])
        of_queries = layer(queries, kernel[..., channels:, :])
        pairs = of_queries[:, None] + of_classes[None]
        return pairs.reshape(len(queries) * len(classes), *pairs.shape[2:]), bias


class MLP(nn.Module):
    """Flatten, hidden layers of the given widths, a linear head.

    ``num_classes`` may also be the number of regression targets, or None to return the
    last hidden layer.

    Attributes:
      widths: units of each hidden layer.
      initializer: as `Conv4`'s.
      zero_head: start from equal scores for every class.
    """

    num_classes: int | None
    widths: Sequence[int] = (64, 64)
    activation: Callable[[Array], Array] = jax.nn.relu
    initializer: Initializer = "flax"
    zero_head: bool = False

    def __post_init__(self):
        check_choice("initializer", self.initializer, get_args(Initializer))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = flatten_examples(x)
        for index, width in enumerate(self.widths, 1):
            layer = dense_layer(
                width, x.shape[-1], self.initializer, name=f"dense{index}"
            )
            x = self.activation(layer(x))
        return linear_head(self, x)


class ResNet12(nn.Module):
    """Four residual blocks of three 3x3 convolutions, mean over pixels, linear head.

    Each block: (convolution, norm, leaky ReLU 0.1) three times with a 1x1 shortcut
    added before the last leaky ReLU, then 2x2 max-pool, then DropBlock (Ghiasi et al.,
    2018) when ``drop_rate`` is positive and the pass was given a key. Attributes that
    are not below are as `Conv4`'s.

    Attributes:
      widths: filters of each block.
      norm: "batch"; "group" or "layer", which look at one image only; or "none".
      momentum: weight of the old value in the batch norm's moving average.
      zero_head: start from equal scores for every class.
    """

    num_classes: int | None
    widths: Sequence[int] = (64, 160, 320, 640)
    norm: NormKind = "batch"
    epsilon: float = 1e-5
    momentum: float = 0.9
    initializer: Initializer = "flax"
    scale_init: ScaleInit = "ones"
    zero_head: bool = False
    drop_rate: float = 0.0
    drop_block: int = 5
    method: Method | None = None

    def __post_init__(self):
        _check_options(self)
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
                x = drop_block(key, x, rate=self.drop_rate, block=self.drop_block)
        return linear_head(self, x.mean((1, 2)))

    def _conv_norm(self, x, width, size, name, train):
        x, bias = Conv(
            width,
            size=size,
            use_bias=False,
            initializer=self.initializer,
            method=self.method,
            name=f"conv{name}",
        )(x)
        return normalise(self, f"norm{name}", x, bias, train)


@recorded("learner")
def conv4(num_classes: int | None, filters: int = 32, **options: Any) -> Learner:
    """The four-block convolutional learner; ``options`` are `Conv4`'s attributes."""
    return from_flax(Conv4(num_classes=num_classes, filters=filters, **options))


@recorded("learner")
def mlp(
    num_classes: int | None, widths: tuple[int, ...] = (64, 64), **options
) -> Learner:
    """A multi-layer perceptron; ``options`` are `MLP`'s attributes."""
    return from_flax(MLP(num_classes=num_classes, widths=tuple(widths), **options))


@recorded("learner")
def relation_net(**options: Any) -> Learner:
    """What scores (classes, queries); ``options`` are `RelationNet`'s attributes."""
    return from_flax(RelationNet(**options))


@recorded("learner")
def resnet12(num_classes: int | None, **options: Any) -> Learner:
    """The few-shot ResNet-12; ``options`` are `ResNet12`'s attributes."""
    return from_flax(ResNet12(num_classes=num_classes, **options))


def _check_options(module: Any) -> None:
    check_choice("norm", module.norm, get_args(NormKind))
    check_choice("initializer", module.initializer, get_args(Initializer))
    check_choice("scale_init", module.scale_init, get_args(ScaleInit))


def _check_images(x: Array, smallest: int) -> None:
    if x.ndim != 4 or min(x.shape[1:3]) < smallest:
        raise ValueError(
            f"x has shape {x.shape}: expected images [N, H, W, C] of at least "
            f"{smallest} x {smallest} pixels; resize them or use fewer blocks"
        )
