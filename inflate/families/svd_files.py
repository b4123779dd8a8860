"""Reading and writing the folders and files that hold Stable Video Diffusion.

Everything is read and checked before a model exists: models are built without memory and take the tensors over.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import svd_keys
from inflate.models import exchange, folders, original_names
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE

DIFFUSERS_EPS = 1e-6
HEAD_CHANNELS = 64
"""Width of a head of the published models, which their single files do not tell."""
SAMPLE_SIZE = 96
"""Latents of the published models on each side of a square of their clips' area, by diffusers' configuration."""
IMAGE_SIZE = 224
"""Pixels of an image on each side that the published models' image encoder is given."""
# What diffusers' classes have built in: a model that differs cannot be told to them.
UNET_FIXED: dict[str, Any] = {
    **exchange.BUILT_IN,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "act_fn": "silu",
    "class_embed_type": "projection",
}
_VAE_FIXED: dict[str, Any] = {
    "norm_num_groups": 32,
    "act_fn": "silu",
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


def is_image_model(folder: Path) -> bool:
    """Whether a folder in diffusers' layout holds a 2D UNet, which is to be inflated, and not a video UNet.

    CheckpointError where it holds another class's UNet.
    """
    return (
        folders.unet_kind(folder / "unet", UNet2DConditionModel, UNetSpatioTemporalConditionModel)
        is UNet2DConditionModel
    )


def build_vae(config: Mapping[str, Any]) -> VideoVAE:
    """A VideoVAE without memory (on the meta device) from an AutoencoderKL configuration."""
    with torch.device("meta"):
        return VideoVAE.from_2d(AutoencoderKL.from_config(dict(config)))


def image_unet_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], TemporalSpec]:
    """The 2D configuration and the temporal specification of a UNetSpatioTemporalConditionModel's configuration."""
    spec = TemporalSpec(
        added_ids=config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"],
        added_id_dim=config["addition_time_embed_dim"],
        cross_attention_resnet_eps=DIFFUSERS_EPS,
    )
    flat = {key: config[key] for key in _SHARED_UNET_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        flat[side] = tuple(name.replace("SpatioTemporal", "2D") for name in config[side])
    return {**flat, "attention_head_dim": config["num_attention_heads"], "use_linear_projection": True}, spec


_SHARED_UNET_SETTINGS = (
    "sample_size",
    "in_channels",
    "out_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "transformer_layers_per_block",
)
_SHARED_VAE_SETTINGS = (
    "in_channels",
    "out_channels",
    "block_out_channels",
    "down_block_types",
    "latent_channels",
    "sample_size",
    "scaling_factor",
    "force_upcast",
    "layers_per_block",
)


def image_vae_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The AutoencoderKL configuration of an AutoencoderKLTemporalDecoder's, which has no post-quant convolution."""
    flat = {key: config[key] for key in _SHARED_VAE_SETTINGS}
    up = ("UpDecoderBlock2D",) * len(config["block_out_channels"])
    return {**flat, "up_block_types": up, "use_quant_conv": True, "use_post_quant_conv": False}


def refuse_what_diffusers_lacks(unet: VideoUNet, vae: VideoVAE, image_size: int) -> None:
    """CheckpointError, naming the settings, where diffusers' classes cannot hold these models."""
    spec = unet.spec
    wrong = exchange.differing(unet, UNET_FIXED)
    wrong += differing_vae(vae)
    if spec.input or not (spec.resnet and spec.block and spec.added_ids == 3):
        wrong.append(f"temporal specification {spec}")
    if image_size != IMAGE_SIZE:
        wrong.append(f"image encoder of {image_size} pixels, where the pipeline always gives {IMAGE_SIZE}")
    if wrong:
        raise CheckpointError(f"diffusers' StableVideoDiffusionPipeline has no place for: {'; '.join(wrong)}")


def differing_vae(vae: VideoVAE) -> list[str]:
    """The settings of an autoencoder that are not as the published models have them built in, with their values."""
    return [f"vae {name} {vae.config[name]}" for name, value in _VAE_FIXED.items() if vae.config.get(name) != value]


def diffusers_unet(unet: VideoUNet, frames: int) -> UNetSpatioTemporalConditionModel:
    """The same model as diffusers' class, which shares its memory."""
    config = {key: unet.config[key] for key in _SHARED_UNET_SETTINGS}
    for side in ("down_block_types", "up_block_types"):
        config[side] = tuple(name.replace("2D", "SpatioTemporal") for name in unet.config[side])
    with torch.device("meta"):
        target = UNetSpatioTemporalConditionModel(
            **config,
            addition_time_embed_dim=unet.spec.added_id_dim,
            projection_class_embeddings_input_dim=unet.config.projection_class_embeddings_input_dim,
            num_attention_heads=unet.config.attention_head_dim,
            num_frames=frames,
        )
    tensors = exchange.detached(unet)
    exchange.adopt(
        target, exchange.convert(tensors, svd_keys.unet_to_diffusers(tensors), exchange.shapes(target), "this UNet")
    )
    return target


def diffusers_vae(vae: VideoVAE) -> AutoencoderKLTemporalDecoder:
    """The same autoencoder as diffusers' class; a post-quant convolution is folded, exact but for the zero padding."""
    with torch.device("meta"):
        target = AutoencoderKLTemporalDecoder(**{key: vae.config[key] for key in _SHARED_VAE_SETTINGS})
    tensors = exchange.detached(vae)
    weight, bias = tensors.pop("post_quant_conv.weight", None), tensors.pop("post_quant_conv.bias", None)
    if weight is not None and bias is not None:
        tensors.update(_folded(tensors, weight, bias))
    if "quant_conv.weight" not in tensors:
        tensors.update(identity_quant_conv(tensors["encoder.conv_out.bias"]))
    exchange.adopt(
        target, exchange.convert(tensors, svd_keys.vae_to_diffusers(tensors), exchange.shapes(target), "this VAE")
    )
    return target


def exact_vae_tensors(vae: VideoVAE) -> dict[str, Tensor]:
    """The tensors that diffusers' class holds folded, to be kept beside the export; empty where it holds all."""
    keys = ("post_quant_conv.weight", "post_quant_conv.bias", "decoder.conv_in.weight", "decoder.conv_in.bias")
    tensors = exchange.detached(vae)
    return {key: tensors[key].clone() for key in keys} if keys[0] in tensors else {}


def outline_unet(folder: Path, exact: Mapping[str, Any] | None) -> VideoUNet:
    """The same as `load_diffusers_unet` without memory; the folder's weights are not read."""
    if exact is None:
        kind = folders.unet_kind(folder, UNetSpatioTemporalConditionModel)
        config, spec = image_unet_config(exchange.with_defaults(kind, folder))
    elif isinstance(exact.get("temporal"), dict):
        config, spec = dict(exact), TemporalSpec.from_dict(exact["temporal"])
    else:
        raise CheckpointError(f"{folder.parent / 'inflate.json'} lacks unet.temporal; copy or export the model again")
    return exchange.build_unet(config, spec)


def load_diffusers_unet(
    folder: Path, exact: Mapping[str, Any] | None, read: exchange.Read = exchange.read_tensors
) -> VideoUNet:
    """A VideoUNet from UNetSpatioTemporalConditionModel's folder; `exact` is the configuration kept by our export."""
    unet = outline_unet(folder, exact)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(svd_keys.unet_to_diffusers(wanted))
    exchange.adopt(unet, exchange.convert(exchange.read_weights(folder, read), names, wanted, str(folder)))
    return unet


def outline_vae(folder: Path, exact: Mapping[str, Any] | None) -> VideoVAE:
    """The same as `load_diffusers_vae` without memory; the folder's weights are not read."""
    published = (
        image_vae_config(exchange.with_defaults(AutoencoderKLTemporalDecoder, folder)) if exact is None else exact
    )
    return build_vae(published)


def load_diffusers_vae(folder: Path, exact: Mapping[str, Any] | None, overrides: Mapping[str, Tensor]) -> VideoVAE:
    """A VideoVAE from AutoencoderKLTemporalDecoder's folder; `exact` and `overrides` are what our export kept."""
    vae = outline_vae(folder, exact)
    wanted = exchange.shapes(vae)
    names = exchange.inverse(svd_keys.vae_to_diffusers(wanted))
    tensors = exchange.read_weights(folder)
    if not vae.config.use_quant_conv:
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("quant_conv.")}
    back = svd_keys.vae_to_diffusers(overrides)
    tensors.update({back[key]: tensor for key, tensor in overrides.items()})
    exchange.adopt(vae, exchange.convert(tensors, names, wanted, str(folder)))
    return vae


