"""AnimateDiff: motion modules for a Stable Diffusion UNet, loaded from and written to their published formats.

diffusers averages the group norm of a motion module over the clip, where AnimateDiff was trained with one per frame.
Each format stands for the norm that its own code computes: a model of the other norm is refused, and a file of
diffusers that was converted from AnimateDiff's is loaded as trained by `norm_over="frame"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel
from safetensors.torch import save_file
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import animatediff_keys
from inflate.files import new_file, new_folder
from inflate.layers.branches import NormOver
from inflate.models import exchange, folders
from inflate.models.unet import ANIMATEDIFF_V2, TemporalSpec, VideoUNet
from inflate.surgery import inflate_unet

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
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "use_linear_projection",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
)
_BUILT_IN: dict[str, Any] = {**exchange.BUILT_IN, "class_embed_type": None, "upcast_attention": False}
_ADDITIONS = (None, "text_time")
ORIGINAL_PREFIX = "module."
"""What some original files put before every key."""


def load_diffusers(
    folder: Path, norm_over: NormOver = "clip", read: exchange.Read = exchange.read_tensors
) -> VideoUNet:
    """A VideoUNet from UNetMotionModel's folder; CheckpointError, listing the tensors, where they do not fit."""
    kind = folders.unet_kind(folder, UNetMotionModel)
    unet = exchange.build_unet(*_image_config(exchange.with_defaults(kind, folder), norm_over))
    wanted = exchange.shapes(unet)
    names = exchange.inverse(animatediff_keys.to_diffusers(wanted))
    exchange.adopt(unet, exchange.convert(exchange.read_weights(folder, read), names, wanted, str(folder)))
    return unet


