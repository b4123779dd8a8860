"""Fused LoRA beside PEFT's own forward: outputs, gradients, what is kept, and the cases left to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from inflate.adapters.fused import FUSED, LowRank, fuse, plain, summed_in_float32
from inflate.layers.temporal import TemporalConv

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 40), (3, 7, 24)),
    "without bias": (lambda: nn.Linear(24, 40, bias=False), (5, 24)),
    "convolution": (lambda: nn.Conv2d(6, 10, 3, 2, 1), (2, 6, 8, 8)),
    "convolution of 1": (lambda: nn.Conv2d(6, 10, 1), (2, 6, 8, 8)),
    "over frames": (lambda: TemporalConv(6), (2, 6, 5, 3, 3)),
}


class Held(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


def pair(name: str, dtype: torch.dtype = torch.float32, strength: float = 1.0, **changes: Any) -> tuple[Held, Held]:
    """PEFT's layer and the fused one, of equal weights: the base of that type, the factors of float32 at least."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["layer"], **changes})
    theirs = Held(LAYERS[name][0]().to(dtype))
    inject_adapter_in_model(config, theirs)
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn_like(parameter, dtype=torch.promote_types(dtype, torch.float32)) * strength
    ours = copy.deepcopy(theirs)
    fuse(ours.layer)
    return theirs, ours


def results(held: Held, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of the factors, by PEFT's names."""
    x = x.clone().requires_grad_()
    output = held(x)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    held.zero_grad()
    (output * weights).sum().backward()
    gradients = [parameter.grad for _, parameter in sorted(held.named_parameters()) if parameter.requires_grad]
    return [output.detach(), x.grad, *gradients]  # type: ignore[list-item]


def example(name: str, dtype: torch.dtype = torch.float32, times: int = 1) -> Tensor:
    first, *rest = LAYERS[name][1]
    return torch.randn(first * times, *rest, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_are_those_of_peft(name: str, changes: dict[str, Any]) -> None:
    theirs, ours = pair(name, torch.float64, **changes)
    assert type(ours.layer) is FUSED[type(theirs.layer)]
    assert plain(ours.layer) == ["default"]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for one, other in zip(
        results(ours, example(name, torch.float64)), results(theirs, example(name, torch.float64)), strict=True
    ):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    theirs, ours = pair(name, **changes)
    for one, other in zip(results(ours, example(name)), results(theirs, example(name)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["linear", "convolution", "over frames"])
def test_in_half_precision_as_near_to_the_truth_as_peft(name: str, autocast: bool) -> None:
    half = torch.bfloat16
    theirs, ours = pair(name, half, strength=0.1)
    x = example(name, half, times=20)
    truth = results(copy.deepcopy(theirs).double(), x.double())
    with torch.autocast("cpu", half, enabled=autocast):
        found, common = results(ours, x), results(theirs, x)
    for place, (one, other, true) in enumerate(zip(found, common, truth, strict=True)):
        assert one.dtype == other.dtype
        # Without autocast, PEFT's factors see the gradient in float32: it alone is rounded there, here the factors too.
        slack = 1.1 if autocast or place == 0 else 3.0
        assert error(one, true) <= slack * error(other, true) + 1e-4


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def test_gradients_are_summed_in_float32_over_more_tokens_than_fit_at_once() -> None:
    left, right = (torch.randn(10_000, width).bfloat16() for width in (3, 5))
    summed = summed_in_float32(left, right)
    assert summed.dtype == torch.float32
    torch.testing.assert_close(summed.double(), left.double().t() @ right.double(), rtol=1e-5, atol=1e-3)
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(summed_in_float32, (left, right), test_utils=checks).values()) == {"SUCCESS"}


def kept(held: Callable[[Tensor], Any], x: Tensor) -> list[Tensor]:
    """The tensors of more than a factor's size that a forward pass keeps for the backward pass."""
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        held(x)
    return [tensor for tensor in tensors.values() if tensor.shape[0] == x.shape[:-1].numel() or tensor.shape == x.shape]


def test_layers_that_share_an_input_keep_it_once_and_in_its_own_type() -> None:
    pairs = [pair("linear", torch.bfloat16) for _ in range(3)]
    x = example("linear", torch.bfloat16).requires_grad_()
    common = kept(lambda x: [theirs(x) for theirs, _ in pairs], x)
    ours = kept(lambda x: [fused(x) for _, fused in pairs], x)
    inputs = [tensor for tensor in ours if tensor.shape[-1] == 24]
    assert [tensor.dtype for tensor in inputs] == [torch.bfloat16]
    assert len(ours) == 1 + 3  # the input, and what each layer makes of it, as wide as the rank
    assert sum(tensor.nbytes for tensor in ours) < 0.4 * sum(tensor.nbytes for tensor in common)


class Quantised(nn.Linear):
    """A linear layer whose forward alone knows its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * 0.25, self.bias)


def test_a_base_layer_is_called_and_its_weight_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LAYERS, "quantised", (lambda: Quantised(24, 40), (3, 7, 24)))
    theirs, ours = pair("quantised")
    theirs.layer.base_layer.weight.data *= 8  # whatever it holds, the forward decides
    ours.layer.base_layer.weight.data *= 8
    for one, other in zip(results(ours, example("linear")), results(theirs, example("linear")), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * float(other.abs().max()), rtol=0)


@contextmanager
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    calls: list[int] = []
    plainly = LowRank.apply
    with monkeypatch.context() as patch:
        patch.setattr(LowRank, "apply", lambda *given: (calls.append(1), plainly(*given))[1])
        yield calls


def test_several_adapters_switching_off_and_merging(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair("linear")
    for held in (theirs, ours):
        torch.manual_seed(3)
        held.layer.update_layer("second", 2, lora_alpha=4, config=LoraConfig(r=2, init_lora_weights=False))
        held.layer.set_adapter(["default", "second"])
    x = example("linear")
    with fused_calls(monkeypatch) as calls:
        for one, other in zip(results(ours, x), results(theirs, x), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2
    both = ours(x).detach()
    for held in (theirs, ours):
        held.layer.enable_adapters(False)
    assert torch.equal(ours(x), theirs(x))
    assert not torch.allclose(ours(x), both)
    for held in (theirs, ours):
        held.layer.enable_adapters(True)
    ours.layer.merge()
    torch.testing.assert_close(ours(x), both, atol=1e-5, rtol=1e-5)
    ours.layer.unmerge()
    torch.testing.assert_close(ours(x), both, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_not_plain_is_left_to_peft(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair("linear", **changes)
    assert plain(ours.layer) is None
    with fused_calls(monkeypatch) as calls:
        torch.manual_seed(0)
        found = results(ours, example("linear"))
        torch.manual_seed(0)
        assert all(
            torch.equal(one, other) for one, other in zip(found, results(theirs, example("linear")), strict=True)
        )
    assert calls == []


def test_a_sample_may_have_an_adapter_of_its_own() -> None:
    theirs, ours = pair("linear")
    x, names = example("linear"), ["default", "__base__", "default"]
    found, common = (held.eval().layer(x, adapter_names=names) for held in (ours, theirs))
    assert torch.equal(found, common)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_it_compiles_into_one_graph() -> None:
    _, ours = pair("linear")
    plainly = results(ours, example("linear"))
    ours.forward = torch.compile(ours.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]
    for one, other in zip(results(ours, example("linear")), plainly, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
