"""Overlapping windows over time, for clips that are longer than a network can be given.

At each denoising step the network predicts every window by itself, and where windows overlap the predictions are
averaged with weights that fall off to a window's edges: the clip that lies closest to all of them, as MultiDiffusion
(Bar-Tal et al., 2302.08113) has it over space. Noise is drawn for whole clips, and no window waits for another, so that
clips depend on the windows' places alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.objectives import Predict


@dataclass(frozen=True)
class Windows:
    """How a clip is cut into windows. ConfigError where that cannot be."""

    frames: int
    """length of each"""
    overlap: int
    """frames that neighbours share, at least; the places are evenly spread, so that some share more"""

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ConfigError(f"windows of {self.frames} frames: they must have at least 1")
        if not 0 <= self.overlap < self.frames:
            raise ConfigError(f"overlap is {self.overlap}: it must be 0 to {self.frames - 1}, below a window's length")

    def places(self, total: int) -> list[slice]:
        """Where the windows of a clip of so many frames lie; one for all of a clip that is no longer than a window."""
        room = total - self.frames
        if room <= 0:
            return [slice(0, total)]
        gaps = -(-room // (self.frames - self.overlap))
        starts = [room * number // gaps for number in range(gaps + 1)]
        return [slice(start, start + self.frames) for start in starts]

    def weights(self, like: Tensor) -> Tensor:
        """What each frame of a window counts where windows overlap, falling off evenly to both edges: (F, 1, 1, 1)."""
        place = torch.arange(1, self.frames + 1)
        return torch.minimum(place, place.flip(0)).to(like)[:, None, None, None]

    def over(self, predict: Predict) -> Predict:
        """The prediction for clips (B, F, C, h, w) of any length, of a network that is given one window at a time."""

        def windowed(noisy: Tensor, timestep: Tensor) -> Tensor:
            places = self.places(noisy.shape[1])
            if len(places) == 1:
                return predict(noisy, timestep)
            weights = self.weights(noisy)  # (W, 1, 1, 1)
            total, weight = torch.zeros_like(noisy), noisy.new_zeros(noisy.shape[1], 1, 1, 1)
            for place in places:
                total[:, place] += weights * predict(noisy[:, place], timestep)
                weight[place] += weights
            return total / weight  # (B, F, C, h, w)

        return windowed
