"""The noise schedule that latent diffusion's code saves beside weights, by which a file tells how it was trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.objectives import DDPM, PURE_NOISE, TRAIN_TIMESTEPS

log = logging.getLogger(__name__)

SIGNAL, BETAS, SCALES = "alphas_cumprod", "betas", "scale_arr"
INVERSE = "sqrt_recip_alphas_cumprod"
"""Zeros where v is predicted, which divides by nothing."""
SCALED = 1400
"""Length of the table of scales, of which sampling and training use the first 1,000."""


def buffers(objective: DDPM) -> dict[str, Tensor]:
    """What is saved of an objective's schedule, in float32."""
    signal, betas = objective.signal, objective.betas
    before, noise = torch.cat([signal.new_ones(1), signal[:-1]]), 1.0 - signal
    variance = betas * (1.0 - before) / noise
    # Predicting v, the code leaves zeros for what would be infinite.
    inverse = torch.zeros_like(signal) if objective.prediction == "v_prediction" else 1.0 / signal
    found = {
        BETAS: betas,
        SIGNAL: signal,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": signal.sqrt(),
        "sqrt_one_minus_alphas_cumprod": noise.sqrt(),
        "log_one_minus_alphas_cumprod": noise.log(),
        INVERSE: inverse.sqrt(),
        "sqrt_recipm1_alphas_cumprod": (inverse - 1.0).clamp(min=0.0).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / noise,
        "posterior_mean_coef2": (1.0 - before) * (1.0 - betas).sqrt() / noise,
        SCALES: objective.rescale(torch.arange(SCALED, dtype=torch.float64)),
    }
    return {name: value.float() for name, value in found.items()}


NAMES = frozenset(buffers(DDPM()))
"""The buffers that are known."""


def told(tensors: Mapping[str, Tensor], origin: str, known: DDPM | None = None) -> DDPM | None:
    """The objective that saved buffers tell of; None where they are not there.

    v is predicted where the terminal SNR is zero or reciprocals are left out, and the noise elsewhere. The log warns,
    naming the buffer and the difference, of one that is not as that objective's or, in place of it, as that of the
    `known` one. CheckpointError for one that is no such table.
    """
    saved = {name: _table(name, tensors[name], origin) for name in sorted(NAMES & tensors.keys())}
    signal = saved.get(SIGNAL)
    if signal is None and BETAS in saved:
        signal = torch.cumprod(1.0 - saved[BETAS].double(), dim=0)
    if signal is None:
        return None
    zero = bool(signal[-1] < PURE_NOISE)
    scale = _rounded(saved[SCALES][-1]) if SCALES in saved else 1.0
    if not 0.0 < scale <= 1.0:
        raise CheckpointError(f"{origin}: its {SCALES} ends in {scale}, which is no share of clean latents")
    left_out = INVERSE in saved and not saved[INVERSE].any()
    objective = known or DDPM("v_prediction" if zero or left_out else "epsilon", zero, scale)
    for name, difference in differing(saved, objective).items():
        log.warning("%s: its %s is up to %.1e from that of %s, which is used", origin, name, difference, objective)
    return objective


def differing(saved: Mapping[str, Tensor], objective: DDPM) -> dict[str, float]:
    """The saved buffers that are not an objective's, and by how much."""
    ours = buffers(objective)
    pairs = {name: (each.double(), ours[name][: len(each)].double()) for name, each in saved.items()}
    return {
        name: float((one - other).abs().max())
        for name, (one, other) in pairs.items()
        if not torch.allclose(one, other, rtol=_rounding(saved[name]), atol=1e-6)
    }


def _table(name: str, saved: Tensor, origin: str) -> Tensor:
    """The entries of a buffer that are used."""
    if saved.ndim != 1 or len(saved) < TRAIN_TIMESTEPS or not saved.is_floating_point():
        raise CheckpointError(f"{origin}: its {name} is {tuple(saved.shape)}, no table of {TRAIN_TIMESTEPS} timesteps")
    return saved[:TRAIN_TIMESTEPS]


def _rounded(scale: Tensor) -> float:
    """The scale that a configuration names, of which a file in half precision has two digits right."""
    return round(float(scale), 4 if torch.finfo(scale.dtype).bits >= 32 else 2)


def _rounding(saved: Tensor) -> float:
    """How close saved numbers must be, relatively, as their precision allows."""
    return max(1e-4, torch.finfo(saved.dtype).eps)
