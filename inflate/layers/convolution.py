"""2D convolutions that keep their input only where their weights learn.

PyTorch's keep it always: one formula gives all three gradients. That of the input alone needs the weights and the
input's shape, so that a frozen convolution, as beside an adapter, has nothing to keep.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

Pair = int | tuple[int, ...]


class Convolution(nn.Conv2d):
    """A 2D convolution whose input is not kept for the backward pass while its weights are frozen."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            return super()._conv_forward(input, weight, bias)
        return convolve(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
) -> Tensor:
    """`functional.conv2d`, which keeps its input only if weight or bias need a gradient."""
    learns = weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns or not input.requires_grad or not torch.is_grad_enabled():
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output: Tensor = _Frozen.apply(input, weight, bias, (stride, padding, dilation, groups))
    return output


def convolutions_within(module: nn.Module) -> None:
    """Turn the plain 2D convolutions of a layer into `Convolution`s, in place; they keep their parameters."""
    for each in module.modules():
        if type(each) is nn.Conv2d:
            each.__class__ = Convolution


class _Frozen(torch.autograd.Function):
    """A convolution of which only the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.dtype, ctx.how = input.shape, input.dtype, how
        return functional.conv2d(input, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (weight,) = gradients, ctx.saved_tensors
        # Under autocast the weights were cast for the forward pass: they are kept as they are, and cast again.
        given = conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.how)
        return given.to(ctx.dtype), None, None, None
