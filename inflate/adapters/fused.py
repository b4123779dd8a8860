"""LoRA without copies of activations: PEFT's layers, whose forward casts the factors and not what passes through them.

PEFT's own forward casts a layer's input to the type of the factors, float32 in training, and keeps that copy for the
backward pass of each layer that shares the input. Here the factors are cast to the type of the base layer's output, the
input is kept as it came, and the factors' gradients are summed in float32: what autocast does, with fewer roundings. In
float32 the result is PEFT's. What PEFT does beside (names, state dicts,
merging, scaling, switching adapters on and off) is untouched; a case that is not plain takes PEFT's own forward.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.lora.layer import Conv3d, LoraLayer
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

ROWS = 4096
"""Tokens whose float32 copies are made at a time where a product of halves cannot be in float32."""
WIDENS = "dtype" in torch.ops.aten.mm.overloads()
"""Whether a product of halves can be in float32 on a GPU: since PyTorch 2.8."""


@torch.library.custom_op("inflate::summed_in_float32", mutates_args=())
def summed_in_float32(left: Tensor, right: Tensor) -> Tensor:
    """The product over tokens of half-precision (N,R) and (N,C), in float32: (R,C)."""
    if left.is_cuda and WIDENS:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    output = torch.zeros(left.shape[1], right.shape[1], device=left.device)
    for a, b in zip(left.split(ROWS), right.split(ROWS), strict=True):
        output.addmm_(a.float().t(), b.float())
    return output


@summed_in_float32.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return torch.empty(left.shape[1], right.shape[1], device=left.device)


@register_flop_formula(torch.ops.inflate.summed_in_float32)
def _flops(left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


class LowRank(torch.autograd.Function):
    """`base + scale * x A^T B^T`, added to `base` in its memory; only x and its rank-wide image are kept.

    base (N,O), x (N,I), A (R,I), B (O,R); computed in the type of base.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtypes = scale, (a.dtype, b.dtype)
        with _without_autocast(base):
            a, b = a.to(base.dtype), _times(b, scale).to(base.dtype)
            inner = x.to(base.dtype) @ a.t()  # (N, R)
            base.addmm_(inner, b.t())
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, inner, a, b)
        return base

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        _, to_x, to_a, to_b, _ = ctx.needs_input_grad
        with _without_autocast(gradient):
            towards = gradient @ b  # (N, R)
            of_x = (towards @ a).to(x.dtype) if to_x else None
            of_a = _over_tokens(towards, x, ctx.dtypes[0]) if to_a else None
            of_b = _times(_over_tokens(gradient, inner, ctx.dtypes[1]), ctx.scale) if to_b else None
        return gradient, of_x, of_a, of_b, None


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1 else tensor * scale


def _over_tokens(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The product over tokens (R,C) of (N,R) and (N,C), the latter cast to the type of the former."""
    right = right.to(left.dtype)
    if left.dtype == dtype:
        return left.t() @ right
    return torch.ops.inflate.summed_in_float32(left, right).to(dtype)


class FusedLinear(Linear):
    """A linear layer with LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(...,I) to (...,O)."""
        names = plain(self)
        if names is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)  # (N, I); the base layer's output is then no view, and can be added to in place
        output = self.base_layer(rows)  # (N, O)
        for name in names:
            factors = self.lora_A[name].weight, self.lora_B[name].weight
            output = LowRank.apply(output, rows, *factors, self.scaling[name])  # (N, O)
        return output.unflatten(0, x.shape[:-1])  # (..., O)


class FusedConv2d(Conv2d):
    """A convolution over pixels with LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B,I,H,W) to (B,O,H,W)."""
        names = plain(self)
        return super().forward(x, *args, **kwargs) if names is None or args or kwargs else _convolved(self, x, names)


class FusedConv3d(Conv3d):
    """A convolution over frames with LoRA."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B,I,F,H,W) to (B,O,F,H,W)."""
        names = plain(self)
        return super().forward(x, *args, **kwargs) if names is None or args or kwargs else _convolved(self, x, names)


FUSED: dict[type[nn.Module], type[nn.Module]] = {Linear: FusedLinear, Conv2d: FusedConv2d, Conv3d: FusedConv3d}


def fuse(layer: nn.Module) -> None:
    """Turn PEFT's layer into its fused subclass in place; one of another kind stays as it is."""
    layer.__class__ = FUSED.get(type(layer), type(layer))


def plain(layer: LoraLayer) -> list[str] | None:
    """The adapters that act on a layer, or None where PEFT's own forward is needed: merged, dropout, DoRA, biases."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    unusual = any(
        name in layer.lora_variant or layer.lora_bias[name] or not isinstance(layer.lora_dropout[name], nn.Identity)
        for name in names
    )
    return None if unusual else names


def _convolved(layer: LoraLayer, x: Tensor, names: list[str]) -> Tensor:
    """(B,I,...) to (B,O,...)."""
    output: Tensor = layer.base_layer(x)  # (B, O, ...)
    for name in names:
        inner = _apply(layer.lora_A[name], x.to(output.dtype))  # (B, R, ...)
        output = output + _apply(layer.lora_B[name], inner, layer.scaling[name])
    return output


def _apply(factor: Any, input: Tensor, scale: float = 1.0) -> Tensor:
    """What a factor, scaled, makes of an input, in the input's type."""
    output: Tensor = factor._conv_forward(input, _times(factor.weight, scale).to(input.dtype), None)
    return output
