"""FreeU: which channels and which frequencies it alters."""

from __future__ import annotations

import math

import torch

from helpers import randomise, tiny_unet
from inflate.layers.freeu import PUBLISHED, FreeU, damped, freed
from inflate.models.unet import MODELSCOPE, VideoUNet

FEATURES = torch.randn(2, 5, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_half_of_the_channels_are_stronger() -> None:
    hidden, skip = freed(FEATURES, FEATURES, FreeU(1.5, 1.0))
    torch.testing.assert_close(hidden[:, :2], 1.5 * FEATURES[:, :2])
    assert torch.equal(hidden[:, 2:], FEATURES[:, 2:])
    torch.testing.assert_close(skip, FEATURES, atol=1e-12, rtol=0)


def test_a_constant_is_of_the_lowest_frequency_and_a_checkerboard_of_none() -> None:
    constant = torch.ones(1, 1, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(damped(constant, 0.4), 0.4 * constant)
    rows, columns = torch.arange(6)[:, None], torch.arange(8)
    board = (-1.0) ** (rows + columns)[None, None].double()
    torch.testing.assert_close(damped(board, 0.4), board)


def test_of_the_next_waves_one_of_each_pair_of_frequencies_is_damped() -> None:
    """Frequency -1 and not 1, as the centre of an even spectrum has it: of a cosine, the half."""
    angle = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    wave = angle.cos().expand(1, 1, 6, 8)
    torch.testing.assert_close(damped(wave, 0.0), wave / 2, atol=1e-12, rtol=0)


def test_it_acts_in_the_first_layers_of_the_way_up_until_it_is_taken_away() -> None:
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=16), MODELSCOPE)
    randomise(unet)
    unet.double().eval()
    sample, text = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64), torch.randn(1, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = unet(sample, 5, text).sample
        unet.set_freeu(PUBLISHED)
        altered = unet(sample, 5, text).sample
        unet.set_freeu(())
        assert torch.equal(unet(sample, 5, text).sample, plain)
    assert (altered - plain).abs().max() > 1e-4
    unet.set_freeu(PUBLISHED)
    places = [block.free for each in unet.up_blocks for block in each.resnets]
    assert places[:2] == list(PUBLISHED)
    assert not any(places[2:])
