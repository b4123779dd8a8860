"""The order in which weights of 2D convolutions, and with them features, lie in memory: `training.channels_last`."""

from __future__ import annotations

import torch
from torch import nn

from inflate.training.paper import on_paper


def put_channels_last(network: nn.Module) -> None:
    """Let the weights of a network's 2D convolutions lie channels last, in place; the network computes the same.

    Convolutions then give features that lie so, too, and take the others into this order. On paper nothing is done: no
    tensor changes its size.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not on_paper(module.weight):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
