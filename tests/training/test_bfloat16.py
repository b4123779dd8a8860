"""Networks in bfloat16 without autocast: what is rounded, what is not, and that all comes back for the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inflate.adapters import attach
from inflate.adapters.settings import AdapterSettings
from inflate.errors import CheckpointError
from inflate.training.bfloat16 import Narrow, round_inputs
from inflate.training.loop import fit
from inflate.training.player import total_norm
from tiny_svd import Clips, family, image_to_video
from toy import settings

pytestmark = pytest.mark.usefixtures("on_cpu")
PURE: dict[str, Any] = {"precision": "pure_bf16", "lr": 1e-3, "steps": 2}


def test_weights_and_activations_are_bfloat16_and_what_is_told_is_not() -> None:
    task, seen = image_to_video(), {}
    unet = task.family.unet
    Narrow(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    for name, module in unet.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    batch = {name: value[None] for name, value in Clips()[1].items()}
    task.fixed_losses([batch], [1.0])
    assert seen.pop("time_proj") == torch.float32  # the sinusoids of noise levels
    assert set(seen.values()) == {torch.bfloat16}


def test_features_are_rounded_and_numbers_are_not() -> None:
    level, clip = torch.tensor([0.1]), torch.rand(1, 2, 4, 4, 4)
    (rounded, same), named = round_inputs(nn.Identity(), (clip, level), {"context": clip[0], "mask": clip[0] > 0.5})
    assert (rounded.dtype, named["context"].dtype, named["mask"].dtype) == (torch.bfloat16, torch.bfloat16, torch.bool)
    assert same is level


def test_frozen_weights_come_back_to_the_bit_and_adapters_stay_float32() -> None:
    unet = family().unet.float().requires_grad_(False)
    before = {name: p.clone() for name, p in unet.named_parameters()}
    attach.create(unet, AdapterSettings(kind="lora", rank=2, targets=["temporal.attn1.to_*"]), [
        name for name, _ in unet.named_modules() if name.endswith(("temporal.attn1.to_q", "temporal.attn1.to_v"))
    ])  # fmt: skip
    narrow = Narrow(unet)
    kinds = {name: p.dtype for name, p in unet.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "lora_" not in name} == {torch.bfloat16}
    narrow.widen()
    after = {name.replace(".base_layer", ""): p for name, p in unet.named_parameters() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_run_evaluates_in_bfloat16_and_exports_in_full_precision(ema: float, tmp_path: Path) -> None:
    task, seen = image_to_video(trainable="temporal"), {}
    unet = task.family.unet
    frozen = {name: p.detach().clone() for name, p in unet.named_parameters() if not p.requires_grad}
    evaluate = task.evaluate
    task.evaluate = lambda: seen.update(evaluated=next(unet.parameters()).dtype) or evaluate()
    task.preview = lambda folder: None
    task.export = lambda folder: seen.update({name: p.detach().clone() for name, p in unet.named_parameters()})
    fit(task, Clips(), settings(tmp_path / "run", ema=ema, **PURE))
    assert seen.pop("evaluated") == torch.bfloat16
    assert {tensor.dtype for tensor in seen.values()} <= {torch.float64, torch.float32}
    assert all(torch.equal(seen[name], frozen[name]) for name in frozen)
    trained = [tensor for name, tensor in seen.items() if name not in frozen]
    exact = [torch.equal(tensor, tensor.bfloat16().to(tensor)) for tensor in trained]
    assert all(exact) is (ema == 0)  # an average has more digits than what is averaged
    losses = evaluate()  # the run is over: full precision, of the last weights
    assert losses["held-out loss"] > 0


def test_a_run_in_another_precision_does_not_go_on(tmp_path: Path) -> None:
    task = image_to_video()
    task.preview = task.export = lambda folder: None
    fit(task, Clips(), settings(tmp_path / "run", **PURE))
    with pytest.raises(CheckpointError, match=r"bfloat16 weights \(training.precision=pure_bf16\) was yes, is absent"):
        fit(image_to_video(), Clips(), settings(tmp_path / "run", steps=3, resume="latest"))


def test_the_norm_of_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    gradients = [torch.full((100, 7), 0.011).bfloat16(), torch.full((3,), 1.3).bfloat16()]
    wanted = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert float(total_norm(gradients)) == pytest.approx(float(wanted), rel=1e-6)
    assert total_norm(gradients).dtype == torch.float32
