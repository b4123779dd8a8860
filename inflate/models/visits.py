"""Networks that are on the device only while they work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def visiting(networks: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """The networks on the device, and afterwards each where it was before; those that are there already stay."""
    homes = [(network, next(network.parameters()).device) for network in networks]
    away = [(network, home) for network, home in homes if home != device]
    try:
        for network, _ in away:
            network.to(device)
        yield
    finally:
        for network, home in away:
            network.to(home)
