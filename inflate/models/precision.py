"""Networks in another precision than their weights were loaded in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

Precision = Literal["float32", "bfloat16", "float16"]


def cast(networks: Iterable[nn.Module], precision: Precision) -> None:
    """Round the weights of networks to a precision, which they then compute in; in place, and not exact.

    An autoencoder whose configuration says that it overflows in float16 (`force_upcast`) is left as it is there.
    """
    for network in networks:
        if precision != "float16" or not getattr(network.config, "force_upcast", False):
            nn.Module.to(network, getattr(torch, precision))  # diffusers' own warns of layers that none of these has
