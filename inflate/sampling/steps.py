"""The steps that every sampler here takes: a prediction, guided, and the scheduler's answer to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import Tensor

from inflate.objectives import Predict

Progress = Callable[[Sequence[Any]], Iterable[Any]]
"""Wraps the list of steps, as tqdm does."""


def integrate(
    predict: Predict,
    noise: Tensor,
    scheduler: DDIMScheduler | EulerDiscreteScheduler,
    guidance: Tensor | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Clean latents (B, F, C, h, w) from standard normal ones, along the scheduler's timesteps.

    With `guidance` (F,), `predict` is given the batch twice: first without, then with the condition.
    """
    latents = noise * scheduler.init_noise_sigma
    for timestep in (progress or list)(list(scheduler.timesteps)):
        scaled = scheduler.scale_model_input(latents, timestep)
        prediction = _guided(predict, scaled, timestep, guidance)  # (B, F, C, h, w)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def _guided(predict: Predict, scaled: Tensor, timestep: Tensor, guidance: Tensor | None) -> Tensor:
    if guidance is None:
        return predict(scaled, timestep.expand(len(scaled)))
    without, given = predict(_twice(scaled), timestep.expand(2 * len(scaled))).chunk(2)
    return without + guidance[:, None, None, None] * (given - without)


def _twice(scaled: Tensor) -> Tensor:
    return scaled.repeat(2, *(1,) * (scaled.ndim - 1))
