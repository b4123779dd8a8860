"""ModelScope text-to-video, ZeroScope and the UNets of VGen: loaded from and written to their published formats.

`UNet3DConditionModel` of diffusers and our `VideoUNet` share tensors, by the maps of `modelscope_keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import UNet3DConditionModel
from safetensors.torch import save_file
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import modelscope_keys
from inflate.files import new_file
from inflate.layers.conditioning import ImageTokens
from inflate.models import exchange, folders
from inflate.models.original_video_names import (
    FPS,
    VGEN,
    head_widths,
    layout_of,
    refuse_other_layers,
    refuse_what_originals_lack,
    with_fps,
)
from inflate.models.unet import MODELSCOPE, TemporalSpec, VideoUNet

_SHARED_SETTINGS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "mid_block_scale_factor",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "time_cond_proj_dim",
)


class ImageToVideo(NamedTuple):
    """A UNet in VGen's format, and the layers beside it that make its context of an image embedding, if it has any."""

    unet: VideoUNet
    tokens: ImageTokens | None


def load_diffusers(folder: Path, read: exchange.Read = exchange.read_tensors) -> VideoUNet:
    """A VideoUNet from UNet3DConditionModel's folder; CheckpointError, listing the tensors, where they do not fit."""
    kind = folders.unet_kind(folder, UNet3DConditionModel)
    unet = exchange.build_unet(*_image_config(exchange.with_defaults(kind, folder)))
    names = exchange.inverse(modelscope_keys.unet_to_diffusers(exchange.shapes(unet)))
    tensors = exchange.read_weights(folder, read)
    exchange.adopt(unet, exchange.convert(tensors, names, exchange.shapes(unet), str(folder)))
    return unet


def to_diffusers(unet: VideoUNet) -> UNet3DConditionModel:
    """The same model as diffusers' class, which shares its memory; CheckpointError where that cannot represent it."""
    refuse_what_diffusers_lacks(unet)
    config = {key: unet.config[key] for key in _SHARED_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        config[side] = tuple(name.replace("2D", "3D") for name in unet.config[side])
    with torch.device("meta"):
        target = UNet3DConditionModel(**config, attention_head_dim=head_widths(unet).pop())
    tensors = exchange.detached(unet)
    names = modelscope_keys.unet_to_diffusers(tensors)
    exchange.adopt(target, exchange.convert(tensors, names, exchange.shapes(target), "this UNet"))
    return target


def refuse_what_diffusers_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where UNet3DConditionModel cannot represent a model."""
    slots = replace(MODELSCOPE, cross_attention_resnet_eps=unet.config.norm_eps)
    refuse_other_layers(unet, slots, "diffusers' UNet3DConditionModel", {"class_embed_type": None})


def refuse_what_vgen_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where VGen's UNets cannot represent a model."""
    refuse_what_originals_lack(unet, VGEN.code)
    if unet.image_context is not None:
        raise CheckpointError("VGen has no place for: an image context")


def load_vgen(file: Path, read: exchange.Read = exchange.read_tensors) -> ImageToVideo:
    """The UNet in a file under VGen's names, as `from_vgen` gives it."""
    return from_vgen(read(file), str(file))


def save_vgen(model: ImageToVideo, file: Path) -> None:
    """Writes a .safetensors file under VGen's names; CheckpointError where they have no place for a layer."""
    tensors = to_vgen(model)
    with new_file(file) as aside:
        save_file(tensors, aside)


def from_vgen(tensors: Mapping[str, Tensor], origin: str) -> ImageToVideo:
    """The UNet of VGen's tensors and its image tokens' layers, if there are any.

    CheckpointError, listing the tensors, where one is missing or left over.
    """
    beside = {key: tensor for key, tensor in tensors.items() if key.startswith(modelscope_keys.TOKENS_PREFIX)}
    own = {key: tensor for key, tensor in tensors.items() if key not in beside}
    config = VGEN.config(own)
    told_fps = FPS in own
    unet = exchange.build_unet(config, with_fps(config["block_out_channels"][0]) if told_fps else MODELSCOPE)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(VGEN.names(wanted, layout_of(config)))
    exchange.adopt(unet, exchange.convert(own, names, wanted, origin))
    return ImageToVideo(unet, _tokens(beside, config["cross_attention_dim"], origin) if beside else None)


def to_vgen(model: ImageToVideo) -> dict[str, Tensor]:
    """The tensors under VGen's names, which share the model's memory; CheckpointError where it has other layers."""
    unet = model.unet
    refuse_what_vgen_lacks(unet)
    tensors = exchange.detached(unet)
    names = VGEN.names(tensors, layout_of(unet.config))
    shapes = VGEN.shapes(exchange.shapes(unet), names)
    beside = {} if model.tokens is None else exchange.detached(model.tokens)
    named = {f"{modelscope_keys.TOKENS_PREFIX}{key}": tensor for key, tensor in beside.items()}
    return {**exchange.convert(tensors, names, shapes, "this UNet"), **named}


def _tokens(tensors: Mapping[str, Tensor], width: int, origin: str) -> ImageTokens:
    named = {key.removeprefix(modelscope_keys.TOKENS_PREFIX): tensor for key, tensor in tensors.items()}
    missing = {"0.weight", "0.bias", "2.weight", "2.bias"} ^ set(named)
    if missing:
        raise CheckpointError(f"{origin}: image tokens are made by two linear layers; look at {', '.join(missing)}")
    hidden, embedding = named["0.weight"].shape
    with torch.device("meta"):
        tokens = ImageTokens(embedding, hidden, len(named["2.bias"]) // width, width)
    wanted = exchange.shapes(tokens)
    exchange.adopt(tokens, exchange.convert(named, {key: key for key in wanted}, wanted, origin))
    return tokens


def _image_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], TemporalSpec]:
    """The 2D configuration and the temporal specification of a UNet3DConditionModel's configuration."""
    width = config["attention_head_dim"]
    if not isinstance(width, int):
        raise CheckpointError(f"attention_head_dim is {width}: the heads of UNet3DConditionModel have one width")
    flat = {key: config[key] for key in _SHARED_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        flat[side] = tuple(name.replace("3D", "2D") for name in config[side])
    heads = tuple(channels // width for channels in config["block_out_channels"])
    settings = {**flat, "attention_head_dim": heads, "use_linear_projection": True}
    return settings, replace(MODELSCOPE, cross_attention_resnet_eps=config["norm_eps"])
