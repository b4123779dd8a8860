"""Tensors kept in 8 bits: a code of 256 values, scaled by the largest magnitude of each block of a row.

The values are those of dynamic tree quantisation (Dettmers et al., 8-bit Optimizers via Block-wise Quantization,
2110.02861, section 2): seven decades, of which each holds half as many values as the one above it. Blocks do not cross
rows, so that a tensor whose rows are spread over processes is coded as it would be whole.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
"""Most values that share a scale."""
DECADES = 7
SHIFT = 12
"""Bits of a float32 that a code is looked up without: the lowest of its 23 bits of mantissa."""


class Coded(NamedTuple):
    """A tensor of at least two dimensions in 8 bits."""

    codes: Tensor
    """uint8, of its shape"""
    scales: Tensor
    """float32, (rows, blocks)"""


def empty(like: Tensor) -> Coded:
    """Zeros, of the shape and device of a tensor."""
    scales = torch.zeros(len(like), _blocks(like), dtype=torch.float32, device=like.device)
    return Coded(torch.zeros_like(like, dtype=torch.uint8, memory_format=torch.contiguous_format), scales)


def encode(tensor: Tensor, signed: bool) -> Coded:
    """The nearest values that 8 bits can hold, for values that are not negative unless they are `signed`."""
    rows, count = tensor.float().flatten(1), _blocks(tensor)
    width = _width(rows)
    blocks = functional.pad(rows, (0, count * width - rows.shape[1])).unflatten(1, (count, width))  # (rows, count, w)
    scales = blocks.abs().amax(2)  # (rows, count)
    relative = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    # The first bits of a number tell its code: to search 255 bounds for each takes ten times as long on a CPU.
    codes = table(signed, tensor.device)[(relative.view(torch.int32) >> SHIFT) + _offset()]  # (rows, count, w)
    return Coded(codes.flatten(1)[:, : rows.shape[1]].reshape(tensor.shape), scales)


def decode(coded: Coded, signed: bool) -> Tensor:
    """The values of a coded tensor, float32."""
    codes, scales = coded
    rows = codes.flatten(1)
    values = _values(signed, codes.device)[rows.int()]  # (rows, columns)
    spread = scales.repeat_interleave(_width(rows), 1)[:, : rows.shape[1]]
    return values.mul_(spread).view(codes.shape)


@functools.cache
def values(signed: bool) -> tuple[float, ...]:
    """The 256 values of a code, ascending, in [-1, 1] or [0, 1]."""
    positive = []
    for decade in range(DECADES):
        count = 2 ** (decade + 1 - signed)
        top = 10.0 ** (decade + 1 - DECADES)
        positive += [top * (0.1 + 0.9 * (place + 0.5) / count) for place in range(count)]
    negative = [-value for value in positive] if signed else []
    return tuple(sorted([*negative, 0.0, *positive, 1.0]))


def _blocks(tensor: Tensor) -> int:
    """Blocks of each row."""
    return math.ceil(math.prod(tensor.shape[1:]) / BLOCK)


def _width(rows: Tensor) -> int:
    """Values of a block of (rows, columns): all blocks are equally wide, but for the last."""
    return math.ceil(rows.shape[1] / _blocks(rows))


def _offset() -> int:
    """What makes places in the table of a number's first bits, which as an integer are negative for negative ones."""
    return 1 << (31 - SHIFT)


@functools.cache
def _values(signed: bool, device: torch.device) -> Tensor:
    return torch.tensor(values(signed), device=device)


@functools.cache
def table(signed: bool, device: torch.device) -> Tensor:
    """The code of every number by its first bits, of the middle of the numbers that have them: uint8, 1 MiB."""
    known = torch.tensor(values(signed), dtype=torch.float64)
    places = torch.arange(-_offset(), _offset(), dtype=torch.int32)
    numbers = (places << SHIFT | 1 << (SHIFT - 1)).view(torch.float32).double()
    return torch.bucketize(numbers, (known[1:] + known[:-1]) / 2).to(torch.uint8).to(device)
