"""Tiny Stable Diffusions with the pocket model's text encoder, to be made text-to-video models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from helpers import tiny_unet, tiny_unet_sdxl, tiny_vae
from inflate.families.video_ldm import VideoLDM
from inflate.models.folders import SHIPPED
from inflate.training.encoding import TextClipEncoder

WIDTH, SIDE = 64, 16
"""Of the pocket model's text encoder; of the clips, in pixels."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT = "a red disc over blue"
FRAMES = 3


def write_text_model(
    folder: Path, linear: bool = True, scheduler: type[SchedulerMixin] = DDIMScheduler, **settings: Any
) -> Path:
    """A folder in diffusers' layout; `settings` are the scheduler's."""
    parts = {"unet": unet(linear), "vae": tiny_vae(), "scheduler": scheduler(**BETAS | settings)}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(SHIPPED["pocket"] / name, folder / name)
    return folder


def write_sdxl(folder: Path, **settings: Any) -> Path:
    """A tiny Stable Diffusion XL as diffusers writes it; `settings` are the pipeline's."""
    tokenizers = [CLIPTokenizer.from_pretrained(SHIPPED["pocket"] / "tokenizer") for _ in range(2)]
    tokenizers[1].add_special_tokens({"pad_token": tokenizers[1].convert_ids_to_tokens(0)})
    parts = {
        "unet": tiny_unet_sdxl(cross_attention_dim=WIDTH + 32), "vae": tiny_vae(scaling_factor=0.13025),
        "scheduler": EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        "text_encoder": CLIPTextModel.from_pretrained(SHIPPED["pocket"] / "text_encoder", dtype=torch.float32),
        "text_encoder_2": second_encoder(), "tokenizer": tokenizers[0], "tokenizer_2": tokenizers[1],
    }  # fmt: skip
    StableDiffusionXLPipeline(**parts, add_watermarker=False, **settings).save_pretrained(folder)
    return folder


def second_encoder() -> CLIPTextModelWithProjection:
    """A text encoder of two layers with the pocket's vocabulary."""
    torch.manual_seed(4)
    config = CLIPTextConfig(
        vocab_size=164, max_position_embeddings=20, bos_token_id=162, eos_token_id=163, pad_token_id=0, hidden_size=32,
        intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu", projection_dim=16,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def unet(linear: bool) -> UNet2DConditionModel:
    return tiny_unet(linear, cross_attention_dim=WIDTH)


def parents(folder: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """The image model's UNet and VAE."""
    return UNet2DConditionModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vae")


def clip(number: int, frames: int = FRAMES) -> dict[str, Any]:
    """A batch of one clip."""
    generator = torch.Generator().manual_seed(number)
    return {
        "pixels": torch.rand(1, frames, 3, SIDE, SIDE, generator=generator) * 2 - 1, "caption": [PROMPT],
        "fps": torch.tensor([8.0]), "number": torch.tensor([number]),
    }  # fmt: skip


class CachedClips:
    """Four clips as a cache gives them."""

    def __init__(self, family: VideoLDM) -> None:
        encoder = TextClipEncoder(family, "float32")
        text = {name: rows[0] for name, rows in encoder.captions([PROMPT]).items()}
        self.items = [
            {"latents": encoder.latents(clip(n)["pixels"][0]), **text, "number": torch.tensor(n)} for n in range(4)
        ]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.items[number % 4], "number": torch.tensor(number)}
