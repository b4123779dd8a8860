"""What the samplers of models that animate an image by a prompt share: checks, latents of images, batches, guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from inflate.errors import ConfigError
from inflate.models.animators import Animator
from inflate.models.conditions import Batched
from inflate.models.stable_diffusion import TextToVideo
from inflate.models.unet import VideoUNet
from inflate.models.visits import visiting
from inflate.objectives import Predict
from inflate.sampling.ddim import standard_normal
from inflate.sampling.steps import TOGETHER, decode, guided, in_precision, is_large
from inflate.surgery import evaluating

Told = TypeVar("Told", bound=Batched)
_Told = TypeVar("_Told", bound=Batched, contravariant=True)


class Predicts(Protocol[_Told]):
    """A model that is told something of the clips it denoises."""

    unet: VideoUNet

    def predict(self, condition: _Told) -> Predict:
        """The network as samplers call it, for a condition."""


def check_inputs(family: TextToVideo, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Raise ConfigError where images (N, 3, H, W) do not fit the VAE, or there is not a prompt and a seed for each."""
    factor = family.factor
    if images.ndim != 4 or images.shape[-1] % factor or images.shape[-2] % factor:
        raise ConfigError(
            f"the images are {tuple(images.shape)}; they must be (batch, 3, height, width), multiples of {factor}"
        )
    if not len(images) == len(prompts) == len(seeds):
        raise ConfigError(f"{len(images)} images, {len(prompts)} prompts and {len(seeds)} seeds: give as many of each")


def latent_shape(family: TextToVideo, images: Tensor, frames: int | None) -> tuple[int, ...]:
    """Frames (none: those of training), channels, height and width of the latents of one of the images' clips."""
    height, width = (side // family.factor for side in images.shape[-2:])
    return frames or family.clips.frames, family.vae.config.latent_channels, height, width


def image_latents(family: Animator, images: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) of images (N, 3, H, W), encoded one by one by a VAE that visits their device."""
    with visiting([family.vae], images.device), evaluating(family.vae):
        return family.encode(images[:, None])[:, 0]


def in_batches(
    family: TextToVideo,
    conditions: Sequence[Told],
    seeds: Sequence[int],
    shape: Sequence[int],
    together: int | None,
    draw: Callable[[Sequence[Told], Iterator[Tensor]], Tensor],
    device: torch.device,
) -> Tensor:
    """Scaled latents (N, F, C, h, w) that `draw` makes of the conditions of guidance's passes and of noise.

    So many clips `together`; none: as many as have the pixels of 16 frames of 512x512. Noise is of each clip's seed.
    """
    frames, _, height, width = shape
    size = together or max(1, TOGETHER // (frames * height * width * family.factor**2))
    like = torch.empty(0, device=device, dtype=torch.promote_types(family.unet.dtype, torch.float32))
    parts = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    return torch.cat(
        [
            draw(part, standard_normal(chosen, shape, like))
            for chosen, *part in zip(parts, *(each.split(size) for each in conditions), strict=True)
        ]
    )


def guidance(
    family: Predicts[Told], conditions: Sequence[Told], scales: Sequence[float], rescale: float, in_turn: bool
) -> Predict:
    """The guided prediction of passes over the conditions, all of them together or `in_turn`, as `guided` has it."""
    parts = conditions if in_turn else [type(conditions[0]).cat(conditions)]
    return guided([in_precision(family.predict(each), family.unet.dtype) for each in parts], scales, rescale)


def decoded(
    family: TextToVideo, latents: Tensor, little_memory: bool | None = None, idle: Sequence[nn.Module] = ()
) -> Tensor:
    """Clips (B, F, 3, H, W), about in [-1, 1] and float32, of scaled latents, one by one.

    Large ones frame by frame; `idle` networks leave their place on the device meanwhile.
    """
    return decode(family, latents, is_large(latents[:1], family.factor, little_memory), idle)
