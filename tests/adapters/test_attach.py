"""Adapters on a UNet: each kind trained, kept, loaded, taken off; and on diffusers' own class by PEFT alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from tiny_adapter import adapted, output, settings, train, trained, video_unet

from helpers import randomise, write_image_model
from inflate.adapters import attach, file, targets
from inflate.adapters.settings import KINDS
from inflate.errors import CheckpointError
from inflate.families.svd import SVD
from inflate.families.svd_keys import unet_to_diffusers
from inflate.layers.recompute import recomputes
from inflate.models.unet import VideoUNet


def tensors(unet: VideoUNet) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_trained(kind: str, tmp_path: Path) -> None:
    made = trained(kind)
    file.write(tmp_path / "a.safetensors", made.adapter)
    fresh = video_unet()
    attach.load(fresh, file.read(tmp_path / "a.safetensors"))
    assert float((output(fresh) - made.output).abs().max()) <= 1e-5
    assert float((output(fresh) - output(video_unet())).abs().max()) > 1e-3
    frozen = {name for name, parameter in fresh.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in fresh.named_parameters() if f".{attach.SLOT}" in name}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_born_without_effect_and_alone_learns(kind: str) -> None:
    unet, plain = video_unet(), output(video_unet())
    wanted = settings(kind)
    attach.create(unet, wanted, targets.resolve(unet, wanted))
    assert float((output(unet) - plain).abs().max()) <= 1e-5
    before = tensors(unet)
    train(unet)
    moved = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in unet.named_parameters() if value.requires_grad}
    assert all(f".{attach.SLOT}" in name for name in moved)


def test_a_kept_adapter_is_honoured_in_alpha(tmp_path: Path) -> None:
    made = trained(alpha=8.0)
    file.write(tmp_path / "a.safetensors", made.adapter)
    read = file.read(tmp_path / "a.safetensors")
    assert set(read.alpha.values()) == {8.0}
    fresh = video_unet()
    attach.load(fresh, replace(read, alpha=dict.fromkeys(read.alpha, 4.0)))
    assert float((output(fresh) - made.output).abs().max()) > 1e-3


def test_each_layer_may_have_a_rank_and_an_alpha_of_its_own(tmp_path: Path) -> None:
    made = trained()
    adapter = made.adapter
    first, *_ = adapter.rank
    wide = {f"unet.{first}.lora_A.weight": 0, f"unet.{first}.lora_B.weight": 1}
    doubled = {n: torch.cat([t, t], wide[n]) if n in wide else t for n, t in adapter.tensors.items()}
    same = replace(
        adapter, tensors=doubled, rank=adapter.rank | {first: 4}, alpha=adapter.alpha | {first: adapter.alpha[first]}
    )
    file.write(tmp_path / "a.safetensors", same)
    fresh = video_unet()
    attach.load(fresh, file.read(tmp_path / "a.safetensors"))  # twice the rank, twice the product, the same alpha
    assert float((output(fresh) - made.output).abs().max()) <= 1e-5


def test_taken_off_the_unet_is_what_it_was() -> None:
    unet, before = video_unet(), tensors(video_unet())
    memory = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data_ptr()
    attach.load(unet, trained().adapter)
    assert attach.carries(unet)
    attach.detach(unet)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data_ptr() == memory
    assert not attach.carries(unet)
    attach.load(unet, trained("loha").adapter)  # and takes another


def unfit(adapter: file.Adapter, change: str) -> file.Adapter:
    kept, first = dict(adapter.tensors), next(iter(adapter.rank))
    if change == "strange":
        return replace(adapter, rank={**adapter.rank, "mid_block.attentions.7.to_q": 2})
    if change == "missing":
        del kept[f"unet.{first}.lora_B.weight"]
    elif change == "surplus":
        kept[f"unet.{first}.lora_magnitude_vector"] = torch.ones(3)
    else:
        kept[f"unet.{first}.lora_A.weight"] = torch.ones(2, 7)
    return replace(adapter, tensors=kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strange", "layers that this model does not have: mid_block.attentions.7.to_q"),
        ("missing", r"does not fit this model, tensor by tensor: unet\..*lora_B.weight"),
        ("surplus", "lora_magnitude_vector"),
        ("shape", "lora_A.weight"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(change: str, message: str) -> None:
    unet, before = video_unet(), tensors(video_unet())
    with pytest.raises(CheckpointError, match=message):
        attach.load(unet, unfit(trained().adapter, change))
    assert unet.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_a_second_adapter_is_refused() -> None:
    unet, adapter = adapted(), trained().adapter
    with pytest.raises(CheckpointError, match="carries an adapter already"):
        attach.load(unet, adapter)


def gradients(unet: VideoUNet) -> dict[str, torch.Tensor]:
    unet(**targets.inputs(unet, 1)).sample.square().mean().backward()
    found = {name: value.grad.clone() for name, value in unet.named_parameters() if value.grad is not None}
    unet.zero_grad()
    return found


def test_gradients_are_the_same_where_activations_are_recomputed() -> None:
    unet = adapted()
    kept = gradients(unet)
    unet.enable_gradient_checkpointing()
    assert recomputes(unet)
    again = gradients(unet)
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        torch.testing.assert_close(again[name], value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[VideoUNet, UNetSpatioTemporalConditionModel]:
    """A UNet with diffusers' epsilon, and diffusers' own of its export."""
    root = tmp_path_factory.mktemp("exported")
    family = SVD.load(write_image_model(root / "image"), epsilon=1e-6)
    randomise(family.unet)
    family.save_pretrained(root / "base")
    return family.unet, UNetSpatioTemporalConditionModel.from_pretrained(root / "base" / "unet")


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_diffusers_own_unet_takes_it_by_peft(
    kind: str, exported: tuple[VideoUNet, UNetSpatioTemporalConditionModel]
) -> None:
    ours, theirs = copy.deepcopy(exported)
    wanted = settings(kind, targets=["temporal.attn1.to_*", "temporal.conv1", "attn1.to_q", "proj_in"])
    attach.create(ours, wanted, targets.resolve(ours, wanted))
    train(ours, lr=0.005)
    given = targets.inputs(ours, 1)
    inputs = (given["sample"], given["timestep"], given["encoder_hidden_states"], given["added_time_ids"])
    with torch.no_grad():
        alone = theirs(*inputs).sample
        load_by_peft(theirs, attach.carried(ours, wanted, {}))
        expected, found = ours(*inputs).sample, theirs(*inputs).sample
    assert float((found - expected).abs().max()) <= 1e-5
    assert float((alone - expected).abs().max()) > 1e-3


def load_by_peft(unet: Any, adapter: file.Adapter) -> None:
    """As a stranger would: PEFT's own functions, on the file's tensors by diffusers' names."""
    names = unet_to_diffusers(name.removeprefix("unet.") for name in adapter.tensors)
    renamed = {new: adapter.tensors[f"unet.{old}"] for old, new in names.items()}
    layers = unet_to_diffusers(f"{name}.weight" for name in adapter.rank).values()
    config = LoraConfig(
        r=2, lora_alpha=3.0, target_modules=[layer.removesuffix(".weight") for layer in layers],
        use_rslora=adapter.kind == "rslora", use_dora=adapter.kind == "dora",
    )  # fmt: skip
    inject_adapter_in_model(config, unet)
    assert set_peft_model_state_dict(unet, renamed).unexpected_keys == []
    unet.eval()
