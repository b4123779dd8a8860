"""The hash by which a base is told: of what does something, however else it was drawn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import tiny_unet
from inflate.adapters import bases
from inflate.layers.image_context import ImageContext
from inflate.models.unet import DYNAMICRAFTER, VideoUNet
from inflate.surgery import inflate_unet


def inflated(seed: int) -> VideoUNet:
    """A UNet that could attend to images, told the frame rate, without effect of either; the seed is of what is new."""
    parent = tiny_unet(True, attention_head_dim=(2, 4))
    torch.manual_seed(seed)
    unet, _ = inflate_unet(parent, replace(DYNAMICRAFTER, added_id_dim=32))
    unet.add_image_context(ImageContext(embedding=8, width=8, depth=1, heads=1, head_width=8, frames=2, queries=2))
    return unet


def test_what_was_drawn_at_random_and_does_nothing_is_left_out() -> None:
    one, other = inflated(1), inflated(2)
    assert bases.is_newborn(one)
    assert not torch.equal(one.query_transformer.latents, other.query_transformer.latents)
    assert bases.sha256(one) == bases.sha256(other)


@pytest.mark.parametrize(
    "layer",
    [
        "mid_block.attentions.0.transformer_blocks.0.attn2.image.to_v.weight",
        "mid_block.attentions.0.temporal.proj_out.weight",
        "class_embedding.linear_2.weight",
    ],
)
def test_what_does_something_counts(layer: str) -> None:
    one, other = inflated(1), inflated(1)
    assert bases.sha256(one) == bases.sha256(other)
    with torch.no_grad():
        other.get_parameter(layer).add_(0.1)
    assert not bases.is_newborn(other)
    assert bases.sha256(one) != bases.sha256(other)
