"""A hash of a network's weights, by which two networks are told apart."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def weights_sha256(network: nn.Module, *prefixes: str) -> str:
    """SHA-256 of the tensors (names, then bytes) of a network, or of those whose names begin with one of `prefixes`."""
    digest = hashlib.sha256()
    tensors = network.state_dict()
    for name in sorted(tensors):
        if name.startswith(prefixes or ""):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
