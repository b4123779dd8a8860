"""Frozen linear layers and convolutions whose weights are stored in fewer bits and read one layer at a time.

A stored layer is a subclass of its own class, in place: `weight` is no parameter any more but read from its codes. A
forward pass reads it in the type that it computes in and forgets it; the backward pass, which wants a gradient of the
input alone, reads it again. Its state dict holds the weight as it was loaded, which stays in the memory of the CPU.

    bf16   16 bits per weight
    int8   8 bits, and a scale (bf16) for each output channel
    nf4    4 bits, one of 16 quantiles of a normal distribution, and a scale (bf16) for each 64 weights in turn

Source of nf4: Dettmers et al., QLoRA (2023), section 3 and appendix E.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input
from torch.nn.parallel import DistributedDataParallel

from inflate.layers.convolution import Convolution
from inflate.layers.temporal import TemporalConv

Kind = Literal["bf16", "int8", "nf4"]
BLOCK = 64
"""Weights that share a scale in nf4."""
BYTE = 127
"""Largest code of int8, of either sign."""


# --- weights as codes -------------------------------------------------------------------------------------------------


def normal_floats() -> list[float]:
    """The 16 values of nf4 in [-1, 1], equally likely in a normal distribution, zero among them."""
    edge = 1 - (1 / 32 + 1 / 30) / 2
    positive, negative = ([NormalDist().inv_cdf(edge + (0.5 - edge) * n / of) for n in range(of)] for of in (8, 7))
    values = sorted([*positive, 0.0, *(-value for value in negative)])
    return [value / values[-1] for value in values]


def pairs_of_values() -> Tensor:
    """The two values that each byte of nf4 stands for: (256, 2)."""
    values = torch.tensor(normal_floats())
    return torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)  # (256, 2)


def encode(weight: Tensor, kind: Kind) -> dict[str, Tensor]:
    """What is stored of a weight (out, in, ...): `codes` and, but for bf16, `scale`; of nf4 also the table `pairs`."""
    if kind == "bf16":
        return {"codes": weight.to(torch.bfloat16)}
    return _bytes_of(weight) if kind == "int8" else _quantiles_of(weight)


def decode(stored: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """A weight of its shape and a floating type from what `encode` stored of it."""
    codes = stored["codes"]
    if "pairs" in stored:
        values = functional.embedding(codes.int(), stored["pairs"].to(dtype)).flatten(1)  # (blocks, 64)
        return values.mul_(stored["scale"]).flatten()[: shape.numel()].view(shape)
    return codes.to(dtype).mul_(stored["scale"]) if "scale" in stored else codes.to(dtype)


def _bytes_of(weight: Tensor) -> dict[str, Tensor]:
    wide = weight.float()
    scale = _scale(wide.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) / BYTE)  # (out, 1, ...)
    return {"codes": (wide / scale).round().clamp(-BYTE, BYTE).to(torch.int8), "scale": scale}


def _quantiles_of(weight: Tensor) -> dict[str, Tensor]:
    flat = weight.float().flatten()
    blocks = functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # (blocks, 64)
    scale = _scale(blocks.abs().amax(1, keepdim=True))  # (blocks, 1)
    values = torch.tensor(normal_floats(), device=weight.device)
    near = torch.bucketize(blocks / scale, (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes = near[:, 0::2] * 16 + near[:, 1::2]  # (blocks, 32)
    return {"codes": codes, "scale": scale, "pairs": pairs_of_values().to(weight.device)}


def _scale(size: Tensor) -> Tensor:
    """Sizes in bf16, in which codes are worked out, too; 1 where there are zeros alone."""
    return torch.where(size > 0, size, torch.ones_like(size)).to(torch.bfloat16)


# --- layers -----------------------------------------------------------------------------------------------------------


class _Product(torch.autograd.Function):
    """A stored layer's output, of which nothing is kept but the layer, and the gradient of its input."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, layer: Any) -> Tensor:
        ctx.layer, ctx.shape = layer, given.shape
        bias = None if layer.bias is None else layer.bias.to(given.dtype)
        output: Tensor = layer.product(given, layer.read(given.dtype), bias)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        layer: Stored = ctx.layer
        return layer.input_gradient(gradient, layer.read(gradient.dtype), ctx.shape), None


