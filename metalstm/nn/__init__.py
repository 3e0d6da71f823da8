"""What is adapted: flax modules as learners, networks, heads."""

from metalstm.nn.flax_modules import from_flax
from metalstm.nn.heads import tied_head
from metalstm.nn.networks import (
    MLP,
    Conv4,
    RelationNet,
    ResNet12,
    conv4,
    mlp,
    relation_net,
    resnet12,
)
from metalstm.nn.pooling import max_pool
from metalstm.nn.starting import Start, init_from

__all__ = [
    "MLP",
    "Conv4",
    "RelationNet",
    "ResNet12",
    "Start",
    "conv4",
    "from_flax",
    "init_from",
    "max_pool",
    "mlp",
    "relation_net",
    "resnet12",
    "tied_head",
]
