"""ModelScope text-to-video, ZeroScope and the UNets of VGen: loaded from and written to their published formats.

`UNet3DConditionModel` and `I2VGenXLUNet` of diffusers and our `VideoUNet` share tensors, by the maps of
`modelscope_keys`.

VGen adds what its detail encoder makes up twice before the input convolution; diffusers' class and ours take it once.
So the weights of the input convolution for it are doubled on reading VGen's file and halved on writing one, which is
exact. Weights of diffusers' class that were converted by their names alone have half of the strength they were trained
with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import I2VGenXLUNet, UNet3DConditionModel
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import modelscope_keys
from inflate.layers.hierarchy import Hierarchy
from inflate.models import exchange, folders
from inflate.models.original_video_names import (
    FPS,
    VGEN,
    head_widths,
    hierarchy_of,
    layout_of,
    refuse_other_layers,
    refuse_what_originals_lack,
    with_fps,
)
from inflate.models.unet import MODELSCOPE, TemporalSpec, VideoUNet

log = logging.getLogger(__name__)

Diffusers = TypeVar("Diffusers", UNet3DConditionModel, I2VGenXLUNet)
REFINEMENT = [2, 1]
"""Rows and columns that the downsampling of VGen's and ModelScope's UNets for refinement pads by, which no tensor
tells."""
_PADDING = "downsample_padding"
DOUBLED = "_vgen_detail_doubled"
"""An entry of config.json, which diffusers keeps and does not read: the input convolution has VGen's doubling in it."""
_CONV_IN = "conv_in.weight"
_BOTH = (
    "sample_size", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups", "cross_attention_dim"
)  # fmt: skip
"""Settings of both of diffusers' classes that ours has under the same names."""
_ONE: dict[str, Any] = {
    _PADDING: 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "time_cond_proj_dim": None,
}
"""Settings of UNet3DConditionModel alone, and what is built in for them in I2VGenXLUNet."""


def load_diffusers(folder: Path, read: exchange.Read = exchange.read_tensors, double_detail: bool = False) -> VideoUNet:
    """The UNet in the folder of a UNet3DConditionModel or an I2VGenXLUNet, as `from_diffusers` gives it.

    The log warns of the latter where it may have half of its detail and this is not doubled. CheckpointError where it
    is to be doubled and is known to be whole.
    """
    kind = folders.unet_kind(folder, UNet3DConditionModel, I2VGenXLUNet)
    config = our_config(exchange.with_defaults(kind, folder), kind is I2VGenXLUNet)
    _check_detail(folder, double_detail)
    return from_diffusers(exchange.read_weights(folder, read), *config, str(folder), double_detail)


def _check_detail(folder: Path, double_detail: bool) -> None:
    halved = is_halved(folder)
    if double_detail and not halved:
        raise CheckpointError(
            f"{folder} is no I2VGenXLUNet with half of its detail: its config.json names another class, or tells by "
            f"{DOUBLED} that it has all of it; do not double it"
        )
    if halved and not double_detail:
        log.warning(
            "%s: weights of an I2VGenXLUNet that were converted from VGen's by their names alone give the first "
            "frame's detail half of its strength, and these do not tell that they were not; they are read as they are, "
            "and --double-detail mends it", folder,
        )  # fmt: skip


def from_diffusers(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    spec: TemporalSpec,
    origin: str,
    double_detail: bool = False,
) -> VideoUNet:
    """The UNet, of our configuration, of the tensors of one of diffusers' classes.

    `double_detail` mends an I2VGenXLUNet that has its detail features at half strength. CheckpointError, listing the
    tensors, where they do not fit.
    """
    unet = exchange.build_unet(config, spec)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(modelscope_keys.unet_to_diffusers(wanted))
    fitted = exchange.convert(modelscope_keys.fused(tensors), names, wanted, origin)
    exchange.adopt(unet, _detail_times(2.0, fitted, unet.hierarchy) if double_detail else fitted)
    return unet


def is_halved(folder: Path) -> bool:
    """Whether the UNet in a folder is an I2VGenXLUNet that does not tell that VGen's doubling is in its weights: as far
    as is known it then lacks it."""
    config = folders.read_json(folder / "config.json")
    return config.get("_class_name") == I2VGenXLUNet.__name__ and not config.get(DOUBLED)


def to_diffusers(unet: VideoUNet) -> UNet3DConditionModel:
    """The same model as diffusers' class, which shares its memory; CheckpointError where that cannot represent it."""
    refuse_what_diffusers_lacks(unet)
    config = {key: unet.config[key] for key in (*_ONE, "in_channels")}
    with torch.device("meta"):
        target = UNet3DConditionModel(**_their_config(unet), **config)
    return _filled(target, unet)


