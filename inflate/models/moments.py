"""Mean and variance of latents: where sampling starts from at a noise level that does not hide them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from inflate.errors import DataError


@dataclass(frozen=True)
class LatentMoments:
    """What is known of clips' scaled latents beforehand, channel by channel, whatever the clips' size and length.

    The Gaussian with these moments comes closest, in Kullback-Leibler divergence, to the latents of all places taken
    together (2406.15735 has a mean for each place of clips of one size, and one variance for all).
    """

    mean: tuple[float, ...]
    """of each channel"""
    variance: tuple[float, ...]
    """of each channel"""

    @classmethod
    def of(cls, clips: Iterable[Tensor]) -> Self:
        """Measures clips of latents, (..., C, h, w) each; DataError where there are none."""
        sums = [(len(each), each.sum(dim=0), each.square().sum(dim=0)) for each in map(_by_channel, clips)]
        if not sums:
            raise DataError("latents are measured on clips, and there are none")
        places = sum(count for count, _, _ in sums)
        mean, square = (torch.stack(each).sum(dim=0) / places for each in list(zip(*sums, strict=True))[1:])  # (C,)
        return cls(tuple(map(float, mean)), tuple(map(float, square - mean**2)))

    @classmethod
    def told(cls, settings: Mapping[str, Any]) -> Self | None:
        """Those in an export's settings, under `latent_moments`; none where they were not measured."""
        told = settings.get("latent_moments")
        return cls(tuple(told["mean"]), tuple(told["variance"])) if told else None

    def start(self, noise: Tensor, sigma: float, signal: float = 1.0) -> Tensor:
        """Latents (..., C, h, w) as they are likely at a noise level, from standard normal ones of that shape.

        At that level a clip is `signal` times its latents and `sigma` times noise.
        """
        mean, variance = (noise.new_tensor(each)[:, None, None] for each in (self.mean, self.variance))  # (C, 1, 1)
        return signal * mean + (signal**2 * variance + sigma**2).sqrt() * noise


def _by_channel(clip: Tensor) -> Tensor:
    return clip.movedim(-3, -1).flatten(0, -2).double()  # (n, C)
