import pytest
import torch
from torch import nn
from torch.nn import functional

from inflate.layers.convolution import Convolution, convolutions_within, convolve


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def kept(call):
    """The sizes of what a graph keeps."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: sizes.append(each.numel()) or each, lambda each: each):
        output = call()
    return output, sizes


@pytest.mark.parametrize("how", [{}, {"stride": 2, "padding": 1}, {"groups": 2, "dilation": 2, "bias": False}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_frozen_convolution_gives_the_same_and_keeps_its_weights_alone(how, layout):
    layer = nn.Conv2d(4, 6, 3, **how).double().requires_grad_(False)
    given = torch.randn(2, 4, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)
    outputs, inputs = [], []
    for kind in (nn.Conv2d, Convolution):
        layer.__class__ = kind
        inputs.append(given.clone().requires_grad_(True))
        output, sizes = kept(lambda: layer(inputs[-1]))
        output.square().sum().backward()
        outputs.append(output)
    assert sizes == [layer.weight.numel()]
    assert torch.equal(*outputs)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("learns", ["weight", "bias"])
def test_one_that_learns_is_an_ordinary_one(learns):
    layer = Convolution(4, 6, 3).requires_grad_(False)
    getattr(layer, learns).requires_grad_(True)
    given = torch.randn(2, 4, 9, 8, requires_grad=True)
    output, sizes = kept(lambda: layer(given))
    assert given.numel() in sizes
    output.sum().backward()
    assert getattr(layer, learns).grad is not None


def test_under_autocast_the_gradient_has_the_inputs_type_and_weights_are_not_copied():
    weight, given = torch.randn(6, 4, 3, 3), torch.randn(2, 4, 9, 8, requires_grad=True)
    twin = given.detach().clone().requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = kept(lambda: convolve(given, weight, None))
        functional.conv2d(twin, weight).float().square().sum().backward()
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert given.grad.dtype == torch.float32
    torch.testing.assert_close(given.grad, twin.grad)


def test_only_plain_convolutions_within_a_layer_change_and_other_paddings_still_work():
    layer = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding="same"), nn.Conv1d(4, 4, 3), nn.Conv2d(4, 4, 3, padding_mode="reflect")
    )
    before = set(layer.state_dict())
    convolutions_within(layer)
    assert [type(each) for each in layer] == [Convolution, nn.Conv1d, Convolution]
    assert set(layer.state_dict()) == before
    layer.requires_grad_(False)
    given = torch.randn(1, 4, 5, 5, requires_grad=True)
    layer[2](layer[0](given)).sum().backward()
    assert given.grad.abs().sum() > 0
