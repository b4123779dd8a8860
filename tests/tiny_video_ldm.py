"""A tiny Stable Diffusion with the pocket model's text encoder, to be made a text-to-video model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDIMScheduler, SchedulerMixin, UNet2DConditionModel

from helpers import tiny_unet, tiny_vae
from inflate.models.folders import SHIPPED

WIDTH, SIDE = 64, 16
"""Of the pocket model's text encoder; of the clips, in pixels."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PROMPT = "a red disc over blue"


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


def unet(linear: bool) -> UNet2DConditionModel:
    return tiny_unet(linear, cross_attention_dim=WIDTH)


def parents(folder: Path) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """The image model's UNet and VAE."""
    return UNet2DConditionModel.from_pretrained(folder / "unet"), AutoencoderKL.from_pretrained(folder / "vae")
