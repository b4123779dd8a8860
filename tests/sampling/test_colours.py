"""Wavelet correction: coarse parts are the enlarged clip's, finer ones the refined clip's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.sampling.colours import check_levels, coarse, recoloured


def frames(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 3, 24, 20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stripes(width: int) -> Tensor:
    """Columns that alternate every so many pixels, -1 and 1."""
    signs = 1.0 - 2.0 * (torch.arange(64) // width % 2)
    return signs.expand(1, 3, 64, 64)


def test_no_level_is_everything_and_many_are_what_is_plain() -> None:
    assert torch.equal(coarse(frames(0), 0), frames(0))
    plain = torch.full((1, 3, 9, 9), 0.3, dtype=torch.float64)
    torch.testing.assert_close(coarse(plain, 4), plain)


def test_one_level_is_the_filter() -> None:
    impulse = torch.zeros(1, 3, 5, 5)
    impulse[:, :, 2, 2] = 1.0
    weights = torch.tensor([0.25, 0.5, 0.25])
    expected = torch.zeros(5, 5)
    expected[1:4, 1:4] = torch.outer(weights, weights)
    assert torch.equal(coarse(impulse, 1), expected.expand(1, 3, 5, 5))


def test_levels_part_sizes_at_about_two_to_their_power() -> None:
    kept = {width: float(coarse(stripes(width), 3)[..., 16:-16].std() / stripes(width).std()) for width in (1, 4, 16)}
    assert kept[1] < 1e-6
    assert kept[4] < 0.2
    assert kept[16] > 0.7


@pytest.mark.parametrize("sizes", [[3], [1, 2], [1, 1, 1]])
def test_the_coarse_part_is_the_enlarged_clips_however_frames_come(sizes: list[int]) -> None:
    before, after = frames(0), frames(1)
    found = torch.cat(list(recoloured(after.split(sizes), iter(before), 2)))
    torch.testing.assert_close(found, after - coarse(after, 2) + coarse(before, 2), atol=1e-12, rtol=0)


def test_a_shift_of_colour_is_undone_and_detail_is_not() -> None:
    before = frames(0)
    shift = torch.tensor([0.2, -0.1, 0.05], dtype=torch.float64)[:, None, None]
    (found,) = recoloured([before + shift], before, 5)
    torch.testing.assert_close(found, before, atol=1e-12, rtol=0)
    detail = stripes(1)
    (kept,) = recoloured([detail], torch.zeros_like(detail), 3)
    torch.testing.assert_close(kept[..., 8:-8, 8:-8], detail[..., 8:-8, 8:-8])


def test_no_levels_leave_frames_alone_and_ask_for_none() -> None:
    (found,) = recoloured([frames(1)], [], 0)
    assert torch.equal(found, frames(1))


def test_no_frame_is_given_the_colours_of_another() -> None:
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(recoloured([frames(1)], frames(0)[:1], 2))


@pytest.mark.parametrize("levels", [-1, 11])
def test_levels_that_cannot_be_are_refused(levels: int) -> None:
    with pytest.raises(ConfigError, match=f"keep_colours is {levels}: it must be 0"):
        check_levels(levels)
