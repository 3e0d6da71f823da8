"""What is adapted: flax modules as learners, networks, heads."""

from metalstm.nn.flax_modules import (
    MLP,
    Conv4,
    RelationNet,
    ResNet12,
    conv4,
    from_flax,
    mlp,
    relation_net,
    resnet12,
    tied_head,
)

__all__ = [
    "MLP",
    "Conv4",
    "RelationNet",
    "ResNet12",
    "conv4",
    "from_flax",
    "mlp",
    "relation_net",
    "resnet12",
    "tied_head",
]
