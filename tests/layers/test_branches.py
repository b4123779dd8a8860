import pytest
import torch
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

from helpers import randomise
from inflate.errors import InflateError
from inflate.layers import frame_attention
from inflate.layers.branches import FrameTransformer, TemporalConvs
from inflate.layers.clip import ClipState


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def clips(batch=2, frames=3):
    return torch.randn(batch * frames, 32, 4, 4)


def layers():
    convs, plain = TemporalConvs(32, 8), FrameTransformer(32, 4, 8, 8)
    motion = FrameTransformer(32, 4, 8, 8, norm_over="frame", positions=5)
    return {"convs": convs, "transformer": plain, "motion": motion}


@pytest.mark.parametrize("name", layers())
def test_a_newborn_adds_nothing_and_a_trained_one_leaves_image_frames_alone(name):
    layer, hidden = layers()[name].eval(), clips()
    assert torch.equal(layer(hidden, None, ClipState(3)), hidden)
    randomise(layer)
    images = torch.tensor([[True, False, False], [False, False, True]])
    output = layer(hidden, None, ClipState(3, images))
    assert torch.equal(output[images.flatten()], hidden[images.flatten()])
    assert (output - hidden)[~images.flatten()].abs().amax((1, 2, 3)).min() > 1e-3
    assert torch.equal(output[1], layer(hidden, None, ClipState(3))[1])
    assert output.is_contiguous()


@pytest.mark.parametrize("name", layers())
def test_clips_of_a_batch_do_not_see_each_other(name):
    layer, hidden = layers()[name].eval(), clips()
    randomise(layer)
    together = layer(hidden, None, ClipState(3))
    alone = torch.cat([layer(clip, None, ClipState(3)) for clip in hidden.split(3)])
    torch.testing.assert_close(together, alone, atol=2e-6, rtol=0)


def test_convolutions_equal_diffusers():
    theirs, ours = TemporalConvLayer(32, norm_num_groups=8), TemporalConvs(32, 8)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    hidden = clips()
    torch.testing.assert_close(ours(hidden, None, ClipState(3)), theirs(hidden, 3), atol=5e-6, rtol=0)


def test_dropout_stands_between_the_convolutions_in_training_only():
    layer, hidden = TemporalConvs(32, 8, dropout=0.5), clips()
    randomise(layer)
    drawn = [layer(hidden, None, ClipState(3)) for _ in range(2)]
    assert not torch.equal(*drawn)
    layer.eval()
    assert torch.equal(layer(hidden, None, ClipState(3)), layer(hidden, None, ClipState(3)))


def test_a_transformer_equals_diffusers_at_any_width():
    theirs = TransformerTemporalModel(8, 16, in_channels=32, norm_num_groups=8).eval()
    ours = FrameTransformer(32, 8, 16, 8).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    hidden = clips()
    expected = theirs(hidden, num_frames=3, return_dict=False)[0]
    torch.testing.assert_close(ours(hidden, None, ClipState(3)), expected, atol=5e-6, rtol=0)


def test_a_motion_module_over_the_clip_equals_diffusers():
    known = {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 7}
    theirs = AnimateDiffTransformer3D(4, 8, in_channels=32, norm_num_groups=8, **known).eval()
    ours = FrameTransformer(32, 4, 8, 8, positions=7).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    hidden = clips()
    expected = theirs(hidden, num_frames=3)
    torch.testing.assert_close(ours(hidden, None, ClipState(3)), expected, atol=5e-6, rtol=0)


@pytest.mark.parametrize(("norm_over", "blind"), [("frame", True), ("clip", False)])
def test_a_norm_per_frame_is_blind_to_each_frames_scale(norm_over, blind):
    layer, hidden = FrameTransformer(32, 4, 8, 8, norm_over).eval(), clips(batch=1)
    randomise(layer)
    scaled = hidden * torch.tensor([1.0, 2.0, 8.0]).reshape(3, 1, 1, 1)
    changes = [layer(video, None, ClipState(3)) - video for video in (hidden, scaled)]
    assert torch.allclose(*changes, atol=1e-4) == blind


@pytest.mark.parametrize(("positions", "blind"), [(None, True), (8, False)])
def test_only_positions_tell_the_order_of_frames(positions, blind):
    layer, hidden = FrameTransformer(32, 4, 8, 8, positions=positions).eval(), clips(batch=1)
    randomise(layer, scale=0.2)
    forth, back = layer(hidden, None, ClipState(3)), layer(hidden.flip(0), None, ClipState(3)).flip(0)
    assert torch.allclose(forth, back, atol=1e-5) == blind


def test_more_frames_than_positions_are_refused():
    layer = FrameTransformer(32, 4, 8, 8, positions=3)
    assert layer(clips(1, 3), None, ClipState(3)).shape == (3, 32, 4, 4)
    with pytest.raises(InflateError, match="longer than the 3 positions"):
        layer(clips(1, 4), None, ClipState(4))


def test_rows_beyond_what_a_kernel_indexes_are_split(monkeypatch):
    layer, hidden = FrameTransformer(32, 4, 8, 8).eval(), clips()
    randomise(layer)
    whole = layer(hidden, None, ClipState(3))
    monkeypatch.setattr(frame_attention, "ATTENTION_ROWS", 5)
    torch.testing.assert_close(layer(hidden, None, ClipState(3)), whole, atol=2e-6, rtol=0)
