"""What guides the 2D parent, a ControlNet or an image adapter of diffusers, guides the frames of the inflated model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from torch import Tensor

from helpers import CROSS, randomise, tiny_unet_sd1, tiny_unet_sd2, unet_inputs
from inflate.errors import InflateError
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, TemporalSpec, VideoUNet

SPECS = [TemporalSpec(added_ids=0), MODELSCOPE, ANIMATEDIFF_V2]
IMAGE_WIDTH = 12


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def flat(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B*F,C,h,w), time steps (B*F,) and context (B*F,L,D) of all frames."""
    frames = inputs["sample"].shape[1]
    context = inputs["encoder_hidden_states"].repeat_interleave(frames, 0)
    return inputs["sample"].flatten(0, 1), inputs["timestep"].repeat_interleave(frames), context


def controlled(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What a ControlNet, trained as random weights can be, adds to the UNet for six frames and their pictures."""
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32)).eval()
    randomise(control)
    pictures = torch.rand(6, 3, 16, 16)
    down, middle = control(*flat(unet_inputs()), controlnet_cond=pictures, return_dict=False)
    assert min(float(each.std()) for each in (*down, middle)) > 1e-3
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_unet_sd1, tiny_unet_sd2])
@pytest.mark.parametrize("spec", SPECS)
def test_a_controlnet_drives_each_frame_as_it_drives_the_parent(
    spec: TemporalSpec, build: Callable[[], UNet2DConditionModel]
) -> None:
    parent, inputs = build(), unet_inputs()
    video, residuals = VideoUNet.from_2d(parent, spec), controlled(parent)
    expected = parent(*flat(inputs), **residuals).sample
    assert float((expected - parent(*flat(inputs)).sample).abs().max()) > 1e-2
    torch.testing.assert_close(video(**inputs, **residuals).sample.flatten(0, 1), expected, atol=2e-5, rtol=0)


def adapter(unet: UNet2DConditionModel) -> dict[str, dict[str, Tensor]]:
    """Random weights of an IP-Adapter of 4 tokens for a 2D UNet, numbered as published ones are."""
    tensors, number = {}, 1
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            for part in ("to_k_ip", "to_v_ip"):
                tensors[f"{number}.{part}.weight"] = torch.randn(module.to_k.out_features, CROSS)
            number += 2
    projection = {"proj.weight": torch.randn(4 * CROSS, IMAGE_WIDTH), "proj.bias": torch.zeros(4 * CROSS)}
    norm = {"norm.weight": torch.ones(CROSS), "norm.bias": torch.zeros(CROSS)}
    return {"image_proj": projection | norm, "ip_adapter": tensors}


def loaded(unet: UNet2DConditionModel, weights: dict[str, dict[str, Tensor]]) -> None:
    unet._load_ip_adapter_weights([weights])  # what diffusers' pipelines call


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("spec", SPECS)
def test_an_image_adapter_shows_each_frame_what_it_shows_the_parent(spec: TemporalSpec, tokens: int) -> None:
    parent, inputs = tiny_unet_sd2(), unet_inputs(tokens=tokens)
    video, weights = VideoUNet.from_2d(parent, spec), adapter(parent)
    plain = parent(*flat(inputs)).sample
    loaded(parent, weights)
    loaded(video, weights)
    images = {"added_cond_kwargs": {"image_embeds": [torch.randn(6, 1, IMAGE_WIDTH)]}}
    expected = parent(*flat(inputs), **images).sample
    assert float((expected - plain).abs().max()) > 1e-2
    torch.testing.assert_close(video(**inputs, **images).sample.flatten(0, 1), expected, atol=2e-5, rtol=0)
    kinds = {name: type(module.processor) for name, module in video.named_modules() if hasattr(module, "processor")}
    shown = {name for name, kind in kinds.items() if kind is IPAdapterAttnProcessor2_0}
    assert shown == {name for name in kinds if name.endswith("attn2") and ".temporal." not in name}
    assert any(".temporal." in name and name.endswith("attn2") for name in kinds)


@torch.no_grad()
def test_an_image_adapter_goes_and_leaves_the_model_as_it_was() -> None:
    video, inputs = VideoUNet.from_2d(tiny_unet_sd2(), MODELSCOPE).eval(), unet_inputs()
    randomise(video)
    before, processors = video(**inputs).sample, video.attn_processors
    loaded(video, adapter(tiny_unet_sd2()))
    video.encoder_hid_proj = None
    video.config.encoder_hid_dim_type = None
    video.set_attn_processor(processors)
    assert torch.equal(video(**inputs).sample, before)
    video.set_attn_processor(special := AttnProcessor2_0())
    attentions = [module for module in video.modules() if hasattr(module, "processor")]
    assert all(module.processor is special for module in attentions)
    assert len(attentions) > len(video.attn_processors)
    with pytest.raises(InflateError, match=r"each attention of the 2D model: see down_blocks\.0"):
        video.set_attn_processor({})