def to_diffusers(unet: VideoUNet) -> UNetMotionModel:
    """The same model as diffusers' class, which shares its memory; CheckpointError where that cannot represent it."""
    refuse_what_diffusers_lacks(unet)
    config = {key: unet.config[key] for key in _SHARED_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        config[side] = tuple(name.replace("2D", "Motion") for name in unet.config[side])
    spec = unet.spec
    with torch.device("meta"):
        target = UNetMotionModel(
            **config,
            num_attention_heads=unet.config.num_attention_heads or unet.config.attention_head_dim,
            motion_max_seq_length=spec.motion_frames,
            motion_num_attention_heads=spec.motion_heads,
            use_motion_mid_block=spec.motion_middle,
        )
    tensors = exchange.detached(unet)
    names = animatediff_keys.to_diffusers(tensors)
    exchange.adopt(target, exchange.convert(tensors, names, exchange.shapes(target), "this UNet"))
    return target


def refuse_what_diffusers_lacks(unet: VideoUNet) -> None:
    """CheckpointError, naming the settings, where UNetMotionModel cannot represent a model."""
    wrong = _misplaced(unet, "clip")
    built_in = {name: value for name, value in _BUILT_IN.items() if name not in _SHARED_SETTINGS}
    wrong += exchange.differing(unet, built_in)
    if unet.config.addition_embed_type not in _ADDITIONS:
        wrong.append(f"unet addition_embed_type {unet.config.addition_embed_type}")
    if unet.spec.cross_attention_resnet_eps != unet.config.norm_eps:
        wrong.append(f"temporal cross_attention_resnet_eps {unet.spec.cross_attention_resnet_eps}")
    if wrong:
        raise CheckpointError(f"diffusers' UNetMotionModel has no place for: {'; '.join(wrong)}")


def load_adapter(unet: UNet2DConditionModel, folder: Path, norm_over: NormOver = "clip") -> VideoUNet:
    """A VideoUNet of an image UNet and the motion modules in a MotionAdapter's folder; `unet` is left as it was.

    CheckpointError, listing the tensors, where they do not fit the UNet.
    """
    kind = folders.unet_kind(folder, MotionAdapter)
    config = exchange.with_defaults(kind, folder)
    _refuse_another_parent(config, unet)
    spec = adapter_spec(config, unet.config.norm_eps, norm_over)
    return _with_modules(unet, spec, exchange.read_weights(folder), animatediff_keys.to_diffusers, str(folder))


def save_adapter(unet: VideoUNet, folder: Path) -> None:
    """Writes the motion modules alone as diffusers' MotionAdapter; CheckpointError where that cannot represent them."""
    wrong = _misplaced(unet, "clip")
    if wrong:
        raise CheckpointError(f"diffusers' MotionAdapter has no place for: {'; '.join(wrong)}")
    spec = unet.spec
    with torch.device("meta"):
        adapter = MotionAdapter(
            block_out_channels=tuple(unet.config.block_out_channels),
            motion_layers_per_block=unet.config.layers_per_block,
            motion_num_attention_heads=spec.motion_heads,
            motion_norm_num_groups=unet.config.norm_num_groups,
            motion_max_seq_length=spec.motion_frames,
            use_motion_mid_block=spec.motion_middle,
        )
    modules = motion_modules(unet)
    names = animatediff_keys.to_diffusers(modules)
    exchange.adopt(adapter, exchange.convert(modules, names, exchange.shapes(adapter), "this UNet"))
    if folder.is_dir() and any(folder.iterdir()):
        folders.unet_kind(folder, MotionAdapter)  # only an earlier adapter is written over
    with new_folder(folder) as aside:
        adapter.save_pretrained(aside)


def load_original(unet: UNet2DConditionModel, file: Path) -> VideoUNet:
    """A VideoUNet of an image UNet and the motion modules in one of AnimateDiff's own files, with norms per frame.

    CheckpointError, listing the tensors, where they do not fit the UNet; the file does not say how many heads there
    are, which are always 8.
    """
    read = exchange.read_tensors(file)
    tensors = {key.removeprefix(ORIGINAL_PREFIX): tensor for key, tensor in read.items()}
    spec = original_spec(tensors, file)
    single = animatediff_keys.without_second_tables(tensors, str(file))
    return _with_modules(unet, spec, single, animatediff_keys.to_original, str(file))


def original_spec(tensors: Mapping[str, Tensor], file: Path) -> TemporalSpec:
    """The temporal specification of the tensors of one of AnimateDiff's own files; CheckpointError for another file."""
    tables = [tensor for key, tensor in tensors.items() if key.endswith(".pos_encoder.pe")]
    if not tables:
        raise CheckpointError(f"{file} holds no motion modules of AnimateDiff: no key ends in .pos_encoder.pe")
    middle = any(key.removeprefix(ORIGINAL_PREFIX).startswith("mid_block.") for key in tensors)
    return replace(ANIMATEDIFF_V2, motion_middle=middle, motion_frames=tables[0].shape[1])


def save_original(unet: VideoUNet, file: Path) -> None:
    """Writes the motion modules alone under AnimateDiff's names; CheckpointError where it cannot represent them."""
    wrong = _misplaced(unet, "frame")
    if unet.spec.motion_heads != ANIMATEDIFF_V2.motion_heads:
        wrong.append(f"temporal motion_heads {unet.spec.motion_heads}")
    if wrong:
        raise CheckpointError(f"AnimateDiff's files have no place for: {'; '.join(wrong)}")
    modules = motion_modules(unet)
    named = {name: modules[key] for key, name in animatediff_keys.to_original(modules).items()}
    with new_file(file) as aside:
        save_file({key: tensor.clone() for key, tensor in animatediff_keys.with_second_tables(named).items()}, aside)


def motion_modules(unet: VideoUNet) -> dict[str, Tensor]:
    """The tensors of the motion modules of a UNet, by our keys."""
    return {key: tensor for key, tensor in exchange.detached(unet).items() if ".temporal." in key}


def _with_modules(
    unet: UNet2DConditionModel, spec: TemporalSpec, tensors: Mapping[str, Tensor], names: Any, origin: str
) -> VideoUNet:
    """The inflated UNet with those motion modules, in its own precision, whose map of names is `names`."""
    video, _ = inflate_unet(unet, spec)
    modules = motion_modules(video)
    wanted = {key: tensor.shape for key, tensor in modules.items()}
    converted = exchange.convert(tensors, exchange.inverse(names(wanted)), wanted, origin)
    for key, tensor in converted.items():
        modules[key].copy_(tensor)
    return video


def _misplaced(unet: VideoUNet, norm_over: NormOver) -> list[str]:
    """The settings of a model's temporal layers that are not those of motion modules with that norm."""
    spec = unet.spec
    free = ("motion_middle", "motion_heads", "motion_frames", "cross_attention_resnet_eps")
    slots = replace(ANIMATEDIFF_V2, motion_norm=norm_over, **{name: getattr(spec, name) for name in free})
    return exchange.differing_spec(spec, slots)


def _image_config(config: Mapping[str, Any], norm_over: NormOver) -> tuple[dict[str, Any], TemporalSpec]:
    """The 2D configuration and the temporal specification of a UNetMotionModel's configuration."""
    depths = (config["temporal_transformer_layers_per_block"], config["temporal_transformer_layers_per_mid_block"])
    _refuse_depths(*depths, config["reverse_temporal_transformer_layers_per_block"] or 1)
    if config["mid_block_layers"] != 1:
        raise CheckpointError(f"mid_block_layers is {config['mid_block_layers']}: a 2D UNet has one")
    if config["reverse_motion_num_attention_heads"] is not None:
        raise CheckpointError(
            "reverse_motion_num_attention_heads is set: motion modules have the same heads throughout"
        )
    flat = {key: config[key] for key in _SHARED_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        flat[side] = tuple(name.replace("Motion", "2D") for name in config[side])
    spec = replace(
        ANIMATEDIFF_V2,
        motion_norm=norm_over,
        motion_middle=config["use_motion_mid_block"],
        motion_heads=_one(config["motion_num_attention_heads"], "motion_num_attention_heads"),
        motion_frames=config["motion_max_seq_length"],
        cross_attention_resnet_eps=config["norm_eps"],
    )
    return {**flat, "attention_head_dim": config["num_attention_heads"]}, spec


def adapter_spec(config: Mapping[str, Any], eps: float = 1e-5, norm_over: NormOver = "clip") -> TemporalSpec:
    """The temporal specification of a MotionAdapter's configuration over a UNet of that group-norm epsilon.

    CheckpointError where motion modules have no such layers.
    """
    depth = (config["motion_transformer_layers_per_block"], config["motion_transformer_layers_per_mid_block"])
    _refuse_depths(*depth, config["motion_mid_block_layers_per_block"])
    if config["conv_in_channels"] is not None:
        raise CheckpointError("this adapter brings an input convolution of its own (PIA), which has no place here")
    return replace(
        ANIMATEDIFF_V2,
        motion_norm=norm_over,
        motion_middle=config["use_motion_mid_block"],
        motion_heads=_one(config["motion_num_attention_heads"], "motion_num_attention_heads"),
        motion_frames=config["motion_max_seq_length"],
        cross_attention_resnet_eps=eps,
    )


def _refuse_another_parent(config: Mapping[str, Any], unet: UNet2DConditionModel) -> None:
    """CheckpointError where a MotionAdapter's configuration is for another UNet."""
    pairs = {"block_out_channels": "block_out_channels", "motion_norm_num_groups": "norm_num_groups"}
    wrong = [
        f"{theirs} {config[theirs]} instead of {unet.config[ours]}"
        for theirs, ours in pairs.items()
        if _listed(config[theirs]) != _listed(unet.config[ours])
    ]
    if wrong:
        raise CheckpointError(f"this adapter is for another UNet: {'; '.join(wrong)}")


def _refuse_depths(*depths: Any) -> None:
    found = {number for depth in depths for number in _flattened(depth)}
    if found != {1}:
        raise CheckpointError(f"motion modules of {sorted(found)} blocks: only those of one block have a place here")


def _one(value: Any, name: str) -> int:
    """The value that all levels have; CheckpointError where they differ."""
    values = set(_flattened(value))
    if len(values) != 1:
        raise CheckpointError(f"{name} is {value}: motion modules have the same heads throughout")
    return int(values.pop())


def _flattened(value: Any) -> list[Any]:
    return [inner for item in value for inner in _flattened(item)] if isinstance(value, list | tuple) else [value]


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
