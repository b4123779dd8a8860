"""Tiny models shaped like the published ones; every builder is seeded and runs in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.models import exchange
from inflate.sweep import load_script

load_recipe = load_script
"""A recipe's script as a module, loaded once."""


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of tensors that are read from now on, each time that they are."""
    files: list[Path] = []
    monkeypatch.setattr(exchange, "load_file", lambda file: files.append(file) or load_file(file))
    return files


CROSS = 32
"""Width of the text or image context of the tiny UNets."""

LATENT = 8
"""Height and width of the latents that the tiny UNets are tested with."""


def tiny_unet(linear: bool = False, seed: int = 0, **settings: Any) -> UNet2DConditionModel:
    """A two-level UNet: convolutional projections as in Stable Diffusion 1, linear ones (`linear=True`) as in 2."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "sample_size": LATENT,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": CROSS,
        "attention_head_dim": 2,
        "norm_num_groups": 16,
        "use_linear_projection": linear,
    }
    return UNet2DConditionModel(**{**defaults, **settings}).eval()


def tiny_unet_sd1(seed: int = 0, **settings: Any) -> UNet2DConditionModel:
    """Stable Diffusion 1: projections into the transformer are 1x1 convolutions."""
    return tiny_unet(False, seed, **settings)


def tiny_unet_sd2(seed: int = 0, **settings: Any) -> UNet2DConditionModel:
    """Stable Diffusion 2: projections into the transformer are linear layers."""
    return tiny_unet(True, seed, **settings)


def tiny_unet_sdxl(seed: int = 0, **settings: Any) -> UNet2DConditionModel:
    """Stable Diffusion XL: no attention at the first level, deep transformers, text and sizes as added conditions."""
    defaults: dict[str, Any] = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 3),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    return tiny_unet(True, seed, **{**defaults, **settings})


def tiny_vae(seed: int = 0, **settings: Any) -> AutoencoderKL:
    """A two-level autoencoder (an image side is twice its latent's) with the quantisation convolutions of SD."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**defaults, **settings}).eval()


def unet_inputs(
    batch: int = 2, frames: int = 3, channels: int = 4, tokens: int = 5, side: int = LATENT, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of a video UNet: sample (B,F,C,h,w), timestep (B,), encoder_hidden_states (B,L,D)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, frames, channels, side, side, generator=generator),
        "timestep": torch.rand(batch, generator=generator) * 900,
        "encoder_hidden_states": torch.randn(batch, tokens, CROSS, generator=generator),
    }


def randomise(module: torch.nn.Module, seed: int = 0, scale: float = 0.05) -> None:
    """Move every parameter by seeded noise, so that layers born at zero take part in a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=scale)


def write_image_model(folder: Path, linear: bool = True, quant: bool = False, **scheduler: object) -> Path:
    """A tiny Stable Diffusion folder that diffusers' SVD classes can hold: 32 norm groups, images at 224 pixels."""
    unet = tiny_unet(linear=linear, norm_num_groups=32, cross_attention_dim=CROSS, transformer_layers_per_block=(2, 1))
    vae = tiny_vae(
        block_out_channels=(32, 32),
        norm_num_groups=32,
        layers_per_block=2,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    torch.manual_seed(3)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=224,
            patch_size=112,
            projection_dim=CROSS,
        )
    )
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **scheduler}
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    parts = {"unet": unet, "vae": vae, "image_encoder": encoder, "scheduler": DDIMScheduler(**{**betas, **settings})}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder
