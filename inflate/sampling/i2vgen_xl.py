"""Sampling I2VGen-XL's base stage: from images, prompts and a frame rate to clips, by DDIM, guided by text and CLIP.

Guidance leads away from another prompt without CLIP's tokens; the latent of the first frame and the frame rate are told
in both passes, as in VGen. The networks take turns on the device: each is there while it works, unless it is there
already.

Clips are drawn whole. Overlapping windows, as the refinement stage has them, are not for this one: the detail channels
of a window that begins later would have to hold an image that is not drawn yet, and training never left them without
one. A clip goes on from its last frame instead, as a first frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl import Condition, I2VGenXL
from inflate.layers.recompute import in_parts
from inflate.models.text_encoders import TextCondition
from inflate.models.visits import away, visiting
from inflate.sampling.animators import check_inputs, decoded, guidance, image_latents, in_batches, latent_shape
from inflate.sampling.ddim import DDIM, Spacing
from inflate.sampling.steps import PARTS, Progress, at_least_one, check_share, is_large
from inflate.surgery import evaluating


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn from images and prompts; the defaults are VGen's."""

    steps: int = 50
    """denoising steps"""
    eta: float = 0.0
    """fresh noise of each step, 0 (none) to 1"""
    guidance: float = 9.0
    """guidance scale of text and CLIP together; up to 1 there is no guidance, at half the cost"""
    rescale: float = 0.0
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1, against overexposed
    clips"""
    negative: str | None = None
    """prompt that guidance leads away from; none: the one that stood for none in training"""
    frames: int | None = None
    """length of the clips; none: the length of training"""
    fps: float | None = None
    """frames per second that the model is told; none: those of training"""
    spacing: Spacing = "leading"
    """which timesteps: leading, of which 50 begin at 981, or trailing, from the last one, 999"""
    start: int | None = None
    """timestep to start from; none: the first of the spacing's"""
    offset: float = 0.0
    """spread of a shift of each frame and channel that the first noise has beside, as noise has in training: 0.1 of
    ModelScope's first version, none of VGen's"""
    batch: int | None = None
    """clips drawn together; none: as many as have the pixels of 16 frames of 512x512"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, frames=self.frames, batch=self.batch)
        check_share(rescale=self.rescale)
        if self.offset < 0.0:
            raise ConfigError(f"offset is {self.offset}: it must be 0 (none) or more")

    @property
    def scales(self) -> list[float]:
        """Guidance scales of the passes after the first: none or one."""
        return [self.guidance] if self.guidance > 1.0 else []


def sample(
    family: I2VGenXL,
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling | None = None,
    progress: Progress | None = None,
    idle: Sequence[nn.Module] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Draws a clip of each image (N, 3, H, W) in [-1, 1], prompt and seed: (N, F, 3, H, W), about in [-1, 1].

    A clip depends on its own seed alone, not on those beside it. The networks visit the device one after the other;
    none: where the UNet is. Those that are `idle` but for the drawing of latents, the UNet of a training run, leave it
    while the others work. `progress` wraps the list of steps, as tqdm does. ConfigError where the images do not fit the
    VAE, or the settings or prompts the model.
    """
    settings = settings or Sampling()
    sampler_of(family, settings)
    check_inputs(family, images, prompts, seeds)
    device = device or family.device
    with away(idle):
        conditions = conditions_of(family, images.to(device), prompts, settings)

    def draw(part: Sequence[Condition], noise: Iterator[Tensor]) -> Tensor:
        return sample_latents(family, part, noise, settings, progress)

    shape = latent_shape(family, images, settings.frames)
    latents = in_batches(family, conditions, seeds, shape, settings.batch, draw, device)
    return decoded(family, latents, settings.little_memory, idle)


def sampler_of(family: I2VGenXL, settings: Sampling) -> DDIM:
    """The sampler of a model by the settings; ConfigError where it cannot sample so."""
    return DDIM(family.objective, settings.steps, settings.eta, settings.spacing, settings.start)


@torch.no_grad()
def conditions_of(
    family: I2VGenXL, images: Tensor, prompts: Sequence[str], settings: Sampling | None = None
) -> list[Condition]:
    """The conditions (N, ...) of guidance's passes on images (N, 3, H, W): what it leads away from, and all.

    ConfigError for a prompt where the model is told none.
    """
    settings = settings or Sampling()
    own = family.hierarchy
    latents = image_latents(family, images) if own.takes_latents else None
    embedding = None
    if own.clip_tokens:
        with visiting([family.image_encoder], images.device), evaluating(family.image_encoder):
            embedding = family.embed_image(images)  # (N, 1, E)
    fps = images.new_full((len(images),), family.clips.fps if settings.fps is None else settings.fps)
    text, negative = _texts(family, prompts, settings, images.device)
    full = family.condition(text, latents, embedding, fps)
    return [full.unguided(full.text if negative is None else negative.context), full] if settings.scales else [full]


def _texts(
    family: I2VGenXL, prompts: Sequence[str], settings: Sampling, device: torch.device
) -> tuple[TextCondition | None, TextCondition | None]:
    """What the UNet is told of prompts and of the negative one; none where it is told no prompts."""
    clips = family.clips
    if not clips.prompts:
        if any(prompts) or settings.negative:
            raise ConfigError("this model is told images alone: leave prompts out")
        return None, None
    negative = clips.negative if settings.negative is None else settings.negative
    with visiting(family.text.networks, device), evaluating(*family.text.networks):
        return family.embed(prompts), family.embed([negative] * len(prompts))


@torch.no_grad()
def sample_latents(
    family: I2VGenXL,
    conditions: Sequence[Condition],
    noise: Iterator[Tensor],
    settings: Sampling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents (B, F, C, h, w) by the conditions of guidance's passes.

    `noise` gives standard normal latents of that shape: those to start from, what shifts them, then each step's.
    """
    settings = settings or Sampling()
    latents, unet = next(noise), family.unet
    if settings.offset:
        latents = latents + settings.offset * next(noise)[..., :1, :1]  # (B, F, C, h, w)
    large = is_large(latents, family.factor, settings.little_memory, len(conditions))
    with visiting([unet], latents.device), evaluating(unet), in_parts(unet, PARTS if large else 0):
        predict = guidance(family, conditions, settings.scales, settings.rescale, large)
        return sampler_of(family, settings).draw(predict, latents, noise, progress)
