"""Sampling clips from prompts: DDIM or Euler steps on the image model's noise schedule, with guidance.

The networks take turns on the device: each is there while it works, unless it is there already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.families.video_ldm import Sampler, VideoLDM
from inflate.layers.recompute import in_parts
from inflate.models.visits import visiting
from inflate.objectives import Predict
from inflate.sampling.ddim import DDIM
from inflate.sampling.steps import (
    PARTS,
    TOGETHER,
    Progress,
    at_least_one,
    decode,
    guided,
    in_precision,
    integrate,
    is_large,
)
from inflate.surgery import evaluating


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn from prompts."""

    steps: int = 50
    """denoising steps"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    negative: str = ""
    """prompt that guidance leads away from; the empty one is the model's null condition"""
    sampler: Sampler = "ddim"
    """ddim, or euler"""
    frames: int | None = None
    """length of the clip; none: the length of training"""
    height: int | None = None
    """pixels; none: the height of training"""
    width: int | None = None
    """pixels; none: the width of training"""
    batch: int | None = None
    """clips drawn together; none: as many as have the pixels of 16 frames of 512x512"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, frames=self.frames, batch=self.batch)


def sample(
    family: VideoLDM,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling | None = None,
    progress: Progress | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draws a clip of each prompt and seed: (B, F, 3, H, W), about in [-1, 1].

    A clip depends on its own seed alone, not on those beside it. The networks visit the device one after the other;
    none: where the UNet is. ConfigError where the size does not fit the VAE.
    """
    settings = settings or Sampling()
    noise = initial_noise(family, seeds, settings).to(device or family.device)
    batch = settings.batch or max(1, TOGETHER // (noise[0, :, 0].numel() * family.factor**2))
    texts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    parts = zip(texts, noise.split(batch), strict=True)
    latents = torch.cat([sample_latents(family, *part, settings, progress) for part in parts])
    return decode(family, latents, is_large(noise[:1], family.factor, settings.little_memory))  # a clip at a time


def initial_noise(family: VideoLDM, seeds: Sequence[int], settings: Sampling) -> Tensor:
    """Standard normal latents (B, F, C, h, w) on the CPU, each clip's of its own seed; float32 at least."""
    height, width = settings.height or family.size[0], settings.width or family.size[1]
    if height % family.factor or width % family.factor:
        raise ConfigError(f"height {height} and width {width} must be multiples of {family.factor}")
    latent = (height // family.factor, width // family.factor)
    shape = (settings.frames or family.clips.frames, family.vae.config.latent_channels, *latent)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(torch.promote_types(family.unet.dtype, torch.float32))  # (B, F, C, h, w)


@torch.no_grad()
def sample_latents(
    family: VideoLDM,
    prompts: Sequence[str],
    noise: Tensor,
    settings: Sampling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents (B, F, C, h, w) of prompts, from standard normal latents of that shape."""
    settings = settings or Sampling()
    large = is_large(noise, family.factor, settings.little_memory)
    texts = [list(prompts)]
    scales = [settings.guidance] if settings.guidance > 1.0 else []
    if scales:
        negatives = [settings.negative] * len(prompts)
        texts = [negatives, list(prompts)] if large else [[*negatives, *prompts]]
    with visiting(family.text.networks, noise.device), evaluating(*family.text.networks):
        conditions = [family.embed(each) for each in texts]
    predict = guided([in_precision(family.predict(each), family.unet.dtype) for each in conditions], scales)
    with visiting([family.unet], noise.device), evaluating(family.unet), in_parts(family.unet, PARTS if large else 0):
        return _drawn(family, predict, noise, settings, progress)


def _drawn(family: VideoLDM, predict: Predict, noise: Tensor, settings: Sampling, progress: Progress | None) -> Tensor:
    """Clean latents; ConfigError where the sampler does not know how the model's are rescaled."""
    if family.base_scale == 1.0:
        scheduler = family.scheduler(settings.sampler)
        scheduler.set_timesteps(settings.steps, device=noise.device)
        return integrate(predict, noise, scheduler, progress)
    if settings.sampler != "ddim":
        raise ConfigError(f"sampler is {settings.sampler}, but ddim alone knows this model's rescaled latents: take it")
    return DDIM(family.objective, settings.steps, eta=0.0).draw(predict, noise, iter(()), progress)
