"""Networks that compute in bfloat16 throughout, without autocast: its float32 norms and copies of weights are saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

WIDE = (torch.float32, torch.float64)


class Narrow:
    """A network made bfloat16: weights, and so activations. What was frozen comes back as it was (`widen`).

    Kernels of norms, losses and what surrounds the network in them stay float32 by themselves: the objectives see to
    it. So do noise levels and other numbers that a network is told, of which it makes sinusoids before it rounds them:
    of its tensors, those of three dimensions or more are rounded where it is called.

    Adapters that learn stay float32, too: they are small, and their layers cast for them. Weights that learn do not:
    `inflate.training.adamw` says how they do so in bfloat16.

    Frozen weights wait in the CPU's memory meanwhile.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        wide = {name: p for name, p in network.named_parameters() if p.dtype in WIDE}
        self.types = {name: p.dtype for name, p in wide.items()}
        self.frozen = {name: p.detach().cpu() for name, p in wide.items() if not p.requires_grad}
        kept = {id(p) for p in _adapters(network)}
        made: dict[int, nn.Parameter] = {}
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dtype in WIDE and id(parameter) not in kept:
                    setattr(module, name, made.setdefault(id(parameter), _rounded(parameter)))
        self.hook = network.register_forward_pre_hook(round_inputs, with_kwargs=True)

    def widen(self) -> None:
        """Give the network weights of their first types again, in place; those that were frozen as they were."""
        self.hook.remove()
        for name, parameter in self.network.named_parameters():
            if name in self.frozen and parameter.numel():  # nothing where another process holds the sharded weights
                parameter.data = self.frozen[name].to(parameter.device)
            elif name in self.types:
                parameter.data = parameter.data.to(self.types[name])

    @contextmanager
    def widened(self) -> Iterator[None]:
        """The network in its first types meanwhile, in the memory of the CPU: a GPU may have no room for them."""
        tensors = [*self.network.parameters(), *self.network.buffers()]
        own = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.cpu()
            self.widen()
            yield
        finally:
            for tensor, data in zip(tensors, own, strict=True):
                tensor.data = data
            self.hook = self.network.register_forward_pre_hook(round_inputs, with_kwargs=True)


def round_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Features and contexts in bfloat16, all else as it is."""
    return tuple(map(_narrowed, args)), {name: _narrowed(value) for name, value in kwargs.items()}


def _narrowed(value: Any) -> Any:
    return value.bfloat16() if isinstance(value, Tensor) and value.ndim >= 3 and value.dtype in WIDE else value


def _rounded(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().bfloat16(), parameter.requires_grad)


def _adapters(network: nn.Module) -> list[nn.Parameter]:
    """What learns inside PEFT's layers."""
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]
