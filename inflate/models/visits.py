"""Networks that are on the device only while they work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

WAITING = [torch.device("cpu")]
"""Where networks wait, the last: the memory of the CPU, or on paper, whose tensors call themselves the CPU's, no place
at all."""


@contextmanager
def away(networks: Sequence[nn.Module]) -> Iterator[None]:
    """The networks elsewhere meanwhile, so that their place on the device is free, and afterwards where they were."""
    with visiting(networks, WAITING[-1]):
        yield


@contextmanager
def waiting_on(device: torch.device) -> Iterator[None]:
    """Let networks that are away wait on this device meanwhile."""
    WAITING.append(device)
    try:
        yield
    finally:
        WAITING.pop()


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