def to_i2vgen(unet: VideoUNet) -> I2VGenXLUNet:
    """The same as diffusers' class of I2VGen-XL, whose configuration tells that it has VGen's doubling (`DOUBLED`)."""
    refuse_what_i2vgen_lacks(unet)
    with torch.device("meta"):
        target = I2VGenXLUNet(**_their_config(unet), in_channels=unet.config.out_channels)
    target.register_to_config(**{DOUBLED: True})
    return _filled(target, unet)


def _their_config(unet: VideoUNet) -> dict[str, Any]:
    """What both of diffusers' classes are told."""
    config = {key: unet.config[key] for key in _BOTH}
    for side in ("down_block_types", "up_block_types"):
        config[side] = tuple(name.replace("2D", "3D") for name in unet.config[side])
    return {**config, "attention_head_dim": head_widths(unet).pop()}


def _filled(target: Diffusers, unet: VideoUNet) -> Diffusers:
    """A model of diffusers' without memory, with the tensors of ours."""
    tensors = exchange.detached(unet)
    names = modelscope_keys.unet_to_diffusers(tensors)
    named = modelscope_keys.apart({names[key]: tensor for key, tensor in tensors.items()})
    exchange.adopt(target, exchange.convert(named, {key: key for key in named}, exchange.shapes(target), "this UNet"))
    return target


def _refuse_other_kind(unet: VideoUNet, target: str) -> None:
    """CheckpointError where a model's temporal layers are of another kind than ModelScope's."""
    if not unet.spec.conv:
        kind = "AnimateDiff's" if unet.spec.motion else "Video LDM's" if unet.spec.block else "others"
        raise CheckpointError(
            f"{target} is for models whose temporal layers are ModelScope's, and this one's are {kind}: keep its "
            "folder, which sampling and training read; an I2VGen-XL whose training begins with an image model has "
            "ModelScope's (recipes/i2vgen_xl_base.yaml)"
        )


def refuse_what_diffusers_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where UNet3DConditionModel cannot represent a model."""
    slots = replace(MODELSCOPE, cross_attention_resnet_eps=unet.config.norm_eps)
    target = "diffusers' UNet3DConditionModel"
    _refuse_other_kind(unet, target)
    if unet.hierarchy is not None:
        raise CheckpointError(f"{target} has no place for: what encodes first frames; unet-i2vgen may have one")
    refuse_other_layers(unet, slots, target, {"class_embed_type": None})
    if unet.config[_PADDING] == REFINEMENT:
        # Its convolutions could pad so, but its upsampling would stretch what ours cuts.
        raise CheckpointError(
            f"{target} has no place for: unet {_PADDING} {REFINEMENT}, whose spare rows it "
            "does not take off again; VGen's format (vgen) has one"
        )


def refuse_what_i2vgen_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where I2VGenXLUNet cannot represent a model."""
    hierarchy, target = unet.hierarchy, "diffusers' I2VGenXLUNet"
    _refuse_other_kind(unet, target)
    if hierarchy is None:
        raise CheckpointError(f"{target} is told first frames, and this UNet is not; unet3d may have a place for it")
    channels, width = unet.config.out_channels, unet.config.cross_attention_dim
    published = Hierarchy(channels, width, clip_tokens=channels, dropout=hierarchy.dropout)
    told = {"class_embed_type": "projection", "in_channels": 2 * channels}
    refuse_other_layers(unet, with_fps(unet.config.block_out_channels[0]), target, {**_ONE, **told})
    own, wanted = hierarchy.to_dict(), published.to_dict()
    wrong = [f"hierarchy {name} {own[name]}" for name in own if own[name] != wanted[name]]
    if wrong:
        raise CheckpointError(f"{target} has no place for: {'; '.join(wrong)}")


def refuse_what_vgen_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where VGen's UNets cannot represent a model."""
    _refuse_other_kind(unet, "VGen's file")
    refines = unet.hierarchy is None and unet.config[_PADDING] == REFINEMENT
    refuse_what_originals_lack(unet, VGEN.code, REFINEMENT if refines else 1)
    if unet.image_context is not None:
        raise CheckpointError("VGen has no place for: an image context")


