import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import randomise
from inflate.layers import frame_attention
from inflate.layers.branches import FrameTransformer
from inflate.layers.clip import ClipState
from inflate.layers.frame_attention import FrameAttention
from inflate.layers.temporal import TemporalTransformer
from inflate.training.memory import fused_attention

FRAMES, PIXELS, WIDTH = 3, 5, 16


class Noting(TorchDispatchMode):
    """Notes each operation with the shape of its first tensor."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), next((arg.shape for arg in args if isinstance(arg, torch.Tensor)), None)))
        return func(*args, **(kwargs or {}))

    def among(self, *names):
        return [call for call in self.calls if any(name in call[0] for name in names)]


def pair(dtype=torch.float64):
    torch.manual_seed(0)
    ours, theirs = (kind(WIDTH, heads=2, dim_head=8).to(dtype) for kind in (FrameAttention, Attention))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def over_rows(attention):
    """Diffusers' attention, which knows rows alone, over features (B,F,N,C)."""

    def apply(hidden):
        rows = hidden.transpose(1, 2).contiguous().flatten(0, 1)
        return attention(rows).unflatten(0, (len(hidden), -1)).transpose(1, 2)

    return apply


def output_and_gradients(function, network, hidden):
    network.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output = function(hidden)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return output, hidden.grad, *(parameter.grad for parameter in network.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("most", [frame_attention.ATTENTION_ROWS, 4])
@pytest.mark.parametrize("clips", [1, 2])
def test_it_equals_diffusers_over_rows(clips, most, monkeypatch):
    monkeypatch.setattr(frame_attention, "ATTENTION_ROWS", most)
    ours, theirs = pair()
    hidden = torch.randn(clips, FRAMES, PIXELS, WIDTH, dtype=torch.float64)
    expected = output_and_gradients(over_rows(theirs), theirs, hidden)
    for one, other in zip(output_and_gradients(ours, ours, hidden), expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    rows = hidden.flatten(0, 1)
    torch.testing.assert_close(ours(rows), theirs(rows), atol=1e-12, rtol=0)


def test_one_clip_is_never_copied_into_another_order():
    for kind, copies in ((FrameAttention, 0), (Attention, 3)):  # its input, and the gradients of both ends
        with torch.device("meta"):
            attention, hidden = kind(WIDTH, heads=2, dim_head=8), torch.empty(1, FRAMES, PIXELS, WIDTH)
        function = attention if kind is FrameAttention else over_rows(attention)
        with fused_attention(), Noting() as noted:
            hidden.requires_grad_()
            function(hidden).backward(torch.empty(hidden.shape, device="meta"))
        assert len(noted.among("clone", "copy", "contiguous")) == copies, noted.calls


@pytest.mark.parametrize("clips", [1, 2])
def test_no_kernel_gets_more_rows_than_a_grid_of_cuda_counts(clips):
    assert frame_attention.ATTENTION_ROWS == 2**16 - 1
    with torch.device("meta"):
        block, branch = TemporalTransformer(WIDTH, 2, 8, 12), FrameTransformer(WIDTH, 2, 8, 2)
        hidden, context = torch.empty(clips, 2, 70_000, WIDTH), torch.empty(clips, 1, 12)
        images = torch.empty(clips * 2, WIDTH, 280, 250, requires_grad=True)
    with fused_attention(), Noting() as noted:
        block(hidden, context).sum().backward()
        branch(images, None, ClipState(2)).sum().backward()
    forward, backward = noted.among("_attention.default"), noted.among("_attention_backward.default")
    assert max(shape[0] for _, shape in (*forward, *backward)) == frame_attention.ATTENTION_ROWS
    # three attentions over the frames of 70,000 or 140,000 pixels, and the block's one to its context
    assert len(forward) == len(backward) == 3 * (clips + 1) + 1


def test_another_processor_gets_no_more_rows_than_it_has_heads_for(monkeypatch):
    class Own(AttnProcessor):
        def __call__(self, attention, hidden_states, **extra):
            shapes.append(tuple(hidden_states.shape))
            return super().__call__(attention, hidden_states, **extra)

    shapes = []
    monkeypatch.setattr(frame_attention, "ATTENTION_ROWS", 9)
    ours, theirs = pair()
    ours.set_processor(Own())
    hidden = torch.randn(2, FRAMES, PIXELS, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(ours(hidden), over_rows(theirs)(hidden), atol=1e-12, rtol=0)
    assert shapes == [(4, FRAMES, WIDTH), (4, FRAMES, WIDTH), (2, FRAMES, WIDTH)]


def test_an_adapter_on_every_projection_takes_part():
    ours, theirs = pair()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    for network in (ours, theirs):
        torch.manual_seed(1)
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), network)
        network.double()
    hidden = torch.randn(1, FRAMES, PIXELS, WIDTH, dtype=torch.float64)
    found = output_and_gradients(ours, ours, hidden)
    assert len(found) == 2 + 2 * len(targets)
    for one, other in zip(found, output_and_gradients(over_rows(theirs), theirs, hidden), strict=True):
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_its_names_are_those_of_diffusers():
    assert isinstance(FrameAttention(WIDTH, heads=2, dim_head=8), nn.Module)
    ours, theirs = pair()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