class Stored(nn.Module, ABC):
    """A frozen layer without its weight, which it reads from codes; made by `store`."""

    kind: Kind
    original: Tensor
    """The weight as it was loaded: no buffer, so that it stays where it is when the network moves."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, read anew at each look, in the type of the original one."""
        return self.read(self.original.dtype)

    def read(self, dtype: torch.dtype) -> Tensor:
        """The weight that the layer computes with, in a floating type."""
        stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        return decode(stored, self.original.shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's output, computed in the type of its input or, under autocast, in autocast's."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        output: Tensor = _Product.apply(input.to(dtype), self)
        return output

    @abstractmethod
    def product(self, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the plain layer makes of its input with this weight."""

    @abstractmethod
    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of the input, which had this shape, from that of the output."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.original


class StoredLinear(Stored, nn.Linear):  # type: ignore[override]  # a weight that nobody sets
    """A linear layer."""

    def product(self, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(given, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class StoredConv2d(Stored, nn.Conv2d):  # type: ignore[override]
    """A 2D convolution."""

    def product(self, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(given, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        way: Any = (self.stride, self.padding, self.dilation, self.groups)
        return conv2d_input([*shape], weight, gradient, *way)


class StoredConvolution(StoredConv2d, Convolution):  # type: ignore[override]
    """A 2D convolution of an inflated network."""


class StoredTemporalConv(Stored, TemporalConv):  # type: ignore[override]
    """A convolution over frames."""

    def product(self, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(given, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        pixels, around = [*shape[:3], shape[3:].numel()], (self.kernel_size[0] // 2, 0)  # B, C, F, H*W
        found = conv2d_input(
            pixels, weight.squeeze(-1), gradient.flatten(3), padding=around, groups=self.groups
        )  # (B, C, F, H*W)
        return found.view(shape)


ENDS = ("conv_in", "conv_out")
"""The first and the last convolution: a thousandth of the weights, and in nf4 as much error as all others together."""
STORED: dict[type[nn.Module], type[Stored]] = {
    nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d, Convolution: StoredConvolution, TemporalConv: StoredTemporalConv,
}  # fmt: skip
"""What a layer of each class becomes; subclasses of theirs stay as they are."""
PLAIN = {stored: plain for plain, stored in STORED.items()}


# --- networks ---------------------------------------------------------------------------------------------------------


def storable(network: nn.Module) -> dict[str, nn.Module]:
    """The layers without a trained parameter whose weights are stored in fewer bits, by name."""
    layers = {name: each for name, each in network.named_modules() if type(each) in STORED}
    return {
        name: each
        for name, each in layers.items()
        if name not in ENDS and not any(parameter.requires_grad for parameter in each.parameters())
    }


def store(network: nn.Module, kind: Kind) -> list[str]:
    """Store the weights of a network's frozen layers in fewer bits, in place; the names of those layers."""
    layers = storable(network)
    for layer in layers.values():
        store_layer(layer, kind)
    # Each process makes the same codes of the same weights: to send them before every forward pass would be in vain.
    sent = [f"{name}.{buffer}" for name, layer in layers.items() for buffer, _ in layer.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, sent)
    return [*layers]


def store_layer(layer: Any, kind: Kind) -> None:
    """Store the weight of a layer in fewer bits, in place."""
    original = layer.weight.detach()
    del layer.weight
    for name, tensor in encode(original, kind).items():
        layer.register_buffer(name, tensor, persistent=False)
    layer.original, layer.kind = original, kind
    layer.__class__ = STORED[type(layer)]


def kind_of(network: nn.Module) -> Kind | None:
    """In what the weights of a network's frozen layers are stored; None where they are as they were loaded."""
    return next((layer.kind for layer in network.modules() if isinstance(layer, Stored)), None)


@contextmanager
def as_loaded(network: nn.Module) -> Iterator[None]:
    """A network with all its weights as they were loaded, meanwhile; those that are stored come from the CPU."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, Stored)]
    kinds = [type(layer) for layer in layers]
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = PLAIN[kind]
        layer.weight = nn.Parameter(layer.original, requires_grad=False)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            del layer.weight
            layer.__class__ = kind