def sgm_unet(tensors: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> VideoUNet:
    """A VideoUNet of a 2D configuration from the tensors of sgm's VideoUNet, without prefix."""
    ids = svd_keys.sgm_added_ids(tensors)
    unet = exchange.build_unet(config, TemporalSpec(added_ids=3, added_id_dim=ids // 3))
    wanted = exchange.shapes(unet)
    names = exchange.inverse(svd_keys.unet_to_sgm(wanted, original_names.UNetLayout.of(config)))
    exchange.adopt(unet, exchange.in_float32(exchange.convert(tensors, names, wanted, origin)))
    return unet


def sgm_vae(tensors: Mapping[str, Tensor], origin: str) -> VideoVAE:
    """A VideoVAE from the tensors of sgm's first stage, without prefix."""
    config = original_names.vae_config(tensors)
    vae = build_vae(config)
    wanted = exchange.shapes(vae)
    names = exchange.inverse(svd_keys.vae_to_sgm(wanted, len(config["block_out_channels"])))
    exchange.adopt(vae, exchange.in_float32(exchange.convert(tensors, names, wanted, origin)))
    return vae


def _folded(tensors: Mapping[str, Tensor], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """The first decoder convolution after a 1x1 convolution as one; at the border the bias meets zero padding."""
    kernel = tensors["decoder.conv_in.weight"]
    pointwise = weight.flatten(1)  # (C, C)
    return {
        "decoder.conv_in.weight": torch.einsum("omhw,mi->oihw", kernel, pointwise),
        "decoder.conv_in.bias": tensors["decoder.conv_in.bias"] + kernel.sum(dim=(2, 3)) @ bias,
    }


def identity_quant_conv(like: Tensor) -> dict[str, Tensor]:
    """A quant convolution that changes nothing, for an encoder whose last bias is like this one."""
    weight = torch.eye(len(like), dtype=like.dtype, device=like.device)[:, :, None, None]
    return {"quant_conv.weight": weight, "quant_conv.bias": torch.zeros_like(like)}