def load_vgen(file: Path, read: exchange.Read = exchange.read_tensors, refinement: bool = False) -> VideoUNet:
    """The UNet in a file under VGen's names, as `from_vgen` gives it, or of refinement where a file of ours says so.

    CheckpointError where refinement is asked for and it says that it is not.
    """
    told = exchange.told_by(file).get(_PADDING)
    if refinement and told not in (None, REFINEMENT):
        raise CheckpointError(
            f"{file} tells that it is text-to-video ({_PADDING} {told}): it is no model of refinement"
        )
    return from_vgen(read(file), str(file), refinement or told == REFINEMENT)


def tells_padding(file: Path, unet: VideoUNet) -> bool:
    """Whether a file in VGen's names, of that UNet, tells of itself that it is text-to-video, or that it is refinement.

    Others look the same; only text-to-video and models that are told first frames are told the frame rate.
    """
    return _PADDING in exchange.told_by(file) or unet.hierarchy is not None or unet.spec.added_ids > 0


def save_vgen(unet: VideoUNet, file: Path, told: Mapping[str, Any] | None = None) -> None:
    """Writes a .safetensors file under VGen's names, whose header tells the padding, which no tensor does, and more.

    CheckpointError where they have no place for a layer.
    """
    exchange.save_file_telling(to_vgen(unet), file, {**(told or {}), _PADDING: unet.config[_PADDING]})


def from_vgen(tensors: Mapping[str, Tensor], origin: str, refinement: bool = False) -> VideoUNet:
    """The UNet of VGen's tensors: text-to-video, image-to-video by one encoder of first frames or more, or refinement.

    The tensors of `refinement` are those of text-to-video, from which it differs in its padding. CheckpointError,
    listing the tensors, where one is missing or left over.
    """
    config = VGEN.config(tensors)
    hierarchy = hierarchy_of(tensors, config["cross_attention_dim"])
    told = {} if hierarchy is None else {"hierarchy": hierarchy.to_dict()}
    padded = {_PADDING: REFINEMENT} if refinement else {}
    slots = with_fps(config["block_out_channels"][0]) if FPS in tensors else MODELSCOPE
    unet = exchange.build_unet({**config, **told, **padded}, slots)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(VGEN.names(wanted, layout_of(config)))
    exchange.adopt(unet, _detail_times(2.0, exchange.convert(tensors, names, wanted, origin), hierarchy))
    return unet


def to_vgen(unet: VideoUNet) -> dict[str, Tensor]:
    """The tensors under VGen's names, which share the model's memory but for those of the detail features.

    CheckpointError where it has other layers.
    """
    refuse_what_vgen_lacks(unet)
    names = VGEN.names(unet.state_dict(), layout_of(unet.config))
    shapes = VGEN.shapes(exchange.shapes(unet), names)
    tensors = _detail_times(0.5, exchange.detached(unet), unet.hierarchy)
    return exchange.convert(tensors, names, shapes, "this UNet")


def _detail_times(factor: float, tensors: dict[str, Tensor], hierarchy: Hierarchy | None) -> dict[str, Tensor]:
    """Our tensors with the input convolution's weights for the detail features multiplied, where there are any."""
    if hierarchy is None or not hierarchy.detail_encoder:
        return tensors
    weight, own = tensors[_CONV_IN], -hierarchy.channels
    return {**tensors, _CONV_IN: torch.cat([weight[:, :own], factor * weight[:, own:]], dim=1)}


def our_config(config: Mapping[str, Any], first_frame: bool) -> tuple[dict[str, Any], TemporalSpec]:
    """Our configuration and temporal specification of one of diffusers' classes, I2VGenXLUNet's with a first frame."""
    width = config["attention_head_dim"]
    if not isinstance(width, int):
        raise CheckpointError(f"attention_head_dim is {width}: the heads of diffusers' video UNets have one width")
    settings = {key: config[key] for key in _BOTH}
    settings |= {key: config.get(key, built_in) for key, built_in in _ONE.items()}
    for side in ("down_block_types", "up_block_types"):
        settings[side] = tuple(name.replace("3D", "2D") for name in config[side])
    settings["attention_head_dim"] = tuple(channels // width for channels in config["block_out_channels"])
    settings |= {"in_channels": config["in_channels"], "use_linear_projection": True}
    if not first_frame:
        return settings, replace(MODELSCOPE, cross_attention_resnet_eps=config["norm_eps"])
    channels = config["in_channels"]
    hierarchy = Hierarchy(channels, config["cross_attention_dim"], clip_tokens=channels)
    told = {"in_channels": 2 * channels, "hierarchy": hierarchy.to_dict()}
    return {**settings, **told}, with_fps(config["block_out_channels"][0])
