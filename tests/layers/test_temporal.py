import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import AlphaBlender, TemporalResnetBlock
from torch import nn

from helpers import randomise
from inflate.layers.clip import ClipState
from inflate.layers.temporal import (
    ContextAttention,
    TemporalConv,
    TemporalResnet,
    TemporalTransformer,
    TransformerTime,
    VideoBlock,
    constant_when_single,
    mix,
)
from inflate.training.memory import Ledger


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_conv_equals_conv3d(frames):
    layer = TemporalConv(6, 4)
    clip = torch.randn(2, 6, frames, 5, 3)
    expected = nn.functional.conv3d(clip, layer.weight, layer.bias, padding=(1, 0, 0))
    torch.testing.assert_close(layer(clip), expected, atol=1e-6, rtol=0)
    assert layer.weight.shape == (4, 6, 3, 1, 1)


def test_conv_identity_repeats_its_input_exactly():
    layer = TemporalConv(3)
    layer.identity_()
    clip = torch.randn(1, 3, 4, 5, 5)
    assert torch.equal(layer(clip), clip)


def test_mix_returns_equal_inputs_unchanged_and_image_frames_spatial():
    spatial, moved = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    share = torch.sigmoid(torch.tensor([0.3]))
    assert torch.equal(mix(spatial, spatial, share, None), spatial)
    images = torch.tensor([[True, False, False], [False, False, True]])
    mixed = mix(spatial, moved, share, images)
    assert torch.equal(mixed[images], spatial[images])
    torch.testing.assert_close(mixed[~images], (1 - share) * spatial[~images] + share * moved[~images])


def test_mix_has_a_gradient_at_birth_only_through_the_branch():
    share = torch.full((1,), 0.5, requires_grad=True)
    mix(torch.zeros(1, 2, 3), torch.ones(1, 2, 3), share, None).sum().backward()
    assert share.grad.item() == 6


@pytest.mark.parametrize("reverse", [False, True])
def test_resnet_equals_diffusers(reverse):
    theirs = TemporalResnetBlock(32, 32, temb_channels=12, eps=1e-5)
    ours = TemporalResnet(32, groups=32, eps=1e-5, time_channels=12, reverse=reverse)
    randomise(theirs)
    ours.load_state_dict({**theirs.state_dict(), "mix": torch.tensor([0.7])})
    blend = AlphaBlender(0.7, switch_spatial_to_temporal_mix=reverse)
    hidden, time = torch.randn(2 * 3, 32, 4, 4), torch.randn(2 * 3, 12)
    video = hidden.unflatten(0, (2, 3)).transpose(1, 2)
    expected = blend(video, theirs(video, time.unflatten(0, (2, 3))), torch.zeros(2, 3))
    found = ours(hidden, time, ClipState(3))
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1), atol=5e-6, rtol=0)
    assert found.is_contiguous()


def test_without_gradients_resnet_drops_each_feature_as_the_next_is_made():
    with torch.device("meta"):
        block, hidden = TemporalResnet(8, 4, 1e-5, None, False), torch.empty(2 * 3, 8, 16, 16)
    with torch.no_grad(), Ledger() as ledger:
        ledger.record([*block.parameters(), hidden])
        before = ledger.current
        block(hidden, None, ClipState(3))
    features = 4 * hidden.numel()
    assert 3 * features <= ledger.peak - before < 3.1 * features  # what a norm and SiLU, one after the other, make


def pair_of_blocks(context_width):
    theirs = TemporalBasicTransformerBlock(16, 16, 2, 8, context_width).eval()
    ours = TemporalTransformer(16, 2, 8, context_width).eval()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_transformer_equals_diffusers(tokens):
    ours, theirs = pair_of_blocks(12 if tokens else None)
    hidden = torch.randn(2, 3, 5, 16)
    context = torch.randn(2, tokens, 12) if tokens else None
    repeated = context.repeat_interleave(5, 0) if tokens else None
    expected = theirs(hidden.flatten(0, 1), num_frames=3, encoder_hidden_states=repeated)
    torch.testing.assert_close(ours(hidden, context).flatten(0, 1), expected, atol=2e-6, rtol=0)


