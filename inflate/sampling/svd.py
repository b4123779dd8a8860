"""Sampling Stable Video Diffusion: Euler steps over Karras' noise levels, guidance rising over the frames.

Equal to diffusers' StableVideoDiffusionPipeline on the exported folder, down to its random draws. The networks take
turns on the device: each is there while it works, unless it is there already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

from inflate.errors import ConfigError
from inflate.families.svd import SVD, Condition
from inflate.layers.recompute import in_parts
from inflate.models.visits import away, visiting
from inflate.objectives import Predict
from inflate.sampling.steps import PARTS, Progress, at_least_one, decode, guided, in_precision, integrate, is_large
from inflate.surgery import evaluating


@dataclass(frozen=True)
class Sampling:
    """How a clip is drawn from its first frame."""

    steps: int = 25
    """denoising steps"""
    guidance_min: float = 1.0
    """guidance scale of the first frame"""
    guidance_max: float = 3.0
    """guidance scale of the last frame; up to 1 there is no guidance, at half the cost"""
    fps: float = 7.0
    """frames per second that the model is told"""
    motion_bucket: float = 127.0
    """amount of motion: the share of training clips that move less, of 255"""
    noise_aug: float = 0.02
    """noise added to the first frame, a sigma in pixel values of [-1, 1]"""
    frames: int | None = None
    """length of the clip; none: the length of training"""
    seed: int = 0
    """of the noise on the first frame, then of the initial latents"""
    sigma_min: float | None = None
    """lowest noise level; none: the model's own, 0.002"""
    sigma_max: float | None = None
    """noise level to start from; none: the model's own, 700 where the network can be told of it. A lower one, such as
    100, leaves out the levels at which models repeat the image (2406.15735): more motion"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clip; none: where it
    is large, of more than 8 frames of 512x512"""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, frames=self.frames)


def sample(
    family: SVD,
    image: Tensor,
    settings: Sampling | None = None,
    progress: Progress | None = None,
    idle: Sequence[nn.Module] = (),
) -> Tensor:
    """Draws clips (B, F, 3, H, W), about in [-1, 1], whose first frame is `image` (B, 3, H, W) in [-1, 1].

    The networks visit the image's device one after the other; those that are `idle` but for the drawing of latents, the
    UNet of a training run, leave it while the others work. `progress` wraps the list of steps, as tqdm does.
    ConfigError where the image does not fit the VAE's factor.
    """
    settings = settings or Sampling()
    generator = torch.Generator().manual_seed(settings.seed)
    with away(idle):
        condition = condition_of(family, image, settings, generator)
    latents = sample_latents(family, condition, initial_noise(family, image, settings, generator), settings, progress)
    return decoded(family, latents, settings.little_memory, idle)


def condition_of(family: SVD, image: Tensor, settings: Sampling, generator: torch.Generator) -> Condition:
    """The condition of `image` (B, 3, H, W) by the settings; draws the image's noise from `generator`."""
    factor = family.factor
    if image.ndim != 4 or image.shape[-1] % factor or image.shape[-2] % factor:
        raise ConfigError(
            f"the image is {tuple(image.shape)}; it must be (batch, 3, height, width), multiples of {factor}"
        )
    noise = torch.randn(image.shape, generator=generator).to(image)
    fps, bucket, aug = (
        image.new_full((len(image),), value) for value in (settings.fps, settings.motion_bucket, settings.noise_aug)
    )
    with visiting([family.image_encoder], image.device):
        context = family.embed(image)  # (B, 1, D)
    with visiting([family.vae], image.device):
        return family.condition(image, fps, bucket, aug, noise, context)


def initial_noise(family: SVD, image: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """Standard normal latents (B, F, C, h, w) for clips as large as `image`."""
    factor = family.factor
    height, width = image.shape[-2] // factor, image.shape[-1] // factor
    shape = (len(image), settings.frames or family.frames, family.vae.config.latent_channels, height, width)
    return torch.randn(shape, generator=generator).to(image)


@torch.no_grad()
def sample_latents(
    family: SVD, condition: Condition, noise: Tensor, settings: Sampling | None = None, progress: Progress | None = None
) -> Tensor:
    """Scaled latents (B, F, C, h, w) of a condition, from standard normal latents of that shape."""
    settings = settings or Sampling()
    scheduler = family.scheduler(settings.sigma_min, settings.sigma_max)
    scheduler.set_timesteps(settings.steps, device=noise.device)
    if settings.sigma_max is not None and family.moments is not None:
        # the scheduler takes latents for unit normal ones, which shows once noise no longer hides them
        noise = family.moments.start(noise, float(scheduler.sigmas[0])) / scheduler.init_noise_sigma
    large = is_large(noise, family.factor, settings.little_memory)
    conditions, scales = [condition], []
    if settings.guidance_max > 1.0:
        scale = torch.linspace(settings.guidance_min, settings.guidance_max, noise.shape[1]).to(noise)
        conditions, scales = [condition.null(), condition], [scale[:, None, None, None]]
    if not large:
        conditions = [Condition.cat(conditions)]
    predict = guided([in_precision(family.predict(each), family.unet.dtype) for each in conditions], scales)
    with visiting([family.unet], noise.device), evaluating(family.unet), in_parts(family.unet, PARTS if large else 0):
        return euler(predict, noise, scheduler, progress)


def decoded(family: SVD, latents: Tensor, little_memory: bool | None = None, idle: Sequence[nn.Module] = ()) -> Tensor:
    """Clips (B, F, 3, H, W), about in [-1, 1] and float32, of scaled latents, all together.

    Large ones frame by frame; `idle` networks leave their place on the device meanwhile.
    """
    return decode(family, latents, is_large(latents, family.factor, little_memory), idle)


def euler(
    predict: Predict, noise: Tensor, scheduler: EulerDiscreteScheduler, progress: Progress | None = None
) -> Tensor:
    """Integrates from `noise` (B, F, C, h, w) along the scheduler's noise levels to clean latents of that shape."""
    scheduler.set_begin_index(0)
    return integrate(predict, noise, scheduler, progress)
