"""Rows of padding before downsampling that upsampling takes off again: latents of any height."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from helpers import randomise, tiny_unet
from inflate.models.unet import MODELSCOPE, VideoUNet

TEXT = torch.randn(1, 3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def padded(rows: int = 2) -> VideoUNet:
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=16), MODELSCOPE)
    randomise(unet)
    unet.double().eval()
    if rows > 1:
        unet.pad_rows(rows)
    return unet


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize(("height", "width"), [(10, 8), (8, 8), (9, 7), (11, 12), (5, 5), (4, 9)])
def test_any_size_comes_back_as_it_was(height: int, width: int, rows: int) -> None:
    sample = torch.randn(1, 2, 4, height, width, dtype=torch.float64)
    with torch.no_grad():
        output = padded(rows)(sample, 5, TEXT).sample
    assert output.shape == sample.shape
    assert torch.isfinite(output).all()


def test_rows_are_added_on_the_way_down_and_taken_off_on_the_way_up() -> None:
    heights: list[tuple[int, int]] = []

    def saw(module: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        heights.append((given[0].shape[2], output.shape[2]))

    unet = padded()
    for block in (*unet.down_blocks, *unet.up_blocks):
        for layer in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
            layer.register_forward_hook(saw)
    with torch.no_grad():
        unet(torch.randn(1, 2, 4, 90, 8, dtype=torch.float64), 5, TEXT)
    down = [pair for pair in heights if pair[0] > pair[1]]
    assert down[0] == (90, 46)
    assert sorted(heights[len(down) :]) == sorted((low, high) for high, low in down)


def test_a_saved_model_pads_the_same(tmp_path: Path) -> None:
    unet, sample = padded(), torch.randn(1, 2, 4, 10, 8, dtype=torch.float64)
    unet.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path).double().eval()
    with torch.no_grad():
        assert torch.equal(again(sample, 5, TEXT).sample, unet(sample, 5, TEXT).sample)
        assert (padded(1)(sample, 5, TEXT).sample - unet(sample, 5, TEXT).sample).abs().max() > 1e-4


def test_one_row_is_the_padding_of_stable_diffusion() -> None:
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=16), MODELSCOPE).double().eval()
    unet.pad_rows(2)
    unet.pad_rows(1)
    assert unet.config.downsample_padding == [1, 1]
    plain = VideoUNet.from_2d(tiny_unet(cross_attention_dim=16), MODELSCOPE).double().eval()
    plain.load_state_dict(unet.state_dict())
    sample = torch.randn(1, 2, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(unet(sample, 5, TEXT).sample, plain(sample, 5, TEXT).sample)
