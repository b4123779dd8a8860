"""Keeping a clip's colours while its details are drawn anew: the wavelet correction of StableSR (2305.07015).

A diffusion model and its autoencoder shift colours and the brightness of whole regions, from frame to frame, too, which
shows as flicker. What a refinement is for is finer than that: so the coarse part of every frame is the enlarged clip's
again, and only what is finer is the refined one's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from inflate.errors import ConfigError

LEVELS = 5
"""Wavelet levels in StableSR, on frames of 512 pixels and more."""


def coarse(frames: Tensor, levels: int) -> Tensor:
    """What frames (F, 3, H, W) hold that is larger than about 2**levels pixels: of the same shape.

    The scaling coefficients of an undecimated (à trous) wavelet transform with the filter [1, 2, 1] / 4, the edges
    repeated.
    """
    weights = frames.new_tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(weights, weights).expand(frames.shape[1], 1, 3, 3)
    for reach in (2**level for level in range(levels)):
        padded = functional.pad(frames, (reach,) * 4, mode="replicate")
        frames = functional.conv2d(padded, kernel, groups=frames.shape[1], dilation=reach)
    return frames


def recoloured(parts: Iterable[Tensor], enlarged: Iterable[Tensor], levels: int) -> Iterator[Tensor]:
    """Frames that come in parts (f, 3, H, W), with the coarse part of as many enlarged ones, each (3, H, W).

    Of no levels they are left as they are. RuntimeError where there are fewer enlarged ones.
    """
    frames = iter(enlarged)
    for part in parts:
        if levels:
            before = torch.stack([next(frames) for _ in part]).to(part)  # (f, 3, H, W)
            part = part + coarse(before - part, levels)
        yield part


def check_levels(levels: int) -> None:
    """Raise ConfigError for a number of levels that cannot be."""
    if not 0 <= levels <= 10:
        raise ConfigError(f"keep_colours is {levels}: it must be 0 (no) to 10 wavelet levels; StableSR has {LEVELS}")
