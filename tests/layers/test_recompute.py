import copy
from functools import partial

import pytest
import torch
from diffusers.models.attention import FeedForward
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from inflate.layers.clip import Clip, ClipState
from inflate.layers.recompute import InParts, divide, recompute_by, recomputes, run, set_recompute, units

keep = partial(checkpoint, use_reentrant=False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Scaled(nn.Module):
    """Multiplies by the number of frames: a stand-in for a layer that depends on the clip state."""

    recompute = None

    def __init__(self) -> None:
        super().__init__()
        self.clip = Clip()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, value):
        return run(self, lambda value: self.weight * value * value * self.clip.state.frames, value)


def test_recomputation_sees_the_state_of_its_own_forward_pass():
    layer = Scaled()
    set_recompute(layer, keep)
    value = torch.tensor(2.0, requires_grad=True)
    total = torch.zeros(())
    for frames in (3, 5):
        with layer.clip.during(ClipState(frames)):
            total = total + layer(value)
    total.backward()
    assert layer.weight.grad == 4 * (3 + 5)
    assert value.grad == 2 * 2 * (3 + 5)


def test_set_recompute_switches_on_and_off():
    layer = nn.Sequential(Scaled(), nn.Linear(2, 2))
    set_recompute(layer, keep)
    assert recomputes(layer)
    set_recompute(layer, None)
    assert not recomputes(layer)


def test_where_nothing_learns_nothing_is_recomputed():
    layer, calls = Scaled(), []
    set_recompute(layer, lambda function, *tensors: calls.append(len(tensors)) or function(*tensors))
    with layer.clip.during(ClipState(3)):
        layer.requires_grad_(False)
        assert not layer(torch.tensor(2.0)).requires_grad
        assert calls == []
        layer(torch.tensor(2.0, requires_grad=True))
        layer.requires_grad_(True)
        layer(torch.tensor(2.0))
        assert calls == [1, 1]
        with torch.no_grad():
            layer(torch.tensor(2.0))
    assert calls == [1, 1]


class Block(nn.Module):
    """A feed-forward with the norm before it, as transformer blocks have them."""

    recompute = None

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm, self.ff = nn.LayerNorm(8), FeedForward(8, activation_fn="geglu", dropout=dropout)

    def forward(self, tokens):
        return tokens + self.ff(self.norm(tokens))


def blocks(parts, dropout=0.0, lora=False):
    """A plain block and an equal one in parts, in float64."""
    plain = Block(dropout).double()
    if lora:
        plain.requires_grad_(False)
        targets = ["net.0.proj", "net.2"]
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), plain)
    divided = copy.deepcopy(plain)
    divide(divided.ff, divided.norm)
    recompute_by(divided, {"": "nothing"}, parts)
    return plain, divided


def gradients(block, tokens):
    torch.manual_seed(3)
    given = tokens.clone().requires_grad_(True)
    output = block(given)
    output.square().sum().backward()
    return {"output": output.detach(), "input": given.grad} | {
        name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("parts", [2, 5, 100])
def test_a_feed_forward_in_parts_is_the_whole_ones_equal(parts, lora):
    plain, divided = blocks(parts, lora=lora)
    tokens = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    expected, found = gradients(plain, tokens), gradients(divided, tokens)
    assert expected.keys() == found.keys()
    assert len(found) == 2 + (4 if lora else 6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-10, rtol=1e-10, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(divided(tokens), plain(tokens), atol=1e-10, rtol=0)


def test_parts_are_recomputed_with_the_dropout_of_the_forward_pass():
    _, divided = blocks(3, dropout=0.5)
    tokens = torch.randn(6, 8, dtype=torch.float64)

    def loss(scale):
        torch.manual_seed(3)
        return divided(tokens * scale).square().sum()

    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss(scale).backward()
    step = 1e-6
    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    torch.testing.assert_close(scale.grad, slope.detach(), rtol=1e-6, atol=0)


def test_parts_keep_the_input_only():
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    held = []
    for block in blocks(4):
        sizes.clear()
        own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
        tokens = torch.randn(64, 8, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            block(tokens)
        held.append(sum(size for place, size in sizes.items() if place not in own))
    assert held[1] == 64 * 8 * 8
    assert held[0] > 15 * held[1]


def test_only_plain_feed_forwards_are_divided():
    own = type("Own", (FeedForward,), {})(8, activation_fn="geglu")
    norm = nn.LayerNorm(8)
    divide(own, norm)
    assert not isinstance(own, InParts)
    assert type(norm) is nn.LayerNorm


def test_policies_of_units_reach_their_feed_forwards():
    pair = nn.ModuleList([Block(), Block()])
    for block in pair:
        divide(block.ff, block.norm)
    recompute_by(pair, {"0": "feed_forward", "1": "units"}, parts=1)
    assert list(units(pair)) == ["0", "1"]
    assert (pair[0].recompute, pair[0].ff.parts, pair[1].ff.parts) == (None, 1, 0)
    assert pair[1].recompute is not None
    recompute_by(pair, {"0": "nothing", "1": "nested"}, parts=4)
    assert (pair[0].ff.parts, pair[1].ff.parts) == (4, 4)