def spatial_block():
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12).eval()
    constant_when_single(block)
    return block


def test_one_token_context_skips_the_query_and_gives_the_same():
    block = spatial_block()
    block.requires_grad_(False)
    hidden, context = torch.randn(3, 6, 16), torch.randn(3, 1, 12)
    assert isinstance(block.attn2, ContextAttention)
    assert block.attn2(hidden, context).shape == (3, 1, 16)
    fast = block(hidden, encoder_hidden_states=context)
    block.attn2.__class__ = Attention
    torch.testing.assert_close(fast, block(hidden, encoder_hidden_states=context), atol=1e-6, rtol=0)


def test_one_token_gradients_are_equal_too():
    block = spatial_block()
    block.requires_grad_(False)
    grads = []
    for kind in (ContextAttention, Attention):
        block.attn2.__class__ = kind
        torch.manual_seed(1)
        hidden = torch.randn(3, 6, 16, requires_grad=True)
        context = torch.randn(3, 1, 12, requires_grad=True)
        block(hidden, encoder_hidden_states=context).square().sum().backward()
        grads.append((hidden.grad, context.grad))
    for fast, slow in zip(*grads, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("part", ["norm2", "attn2.to_q", "attn2.to_k"])
def test_a_trained_query_gets_its_zero_gradient(part):
    block = spatial_block()
    block.requires_grad_(False)
    block.get_submodule(part).requires_grad_(True)
    block(torch.randn(3, 6, 16), encoder_hidden_states=torch.randn(3, 1, 12)).sum().backward()
    for parameter in block.get_submodule(part).parameters():
        assert parameter.grad.abs().max() < 1e-5
    with torch.no_grad():
        assert block.attn2(torch.randn(3, 6, 16), torch.randn(3, 1, 12)).shape == (3, 1, 16)


def test_several_tokens_masks_and_other_processors_take_the_usual_way():
    class Own(AttnProcessor2_0):
        pass

    attention = spatial_block().requires_grad_(False).attn2
    hidden, one = torch.randn(3, 6, 16), torch.randn(3, 1, 12)
    assert attention(hidden, torch.randn(3, 2, 12)).shape == (3, 6, 16)
    assert attention(hidden, one, attention_mask=torch.zeros(3, 1, 1)).shape == (3, 6, 16)
    attention.set_processor(Own())
    assert attention(hidden, one).shape == (3, 6, 16)


def test_frame_positions_start_at_zero_and_differ_once_trained():
    time = TransformerTime(16)
    assert torch.equal(time.positions(4), torch.zeros(4, 1, 16))
    randomise(time)
    positions = time.positions(4)
    assert positions.shape == (4, 1, 16)
    assert (positions[0] - positions[1]).abs().max() > 1e-3


def test_time_sees_the_context_of_each_clips_first_frame():
    context = torch.randn(2 * 3, 4, 12)
    assert torch.equal(VideoBlock._first_context(context, ClipState(3)), context[[0, 3]])
    assert torch.equal(VideoBlock._first_context((context, None), ClipState(3)), context[[0, 3]])
    assert VideoBlock._first_context(None, ClipState(3)) is None


def test_mix_is_one_dimensional():
    assert TransformerTime(8).mix.shape == (1,)
    assert TemporalResnet(8, 4, 1e-5, None, False).mix.shape == (1,)


def test_resnet_takes_channels_last_input_without_gradient():
    layer = TemporalResnet(8, 4, 1e-5, None, False)
    randomise(layer)
    plain = torch.randn(4, 8, 4, 4)
    state = ClipState(2, None)
    gradients = []
    for spatial in (plain, plain.contiguous(memory_format=torch.channels_last)):
        layer.zero_grad()
        layer(spatial, None, state).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in layer.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
