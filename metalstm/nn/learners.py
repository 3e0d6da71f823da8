"""The networks of the literature as learners."""

from __future__ import annotations

from typing import Any

from metalstm.base import Learner
from metalstm.nn.flax_modules import from_flax
from metalstm.nn.networks import MLP, Conv4, RelationNet, ResNet12

__all__ = ["conv4", "mlp", "relation_net", "resnet12"]


def conv4(num_classes: int | None, filters: int = 32, **options: Any) -> Learner:
    """The four-block convolutional learner; ``options`` are `Conv4`'s attributes."""
    return from_flax(Conv4(num_classes=num_classes, filters=filters, **options))


def mlp(
    num_classes: int | None, widths: tuple[int, ...] = (64, 64), **options
) -> Learner:
    """A multi-layer perceptron; ``options`` are `MLP`'s attributes."""
    return from_flax(MLP(num_classes=num_classes, widths=tuple(widths), **options))


def relation_net(**options: Any) -> Learner:
    """What scores (classes, queries); ``options`` are `RelationNet`'s attributes."""
    return from_flax(RelationNet(**options))


def resnet12(num_classes: int | None, **options: Any) -> Learner:
    """The few-shot ResNet-12; ``options`` are `ResNet12`'s attributes."""
    return from_flax(ResNet12(num_classes=num_classes, **options))
