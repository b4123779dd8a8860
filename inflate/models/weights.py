"""A hash of weights, by which two networks are told apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def weights_sha256(network: nn.Module, *prefixes: str) -> str:
    """SHA-256 of the tensors of a network, or of those whose names begin with one of `prefixes`."""
    tensors = network.state_dict()
    return tensors_sha256((name, tensors[name]) for name in sorted(tensors) if name.startswith(prefixes or ""))


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of tensors: their names, then their bytes, in the order given; of those without values, the names."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(name.encode())
        if isinstance(tensor, FakeTensor):
            continue
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
