"""Tiny models in the files of the original implementations; heads are 64 channels wide, as in the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import CROSS, randomise, tiny_unet, tiny_vae, write_image_model
from inflate.families import svd_keys
from inflate.families.svd import SVD
from inflate.models.original_names import UNetLayout
from inflate.models.single_file_writing import image_tensors
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE
from inflate.surgery import inflate_unet, inflate_vae

LEVELS: dict[str, Any] = {
    "block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 2, "norm_num_groups": 32,
}  # fmt: skip
IDLE = {"conditioner.embedders.0.open_clip.model.logit_scale": torch.ones(())}
"""Some of what the original's file keeps and nothing uses."""
VAE: dict[str, Any] = {"block_out_channels": (32, 32), "norm_num_groups": 32}


def original_names(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors of an image model under latent diffusion's names."""
    return {key: tensor.clone() for key, tensor in image_tensors(unet, vae).items()}


def write_single_file(file: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Write a tiny Stable Diffusion 1 as communities share it; returns its networks."""
    unet, vae = tiny_unet(False, **LEVELS, attention_head_dim=8), tiny_vae(**VAE)
    save_file({**original_names(unet, vae), "cond_stage_model.transformer.x": torch.zeros(1)}, file)
    return unet, vae


def write_sgm(unet: VideoUNet, vae: VideoVAE, file: Path) -> None:
    """Write a Stable Video Diffusion under the original's names."""
    ours = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    layout = UNetLayout.of(unet.config)
    names = {
        "unet": {
            key: f"model.diffusion_model.{name}" for key, name in svd_keys.unet_to_sgm(ours["unet"], layout).items()
        },
        "vae": {key: f"first_stage_model.{name}" for key, name in svd_keys.vae_to_sgm(ours["vae"], 2).items()},
    }
    renamed = {names[part][key]: tensor.clone() for part in ours for key, tensor in ours[part].items()}
    save_file({**renamed, **IDLE}, file)


def write_svd_file(folder: Path) -> tuple[Path, Path, VideoUNet, VideoVAE]:
    """Write a tiny Stable Video Diffusion in the original's file and an image encoder; returns its networks, too."""
    parent = tiny_unet(True, **LEVELS, attention_head_dim=(1, 2))
    unet, _ = inflate_unet(parent, TemporalSpec(added_id_dim=8), in_channels=8)
    vae, _ = inflate_vae(tiny_vae(**VAE, layers_per_block=2, use_post_quant_conv=False))
    for network in (unet, vae):
        randomise(network)
    write_sgm(unet, vae, folder / "svd.safetensors")
    write_image_model(folder / "image")
    return folder / "svd.safetensors", folder / "image" / "image_encoder", unet, vae


def wide_encoder() -> CLIPVisionModelWithProjection:
    """An image encoder of one small layer, but as wide as the one that Stable Video Diffusion has."""
    settings = {"hidden_size": 1280, "intermediate_size": 16, "num_hidden_layers": 1, "projection_dim": CROSS}
    shape = {"image_size": 224, "patch_size": 28, "num_attention_heads": 16, "hidden_act": "gelu"}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**settings, **shape)).eval()
    randomise(encoder)
    return encoder


def published_like(**vae: Any) -> SVD:
    """A tiny Stable Video Diffusion that a file of the original can hold, with a quant convolution."""
    parent = tiny_unet(True, **LEVELS, attention_head_dim=(1, 2), cross_attention_dim=CROSS)
    unet, _ = inflate_unet(parent, TemporalSpec(added_id_dim=8), in_channels=8)
    quant = {"use_quant_conv": True, "use_post_quant_conv": False, **vae}
    video_vae, _ = inflate_vae(tiny_vae(**VAE, layers_per_block=2, **quant))
    for network in (unet, video_vae):
        randomise(network)
    return SVD(unet, video_vae, wide_encoder())


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether tensors have the same names and, to the bit, the same values."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
