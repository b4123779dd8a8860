"""FreeU: stronger features and weaker low frequencies of skip connections, in the first layers of the way up.

Source: Si et al., FreeU (2309.11497), in the form of VGen's refinement model: half of the features' channels by one
factor, and the two by two lowest frequencies of the skip connection by another.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FreeU(NamedTuple):
    """The factors of one layer."""

    backbone: float
    """of the first half of the features' channels"""
    skip: float
    """of the skip connection's lowest frequencies"""


PUBLISHED = (FreeU(1.1, 0.6), FreeU(1.2, 0.4))
"""Of the first two layers of VGen's refinement model, which was trained without."""


def freed(hidden: Tensor, skip: Tensor, factors: FreeU) -> tuple[Tensor, Tensor]:
    """Features (N,C,h,w) and a skip connection (N,D,h,w) as FreeU alters them, in their precision."""
    half = hidden.shape[1] // 2
    stronger = torch.cat([hidden[:, :half] * factors.backbone, hidden[:, half:]], dim=1)  # (N, C, h, w)
    return stronger, damped(skip, factors.skip)


def damped(features: Tensor, factor: float) -> Tensor:
    """Features (N,D,h,w) whose frequencies -1 and 0 along both axes are multiplied by a factor, in float32 at least."""
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    spectrum = torch.fft.fft2(exact)  # (N, D, h, w)
    low = torch.ones_like(spectrum.real[0, 0])  # (h, w)
    for row in (0, -1):
        low[row, [0, -1]] = factor
    return torch.fft.ifft2(spectrum * low).real.to(features.dtype)
