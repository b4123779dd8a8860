"""Sampling DynamiCrafter: from images and prompts to clips, by DDIM with fresh noise, guided by text and image.

The networks take turns on the device: each is there while it works, unless it is there already.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inflate.errors import ConfigError
from inflate.families.dynamicrafter import Condition, DynamiCrafter
from inflate.layers.recompute import in_parts
from inflate.models.visits import away, visiting
from inflate.sampling.animators import check_inputs, decoded, guidance, image_latents, in_batches, latent_shape
from inflate.sampling.ddim import DDIM, Spacing
from inflate.sampling.steps import PARTS, Progress, at_least_one, check_share, is_large
from inflate.surgery import evaluating


@dataclass(frozen=True)
class Sampling:
    """How clips are drawn from images and prompts."""

    steps: int = 50
    """denoising steps"""
    eta: float = 1.0
    """fresh noise of each step, 0 (none) to 1"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    image_guidance: float | None = None
    """guidance scale of the image, that above being the text's, at half the cost again; none: one scale for both"""
    rescale: float | None = None
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1, against overexposed
    clips; none: 0.7 of models that were trained on pure noise, otherwise 0"""
    negative: str = ""
    """prompt that guidance leads away from; the empty one is the model's null condition"""
    frames: int | None = None
    """length of the clips; none: the length of training"""
    number: float | None = None
    """what the model is told: frames per second, fewer of which are more motion, or of some models the stride; none:
    its usual number"""
    spacing: Spacing | None = None
    """which timesteps: leading or trailing; none: trailing of models that were trained on pure noise, else leading"""
    start: int | None = None
    """timestep to start from; none: the last. A lower one leaves out those at which models repeat the image
    (2406.15735): more motion"""
    batch: int | None = None
    """clips drawn together; none: as many as have the pixels of 16 frames of 512x512"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, frames=self.frames, batch=self.batch)
        check_share(rescale=self.rescale)

    @property
    def scales(self) -> list[float]:
        """Guidance scales of the passes after the first: none, one, or of image and text."""
        if self.image_guidance is not None:
            return [self.image_guidance, self.guidance]
        return [self.guidance] if self.guidance > 1.0 else []


def sample(
    family: DynamiCrafter,
    images: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: Sampling | None = None,
    ends: Tensor | None = None,
    progress: Progress | None = None,
    idle: Sequence[nn.Module] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Draws a clip of each image (N, 3, H, W) in [-1, 1], prompt and seed: (N, F, 3, H, W), about in [-1, 1].

    The image is the first frame, of a model that was trained so. With `ends` (N, 3, H, W) clips go from one to the
    other; where both are the same they are loops, whose last frame is the first once more.

    A clip depends on its own seed alone, not on those beside it. The networks visit the device one after the other;
    none: where the UNet is. Those that are `idle` but for the drawing of latents, the UNet of a training run, leave it
    while the others work. `progress` wraps the list of steps, as tqdm does. ConfigError where the images do not fit the
    VAE, or the settings the model.
    """
    settings = settings or Sampling()
    sampler_of(family, settings)
    _check(family, images, prompts, seeds, ends)
    device = device or family.device
    ends = None if ends is None else ends.to(device)
    with away(idle):
        conditions = conditions_of(family, images.to(device), prompts, settings, ends)

    def draw(part: Sequence[Condition], noise: Iterator[Tensor]) -> Tensor:
        return sample_latents(family, part, noise, settings, progress)

    shape = latent_shape(family, images, settings.frames)
    latents = in_batches(family, conditions, seeds, shape, settings.batch, draw, device)
    return decoded(family, latents, settings.little_memory, idle)


def sampler_of(family: DynamiCrafter, settings: Sampling) -> DDIM:
    """The sampler of a model by the settings; ConfigError where it cannot sample so."""
    return DDIM(family.objective, settings.steps, settings.eta, settings.spacing, settings.start)


@torch.no_grad()
def conditions_of(
    family: DynamiCrafter,
    images: Tensor,
    prompts: Sequence[str],
    settings: Sampling | None = None,
    ends: Tensor | None = None,
) -> list[Condition]:
    """The conditions (N, ...) of guidance's passes on images (N, 3, H, W), each told more than the one before.

    The first is told the negative prompt and no image, that in the middle of three the image, too. The detail latent
    and the number are the same in all.
    """
    settings = settings or Sampling()
    with visiting(family.text.networks, images.device), evaluating(*family.text.networks):
        text, negative = family.embed(prompts), family.embed([settings.negative] * len(prompts))
    with visiting([family.image_encoder], images.device), evaluating(family.image_encoder):
        image, no_image = family.embed_image(images), family.null_image().expand(len(images), -1, -1)
    first, last = _latents(family, images), None if ends is None else _latents(family, ends)
    number = images.new_full((len(images),), family.clips.usual if settings.number is None else settings.number)
    full = family.condition(text, image, number, first, settings.frames or family.clips.frames, last)
    image_alone = replace(full, text=negative.context)
    passes = [replace(image_alone, image=no_image), image_alone, full]
    return {0: passes[2:], 1: passes[::2], 2: passes}[len(settings.scales)]


def _latents(family: DynamiCrafter, images: Tensor) -> Tensor | None:
    """Scaled latents (N, C, h, w) of images (N, 3, H, W), for a UNet that takes them."""
    return image_latents(family, images) if family.takes_detail else None


@torch.no_grad()
def sample_latents(
    family: DynamiCrafter,
    conditions: Sequence[Condition],
    noise: Iterator[Tensor],
    settings: Sampling | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents (B, F, C, h, w) by the conditions of guidance's passes.

    `noise` gives standard normal latents of that shape: those to start from, then each step's.
    """
    settings = settings or Sampling()
    latents, sampler, unet = next(noise), sampler_of(family, settings), family.unet
    if settings.start is not None and family.moments is not None:
        latents = sampler.begin(latents, family.moments)
    large = is_large(latents, family.factor, settings.little_memory, len(conditions))
    rescale = (0.7 if family.objective.zero_terminal_snr else 0.0) if settings.rescale is None else settings.rescale
    with visiting([unet], latents.device), evaluating(unet), in_parts(unet, PARTS if large else 0):
        told = [family.with_tokens(each, latents.shape[1]) for each in conditions]
        predict = guidance(family, told, settings.scales, rescale, large)
        return sampler.draw(predict, latents, noise, progress)


def _check(
    family: DynamiCrafter, images: Tensor, prompts: Sequence[str], seeds: Sequence[int], ends: Tensor | None
) -> None:
    check_inputs(family, images, prompts, seeds)
    if ends is not None and not family.takes_detail:
        raise ConfigError("this model takes no latents of frames and cannot end on one: leave the ends out")
    if ends is not None and ends.shape != images.shape:
        raise ConfigError(f"the ends are {tuple(ends.shape)} and the images {tuple(images.shape)}: one size for both")
