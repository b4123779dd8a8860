"""Bands of the timesteps of training."""

from __future__ import annotations

import pytest
import torch

from inflate.training.timesteps import by_band, middles


@pytest.mark.parametrize(("bands", "levels"), [(4, 1000), (3, 1000), (4, 333), (7, 600)])
def test_a_band_is_named_by_its_first_and_last_timestep(bands: int, levels: int) -> None:
    timesteps = torch.arange(levels)
    found = by_band(torch.zeros(levels, 1), timesteps, bands, levels)
    chosen = [timesteps[one.chosen] for one in found.values()]
    assert [*found] == [f"loss at timestep {int(each[0])}-{int(each[-1])}" for each in chosen]
    assert sum(map(len, chosen)) == levels
    assert all(middle in each for middle, each in zip(middles(bands, levels), chosen, strict=True))
