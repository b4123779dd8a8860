"""DynamiCrafter's names: a constant in each tensor takes it where it belongs and back, at the published size too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from original_files import DYNAMICRAFTER, published_dynamicrafter
from safetensors.torch import load_file
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import dynamicrafter_keys as keys
from inflate.families import dynamicrafter_original as original
from inflate.models import exchange
from inflate.models.original_video_names import LVDM, layout_of, with_fps
from inflate.models.unet import VideoUNet

HEAD_WIDTHS = {"tiny_a": 16, "tiny_c": 8}
"""Of the recorded query transformers, which their tensors do not tell."""
UNET: dict[str, Any] = {
    "block_out_channels": (64, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "in_channels": 8,
    "out_channels": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": (1, 2),
    "use_linear_projection": True,
}


def unet(gate: bool, frames: int = 3) -> VideoUNet:
    """A UNet without memory; its heads are 64 channels wide."""
    context = {"embedding": 24, "width": 32, "depth": 2, "heads": 3, "head_width": 64, "frames": frames, "gate": gate}
    return exchange.build_unet({**UNET, "image_context": context}, with_fps(64))


def constants(shapes: dict[str, Any]) -> dict[str, Tensor]:
    """A tensor of each shape that holds a number of its own, once in memory."""
    return {key: torch.tensor(float(number)).expand(shape) for number, (key, shape) in enumerate(shapes.items())}


def number(tensor: Tensor) -> float:
    assert tensor.min() == tensor.max()
    return float(tensor.max())


def recorded(name: str, gate: bool) -> dict[str, Tensor]:
    """The tensors of a recorded UNet and its query transformer as a file has them."""
    if not (DYNAMICRAFTER / name).is_dir():
        pytest.skip(f"{DYNAMICRAFTER / name} is not here: recordings of the original are not part of the repository")
    parts = ((keys.UNET, "unet_tiny"), (keys.IMAGE_PROJ, "resampler_tiny"))
    tensors = {
        f"{prefix}{key}": tensor
        for prefix, stem in parts
        for key, tensor in load_file(DYNAMICRAFTER / name / f"{stem}.safetensors").items()
    }
    return {key: tensor.float() for key, tensor in tensors.items() if gate or not key.endswith(".alpha")}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_in.bias", "model.diffusion_model.input_blocks.0.0.bias"),
        ("conv_in.temporal.norm.bias", "model.diffusion_model.init_attn.0.norm.bias"),
        ("class_embedding.linear_2.bias", "model.diffusion_model.fps_embedding.2.bias"),
        ("down_blocks.0.downsamplers.0.conv.bias", "model.diffusion_model.input_blocks.3.0.op.bias"),
        ("down_blocks.1.resnets.0.conv1.bias", "model.diffusion_model.input_blocks.4.0.in_layers.2.bias"),
        (
            "mid_block.resnets.1.temporal.conv4.3.bias",
            "model.diffusion_model.middle_block.3.temopral_conv.conv4.3.bias",
        ),
        (
            "down_blocks.0.attentions.1.temporal.proj_in.bias",
            "model.diffusion_model.input_blocks.2.2.proj_in.bias",
        ),
        (
            "up_blocks.1.attentions.0.transformer_blocks.0.attn2.image.to_v.weight",
            "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.attn2.to_v_ip.weight",
        ),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn2.image.gate",
            "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.alpha",
        ),
        ("up_blocks.0.upsamplers.0.conv.bias", "model.diffusion_model.output_blocks.2.1.conv.bias"),
        ("query_transformer.latents", "image_proj_model.latents"),
        ("query_transformer.layers.1.attention.norm_latents.bias", "image_proj_model.layers.1.0.norm2.bias"),
        ("query_transformer.layers.0.attention.to_kv.weight", "image_proj_model.layers.0.0.to_kv.weight"),
        ("query_transformer.layers.0.feed_forward.linear_2.weight", "image_proj_model.layers.0.1.3.weight"),
    ],
)
def test_names(ours: str, theirs: str) -> None:
    assert keys.unet_names([ours], layout_of(UNET)) == {ours: theirs}


@pytest.mark.parametrize("gate", [False, True])
def test_each_tensor_goes_to_its_place_and_back(gate: bool) -> None:
    shapes = exchange.shapes(unet(gate))
    names = keys.unet_names(shapes, layout_of(UNET))
    start = constants(LVDM.shapes(shapes, names))
    assert any(key.endswith(".alpha") for key in start) == gate
    made = original.unet_of(start, "the file")
    assert made.image_context == unet(gate).image_context
    assert made.spec == with_fps(64)
    assert all(number(tensor) == number(start[names[key]]) for key, tensor in made.state_dict().items())
    back = original.unet_tensors(made)
    assert back.keys() == start.keys()
    assert all(torch.equal(back[key], start[key]) for key in start)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("name", HEAD_WIDTHS)
def test_a_recorded_model_is_read_and_written_bit_for_bit(name: str, gate: bool) -> None:
    tensors = recorded(name, gate)
    made = original.unet_of(tensors, name, HEAD_WIDTHS[name])
    assert made.image_context is not None
    assert (made.image_context.gate, made.image_context.frames) == (gate, 4)
    back = original.unet_tensors(made)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_the_published_unet_has_the_shapes_of_ours() -> None:
    published = published_dynamicrafter()
    start = constants({key: shape for key, shape in published.items() if key.startswith((keys.UNET, keys.IMAGE_PROJ))})
    made = original.unet_of(start, "the published checkpoint")
    assert sum(value.numel() for key, value in made.named_parameters() if not key.startswith("query_")) == 1_438_854_980
    back = original.unet_tensors(made)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == {key: published[key] for key in start}
    assert all(back[key].flatten()[0] == tensor.flatten()[0] for key, tensor in start.items())


def test_a_deepspeed_checkpoint_and_the_embedding_of_a_stride_are_known_by_todays_names() -> None:
    found = keys.plain({"_forward_module.model.diffusion_model.framestride_embed.0.bias": 1})
    assert found == {"model.diffusion_model.fps_embedding.0.bias": 1}


def test_a_unet_without_an_image_is_read_and_written() -> None:
    text = exchange.build_unet({**UNET, "in_channels": 4}, with_fps(64))
    names = keys.unet_names(exchange.shapes(text), layout_of(UNET))
    start = constants(LVDM.shapes(exchange.shapes(text), names))
    made = original.unet_of(start, "the file")
    assert made.image_context is None
    assert original.unet_tensors(made).keys() == start.keys()


def tensors_of() -> dict[str, Tensor]:
    shapes = exchange.shapes(unet(gate=False))
    return constants(LVDM.shapes(shapes, keys.unet_names(shapes, layout_of(UNET))))


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("image_proj_model.layers.1.1.3", r"1 missing \(image_proj_model\.layers\.1\.1\.3\.weight\)"),
        ("image_proj_model.", r"image_proj_model\.latents is missing"),
        ("model.diffusion_model.init_attn.", r"not a UNet in VideoCrafter's format: init_attn\.0\.proj_in\.weight"),
        ("model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k_ip", r"1 missing \(.*to_k_ip\.weight\)"),
    ],
)
def test_what_is_missing_is_named(prefix: str, message: str) -> None:
    tensors = {key: tensor for key, tensor in tensors_of().items() if not key.startswith(prefix)}
    with pytest.raises(CheckpointError, match=message):
        original.unet_of(tensors, "the file")


def test_what_is_left_over_or_misshapen_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"1 left over \(image_proj_model\.odd\)"):
        original.unet_of({**tensors_of(), "image_proj_model.odd": torch.zeros(1)}, "the file")
    with pytest.raises(CheckpointError, match=r"image_proj_model\.latents holds 7 queries, which are no groups of 16"):
        original.unet_of({**tensors_of(), "image_proj_model.latents": torch.zeros(1, 7, 32)}, "the file")
    name = "model.diffusion_model.out.2.bias"
    with pytest.raises(CheckpointError, match=r"another shape: model\.diffusion_model\.out\.2\.bias \(5,\) instead"):
        original.unet_of({**tensors_of(), name: torch.zeros(5)}, "the file")
