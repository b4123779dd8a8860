"""Frozen layers in fewer bits: the layer of the rounded weight, how much is rounded, what is stored and kept."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from inflate.layers import quantised
from inflate.layers.quantised import Kind
from inflate.layers.temporal import TemporalConv

KINDS: tuple[Kind, ...] = get_args(Kind)
LAYERS = {
    "linear": (lambda: nn.Linear(70, 33), (2, 5, 70)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3, stride=2, padding=1, bias=False), (2, 6, 9, 8)),
    "temporal convolution": (lambda: TemporalConv(8), (2, 8, 4, 3, 2)),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    """A frozen layer and an input that wants a gradient."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    return nn.Sequential(build()).to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype, requires_grad=True)


def both(network: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
    """A network's output and the gradient of its input, for a gradient of the output that is the output."""
    output = network(given)
    return output, torch.autograd.grad(output, given, output.detach())[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_stored_layer_is_the_layer_of_its_rounded_weight(name: str, kind: Kind) -> None:
    network, given = made(name)
    plain: Any = copy.deepcopy(network)
    assert quantised.store(network, kind) == ["0"]
    rounded = network[0].weight
    assert rounded.shape == plain[0].weight.shape
    assert 0 < float((rounded - plain[0].weight).norm() / plain[0].weight.norm()) < 0.11
    plain[0].weight.data = rounded
    for found, expected in zip(both(network, given), both(plain, given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_in_bf16_it_is_to_the_bit_what_autocast_makes_of_the_layer(name: str) -> None:
    network, given = made(name, torch.float32)
    plain = copy.deepcopy(network)
    quantised.store(network, "bf16")
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(network, given), both(plain, given)
    assert ours[0].dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu_the_codes_stand_for_the_same_weights(name: str, kind: Kind) -> None:
    network, given = made(name)
    quantised.store(network, kind)
    expected, weight = both(network, given), network[0].weight
    network.cuda()
    assert torch.equal(network[0].weight.cpu(), weight)
    assert network[0].original.device.type == "cpu"
    for ours, theirs in zip(both(network, given.detach().cuda().requires_grad_()), expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-10)


def rounding(weight: Tensor, kind: Kind) -> Tensor:
    stored = quantised.encode(weight, kind)
    return (quantised.decode(stored, weight.shape, weight.dtype) - weight).abs()


def test_no_weight_is_rounded_by_more_than_half_a_step() -> None:
    weight = torch.randn(10, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    largest = weight.abs().amax((1, 2, 3), keepdim=True)
    assert bool((rounding(weight, "bf16") <= weight.abs() * 2**-8).all())
    # The scale is one of bf16, and the largest code may fall short of the largest weight by its rounding.
    assert bool((rounding(weight, "int8") <= largest * (0.5 / 127 + 2**-8)).all())
    flat = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64))
    error = torch.nn.functional.pad(rounding(weight, "nf4").flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    blocks = flat.view(-1, 64).abs().amax(1, keepdim=True)
    steps = torch.tensor(quantised.normal_floats()).diff()
    assert bool((error <= blocks * (float(steps.max()) / 2 + 2**-8)).all())
    for kind in KINDS:
        assert not rounding(weight, kind)[3].any(), kind
        assert not rounding(torch.zeros(2, 64), kind).any(), kind


def test_the_values_of_nf4_are_the_published_ones() -> None:
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert quantised.normal_floats() == pytest.approx(published, abs=2e-7)


@pytest.mark.parametrize(("kind", "size"), [("bf16", 2 * 4096), ("int8", 4096 + 2 * 32), ("nf4", 2048 + 2 * 64 + 2048)])
def test_a_weight_takes_its_bits_its_scales_and_the_table(kind: Kind, size: int) -> None:
    layer = nn.Linear(128, 32, bias=False).requires_grad_(False)
    quantised.store_layer(layer, kind)
    assert not [*layer.parameters()]
    assert sum(buffer.nbytes for buffer in layer.buffers()) == size


def test_a_backward_pass_keeps_neither_the_weight_nor_the_input() -> None:
    network, given = made("linear")
    kept: list[Tensor] = []
    quantised.store(network, "nf4")
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = network(given)
    assert kept == []
    assert torch.autograd.grad(output.sum(), given)[0].any()


def test_its_state_is_the_weight_as_it_was_loaded_and_so_it_computes_meanwhile() -> None:
    network, given = made("convolution")
    state, output = copy.deepcopy(network.state_dict()), network(given)
    quantised.store(network, "nf4")
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    rounded = network(given)
    assert not torch.equal(rounded, output)
    with quantised.as_loaded(network):
        assert torch.equal(network(given), output)
        assert isinstance(network[0].weight, nn.Parameter)
    assert torch.equal(network(given), rounded)
    assert torch.equal(copy.deepcopy(network)(given), rounded)


def test_what_learns_and_the_ends_and_other_layers_stay() -> None:
    class Other(nn.Linear):
        """A layer that may do more than its class."""

    network = nn.ModuleDict(
        {"conv_in": nn.Conv2d(2, 2, 3), "a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": Other(2, 2)}
    )
    network.requires_grad_(False)
    network["a"].bias.requires_grad_(True)
    assert quantised.kind_of(network) is None
    assert quantised.store(network, "int8") == ["b"]
    assert quantised.kind_of(network) == "int8"
    assert [name for name, _ in network.named_buffers()] == ["b.codes", "b.scale"]
