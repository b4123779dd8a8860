"""What samplers share: guidance over several passes of a network, the steps of a scheduler, and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor, nn

from inflate.errors import ConfigError
from inflate.models.vae import frame_by_frame
from inflate.models.visits import away, visiting
from inflate.objectives import Predict
from inflate.surgery import evaluating

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the list of steps, as tqdm does."""
TOGETHER = 16 * 512 * 512
"""Pixels that the network is given together where no other number is asked for."""
PARTS = 8
"""Parts in which the feed-forwards of large clips run."""


class Decodes(Protocol):
    """A model that makes clips of latents."""

    vae: AutoencoderKL

    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, F, 3, H, W), about in [-1, 1], of scaled latents (B, F, C, h, w)."""


def integrate(
    predict: Predict,
    noise: Tensor,
    scheduler: DDIMScheduler | EulerDiscreteScheduler,
    progress: Progress | None = None,
) -> Tensor:
    """Clean latents (B, F, C, h, w) from standard normal ones, along the scheduler's timesteps."""
    latents = noise * scheduler.init_noise_sigma
    for timestep in (progress or list)(list(scheduler.timesteps)):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = predict(scaled, timestep.expand(len(scaled)))  # (B, F, C, h, w)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def guided(predictions: Sequence[Predict], scales: Sequence[float | Tensor] = (), rescale: float = 0.0) -> Predict:
    """One prediction of several passes over the same latents, each of which is told more than the one before.

    It is the first pass, plus each scale times what a pass adds to the one before: with two passes classifier-free
    guidance (2207.12598), with three (nothing, the image, all) guidance by image and text apart (2211.09800). Without
    scales it is the only pass. A scale is a number, or of a shape that broadcasts with (B, F, C, h, w).

    One of `predictions` takes all passes together, given the batch once for each, of conditions one behind the other;
    as many as there are passes take them in turn, in less memory. `rescale` is the share of a guided prediction that is
    brought to the spread of the last pass (2305.08891, equations 15 and 16).
    """
    together = (len(scales) + 1) // len(predictions)

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        repeated = noisy.expand(together, *noisy.shape).flatten(0, 1), timestep.repeat(together)
        passes = [part for each in predictions for part in each(*repeated).chunk(together)]
        prediction = passes[0]
        for scale, (less, more) in zip(scales, pairwise(passes), strict=True):
            prediction = prediction + scale * (more - less)
        return _respread(prediction, passes[-1], rescale) if rescale and scales else prediction

    return predict


def is_large(latents: Tensor, factor: int, asked: bool | None, passes: int = 2) -> bool:
    """Whether to draw in little memory: as `asked`, else where the pixels of so many passes are too many together.

    The latents (B, F, C, h, w) have `factor` pixels a side each.
    """
    return passes * latents[:, :, 0].numel() * factor**2 > TOGETHER if asked is None else asked


@torch.no_grad()
def decode(family: Decodes, latents: Tensor, large: bool, idle: Sequence[nn.Module] = ()) -> Tensor:
    """Clips (B, F, 3, H, W), about in [-1, 1] and float32, of scaled latents (B, F, C, h, w).

    Large ones frame by frame; the VAE visits the latents' device, and `idle` networks leave it meanwhile.
    """
    little = frame_by_frame(family.vae, large)
    with away(idle), visiting([family.vae], latents.device), evaluating(family.vae), little:
        return family.decode(latents).float()  # (B, F, 3, H, W)


def at_least_one(**counts: int | None) -> None:
    """Raise ConfigError naming the counts that are given and below 1."""
    low = [f"{name} ({count})" for name, count in counts.items() if count is not None and count < 1]
    if low:
        raise ConfigError(f"{' and '.join(low)} must be at least 1")


def check_share(**shares: float | None) -> None:
    """Raise ConfigError naming a share of a prediction that is given and not 0 to 1."""
    for name, share in shares.items():
        if share is not None and not 0.0 <= share <= 1.0:
            raise ConfigError(f"{name} is {share}: it must be 0 (none of the prediction) to 1 (all of it)")


def in_precision(predict: Predict, dtype: torch.dtype) -> Predict:
    """A prediction by a network of some precision, for a sampler that keeps its own."""

    def cast(scaled: Tensor, timestep: Tensor) -> Tensor:
        return predict(scaled.to(dtype), timestep).to(scaled.dtype)

    return cast


def _respread(prediction: Tensor, told: Tensor, share: float) -> Tensor:
    inner = tuple(range(1, prediction.ndim))
    spread = prediction.std(inner, keepdim=True).clamp(min=torch.finfo(prediction.dtype).eps)
    return prediction * (share * told.std(inner, keepdim=True) / spread + 1.0 - share)
