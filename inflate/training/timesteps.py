"""Bands of the timesteps of training, which losses are told of one by one."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor

from inflate.objectives import TRAIN_TIMESTEPS
from inflate.training.player import Selected


def middles(bands: int, levels: int = TRAIN_TIMESTEPS) -> list[int]:
    """The timestep in the middle of each band, of the first so many timesteps."""
    return [int((band + 0.5) * levels / bands) for band in range(bands)]


def by_band(loss: Tensor, timestep: Tensor, bands: int, levels: int = TRAIN_TIMESTEPS) -> dict[str, Selected]:
    """Losses of frames (B, F) for each band by name, at timesteps (B,) or (B, F) below `levels`; nothing of one."""
    band = (timestep * bands // levels).reshape(len(loss), -1).expand_as(loss)
    names = _names(bands, levels) if bands > 1 else []
    return {name: Selected(loss.flatten(), (band == place).flatten()) for place, name in enumerate(names)}


def _names(bands: int, levels: int) -> list[str]:
    edges = [math.ceil(band * levels / bands) for band in range(bands + 1)]
    return [f"loss at timestep {low}-{high - 1}" for low, high in pairwise(edges)]
