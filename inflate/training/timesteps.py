"""Bands of Stable Diffusion's timesteps, which losses are told of one by one."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from inflate.objectives import TRAIN_TIMESTEPS
from inflate.training.player import Selected


def middles(bands: int) -> list[int]:
    """The timestep in the middle of each band."""
    return [int((band + 0.5) * TRAIN_TIMESTEPS / bands) for band in range(bands)]


def by_band(loss: Tensor, timestep: Tensor, bands: int) -> dict[str, Selected]:
    """Losses of frames (B, F) for each band by name, at timesteps (B,) or (B, F); nothing of a single band."""
    band = (timestep * bands // TRAIN_TIMESTEPS).reshape(len(loss), -1).expand_as(loss)
    names = _names(bands) if bands > 1 else []
    return {name: Selected(loss.flatten(), (band == place).flatten()) for place, name in enumerate(names)}


def _names(bands: int) -> list[str]:
    edges = [band * TRAIN_TIMESTEPS // bands for band in range(bands + 1)]
    return [f"loss at timestep {low}-{high - 1}" for low, high in pairwise(edges)]
