"""Sampling clips from prompts: DDIM or Euler steps on the image model's noise schedule, with guidance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.families.video_ldm import Sampler, VideoLDM
from inflate.sampling.steps import Progress, integrate
from inflate.surgery import evaluating

TOGETHER = 16 * 512 * 512
"""Pixels of the clips that are drawn together where no other number of clips is asked for."""


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

    def __post_init__(self) -> None:
        given = {"steps": self.steps, "frames": self.frames, "batch": self.batch}
        low = [f"{name} ({value})" for name, value in given.items() if value is not None and value < 1]
        if low:
            raise ConfigError(f"{' and '.join(low)} must be at least 1")


def sample(
    family: VideoLDM,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draws a clip of each prompt and seed: (B, F, 3, H, W), about in [-1, 1].

    A clip depends on its own seed alone, not on those beside it. ConfigError where the size does not fit the VAE.
    """
    settings = settings or Sampling()
    noise = initial_noise(family, seeds, settings)
    batch = settings.batch or max(1, TOGETHER // (noise[0, :, 0].numel() * family.factor**2))
    texts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
    parts = zip(texts, noise.split(batch), strict=True)
    latents = torch.cat([sample_latents(family, *part, settings, progress) for part in parts])
    with evaluating(family.vae):
        return family.decode(latents).float()  # (B, F, 3, H, W)


def initial_noise(family: VideoLDM, seeds: Sequence[int], settings: Sampling) -> Tensor:
    """Standard normal latents (B, F, C, h, w), each clip's of its own seed."""
    height, width = settings.height or family.size[0], settings.width or family.size[1]
    if height % family.factor or width % family.factor:
        raise ConfigError(f"height {height} and width {width} must be multiples of {family.factor}")
    latent = (height // family.factor, width // family.factor)
    shape = (settings.frames or family.clips.frames, family.vae.config.latent_channels, *latent)
    drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(family.device, family.unet.dtype)  # (B, F, C, h, w)


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
    scheduler = family.scheduler(settings.sampler)
    scheduler.set_timesteps(settings.steps, device=noise.device)
    guided = settings.guidance > 1.0
    with evaluating(family.unet, *family.text.networks):
        condition = family.embed([*[settings.negative] * len(prompts), *prompts] if guided else prompts)
        scale = noise.new_full((noise.shape[1],), settings.guidance) if guided else None
        return integrate(family.predict(condition), noise, scheduler, scale, progress)
