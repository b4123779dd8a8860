import pytest
import torch

from helpers import randomise, tiny_unet_sd2, unet_inputs
from inflate.layers.up_blocks import VideoCrossAttnUpBlock, VideoUpBlock, join
from inflate.models.unet import TemporalSpec, VideoUNet


def inflated():
    unet = VideoUNet.from_2d(tiny_unet_sd2(), TemporalSpec(added_ids=0))
    randomise(unet)
    return unet.double()


def inputs():
    return {name: value.double() for name, value in unet_inputs().items()}


def test_both_kinds_of_up_blocks_join_skip_connections_as_their_parents_do():
    unet = inflated()
    assert [type(block) for block in unet.up_blocks] == [VideoUpBlock, VideoCrossAttnUpBlock]
    found = unet(**inputs()).sample
    for block in unet.up_blocks:
        block.__class__ = type(block).__base__
    torch.testing.assert_close(found, unet(**inputs()).sample, atol=1e-12, rtol=0)


def test_freeu_alters_skip_connections_as_in_the_image_model():
    unet = inflated()
    plain = unet(**inputs()).sample
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    found = unet(**inputs()).sample
    for block in unet.up_blocks:
        block.__class__ = type(block).__base__
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, unet(**inputs()).sample, atol=1e-12, rtol=0)


@pytest.mark.parametrize("learning", [(True, True), (True, False), (False, True)])
def test_gradients_part_into_memory_of_their_own(learning):
    parts = [
        torch.randn(2, channels, 4, 4, requires_grad=wanted) for channels, wanted in zip((3, 5), learning, strict=True)
    ]
    factor = torch.randn(2, 8, 4, 4)
    (join(*parts) * factor).sum().backward()
    for part, expected in zip(parts, factor.split((3, 5), 1), strict=True):
        if part.requires_grad:
            assert torch.equal(part.grad, expected)
            assert part.grad.untyped_storage().nbytes() == part.numel() * 4
        else:
            assert part.grad is None
