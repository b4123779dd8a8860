"""Training objectives: frozen dataclasses that are called with the network.

EDM is the continuous-noise objective of Karras et al., 2206.00364, in the preconditioning of Stable Video Diffusion
(2311.15127, appendix D): a v-prediction, so that both the published video models and a v-predicting image model fit.
DDPM is the one that Stable Diffusion itself was trained with, on its thousand timesteps; I2VGen-XL (2311.04145) took
other schedules.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inflate.errors import ConfigError

Predict = Callable[[Tensor, Tensor], Tensor]

Schedule = Literal["scaled_linear", "cosine", "shifted_cosine"]
"""scaled_linear = Stable Diffusion's (VGen's linear_sd); cosine = that of 2102.09672, equation 17; shifted_cosine = a
cosine of log SNR shifted towards noise (2301.11093, section 3.1), by more the noisier"""

TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
COSINE_OFFSET, COSINE_BETA_LIMIT = 0.008, 0.999
LOG_SNR_LIMIT = 15.0
"""The log SNR of the shifted cosine goes from this to its negative before it is shifted."""
SHIFT_SCALES = 2.0, 4.0
"""Sides of the image relative to one without shift, at the first and at the last timestep of the shifted cosine."""
PURE_NOISE = 1e-4
"""A clip with a smaller share of signal is as good as pure noise; Stable Diffusion's last timestep has 5e-3."""
RESCALED_TIMESTEPS = 399
"""Timesteps over which `DDPM.base_scale` is reached."""


class Scalings(NamedTuple):
    """What surrounds the network at each noise level, every entry of shape (B,)."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def schedule_signal(zero_terminal_snr: bool, schedule: Schedule = "scaled_linear") -> Tensor:
    """The 1,000 shares of signal in the variance, descending, of a noise schedule (float64).

    Like the original implementations, and unlike diffusers, which differs by up to 5e-7, this rounds nothing on the
    way. With `zero_terminal_snr` the schedule is stretched as in 2305.08891, algorithm 1, so that the last is 0.
    """
    return _tables(zero_terminal_snr, schedule)[0]


def schedule_sigmas(zero_terminal_snr: bool, schedule: Schedule = "scaled_linear") -> Tensor:
    """The 1,000 noise levels sigma / alpha, ascending, of a noise schedule (float64).

    Those of pure noise, which would be infinite, are 4,096, the value that diffusers' EulerDiscreteScheduler uses.
    """
    return _tables(zero_terminal_snr, schedule)[1]


@functools.cache
def _tables(zero_terminal_snr: bool, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Shares of signal and noise levels of a schedule."""
    kinds = {"scaled_linear": _scaled_linear, "cosine": _cosine, "shifted_cosine": _shifted_cosine}
    signal = kinds[schedule]()
    if zero_terminal_snr:
        signal = _zero_terminal(signal)
    limited = signal.clamp(min=2.0**-24)
    return signal, ((1.0 - limited) / limited).sqrt()


def _scaled_linear() -> Tensor:
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def _cosine() -> Tensor:
    time = torch.linspace(0.0, 1.0, TRAIN_TIMESTEPS + 1, dtype=torch.float64)
    share = ((time + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * math.pi / 2).cos() ** 2
    betas = (1.0 - share[1:] / share[:-1]).clamp(max=COSINE_BETA_LIMIT)
    return torch.cumprod(1.0 - betas, dim=0)


def _shifted_cosine() -> Tensor:
    time = torch.linspace(0.0, 1.0, TRAIN_TIMESTEPS, dtype=torch.float64)
    first, last = (math.atan(math.exp(-0.5 * limit)) for limit in (LOG_SNR_LIMIT, -LOG_SNR_LIMIT))
    log_snr = -2.0 * (first + time * (last - first)).tan().log()
    less, more = (2.0 * math.log(scale) for scale in SHIFT_SCALES)
    return torch.sigmoid(log_snr - less - (more - less) * time)


def _zero_terminal(signal: Tensor) -> Tensor:
    root = signal.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * (first / (first - last))) ** 2


def sigma_to_timestep(sigma: Tensor, zero_terminal_snr: bool = False) -> Tensor:
    """The fractional timestep in [0, 999] whose noise level is `sigma`, by interpolation in log sigma; same shape."""
    place = _place_of_float64(sigma.device)
    levels = schedule_sigmas(zero_terminal_snr).to(place).log()
    log_sigma = sigma.to(place).double().clamp(min=1e-10).log()
    low = (torch.searchsorted(levels, log_sigma.contiguous(), right=True) - 1).clamp(0, len(levels) - 2)
    share = ((log_sigma - levels[low]) / (levels[low + 1] - levels[low])).clamp(0.0, 1.0)
    return (low + share).to(sigma.dtype).to(sigma.device)


def _place_of_float64(device: torch.device) -> torch.device:
    """The device, or the CPU in place of one without float64; only there, as a copy makes the device wait."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass(frozen=True)
class EDM:
    """Log-normal noise levels, unit-variance data, and the mean squared error of v (2311.15127, appendix D.2).

    Told of noise as `discrete`, a v-predicting image model keeps its exact denoiser.
    """

    P_mean: float = 0.7
    """mean of ln sigma: 0.7 up to 320x576 pixels, 1.0 above"""
    P_std: float = 1.6
    """standard deviation of ln sigma"""
    noise_condition: Literal["edm", "discrete"] = "edm"
    """what the network is told: edm = ln(sigma) / 4; discrete = the timestep of Stable Diffusion's schedule"""
    zero_terminal_snr: bool = False
    """whether that discrete schedule ends in pure noise"""

    @property
    def sigma_limit(self) -> float:
        """The largest noise level that the network can be told of."""
        return math.inf if self.noise_condition == "edm" else float(schedule_sigmas(self.zero_terminal_snr)[-1])

    def sigma(self, normal: Tensor) -> Tensor:
        """Noise levels (B,) from standard normal draws (B,), none above `sigma_limit`."""
        return (self.P_mean + self.P_std * normal).exp().clamp(max=self.sigma_limit)

    def time(self, sigma: Tensor) -> Tensor:
        """Diffusion time of noise levels, 0 to 1: the share of training that is less noisy; same shape."""
        return torch.special.ndtr((sigma.log() - self.P_mean) / self.P_std)

    def noise_input(self, sigma: Tensor) -> Tensor:
        """What the network is told of `sigma`; same shape."""
        if self.noise_condition == "edm":
            return 0.25 * sigma.log()
        return sigma_to_timestep(sigma, self.zero_terminal_snr)

    def scalings(self, sigma: Tensor) -> Scalings:
        """c_skip, c_out, c_in and c_noise, each (B,), of noise levels (B,)."""
        total = sigma**2 + 1.0
        return Scalings(1.0 / total, -sigma / total.sqrt(), 1.0 / total.sqrt(), self.noise_input(sigma))

    def target(self, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """v = (noise - sigma clean) / sqrt(1 + sigma^2), of the shape of `clean`: no difference of large numbers."""
        level = _per_video(sigma, clean)
        return (noise - level * clean) / (level**2 + 1.0).sqrt()

    def loss(self, predict: Predict, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error (B,) of v, at least in float32; equal to the weighted error of the denoised clip.

        `clean` and `noise` are (B, F, C, h, w), `sigma` (B,): one noise level for all frames of a clip.
        """
        clean, noise, sigma = (at_least_float32(tensor) for tensor in (clean, noise, sigma))
        _, _, c_in, c_noise = self.scalings(sigma)
        level = _per_video(sigma, clean)
        prediction = predict(_per_video(c_in, clean) * (clean + level * noise), c_noise)  # (B, F, C, h, w)
        error = prediction.to(clean.dtype) - self.target(clean, sigma, noise)
        return error.square().flatten(1).mean(dim=1)  # (B,)

    def denoise(self, predict: Predict, noisy: Tensor, sigma: Tensor) -> Tensor:
        """The denoised clip c_skip x + c_out F(c_in x, c_noise), (B, F, C, h, w), at noise levels (B,)."""
        c_skip, c_out, c_in, c_noise = self.scalings(sigma)
        prediction = predict(_per_video(c_in, noisy) * noisy, c_noise)  # (B, F, C, h, w)
        return _per_video(c_skip, noisy) * noisy + _per_video(c_out, noisy) * prediction.to(noisy.dtype)


@dataclass(frozen=True)
class DDPM:
    """Stable Diffusion's own objective: a timestep drawn evenly, and the mean squared error of the noise or of v.

    Timesteps are whole numbers in [0, 999], (B,) for all frames of a clip or (B, F) for each of its own. ConfigError
    where the noise is to be predicted from pure noise, for there its error says nothing of the clip, and where a
    schedule that ends in as good as that is to be stretched.
    """

    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """what the network predicts: the noise, or v = alpha noise - sigma clean (2202.00512)"""
    zero_terminal_snr: bool = False
    """whether the last timestep is pure noise (2305.08891)"""
    base_scale: float = 1.0
    """factor of clean latents from timestep 399 on, reached evenly from 1 at timestep 0 (DynamiCrafter's dynamic
    rescale); 1: they stay as they are"""
    schedule: Schedule = "scaled_linear"
    """how the share of signal falls from timestep to timestep"""

    def __post_init__(self) -> None:
        if not 0.0 < self.base_scale <= 1.0:
            raise ConfigError(f"base_scale is {self.base_scale}: it must be above 0 and at most 1, which is no rescale")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ConfigError("zero terminal SNR needs a model that predicts v: pure noise is its own prediction")
        if self.zero_terminal_snr and self.schedule == "shifted_cosine":
            raise ConfigError("the shifted cosine has no zero terminal SNR: it ends in noise as it is; leave that out")

    @property
    def signal(self) -> Tensor:
        """The 1,000 shares of signal in the variance, descending (float64)."""
        return schedule_signal(self.zero_terminal_snr, self.schedule)

    @property
    def betas(self) -> Tensor:
        """The 1,000 shares of the variance that each timestep makes noise (float64)."""
        return 1.0 - self.signal / torch.cat([self.signal.new_ones(1), self.signal[:-1]])

    @property
    def sigmas(self) -> Tensor:
        """The 1,000 noise levels sigma / alpha, ascending and finite (float64)."""
        return schedule_sigmas(self.zero_terminal_snr, self.schedule)

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last timestep is pure noise, or as good as that."""
        return bool(self.signal[-1] < PURE_NOISE)

    def timestep(self, uniform: Tensor) -> Tensor:
        """Timesteps from draws in [0, 1); same shape."""
        return (TRAIN_TIMESTEPS * uniform).long().clamp(max=TRAIN_TIMESTEPS - 1)

    def time(self, timestep: Tensor) -> Tensor:
        """Diffusion time of timesteps, 0 to 1, float32; same shape."""
        return timestep.float() / (TRAIN_TIMESTEPS - 1)

    def rescale(self, timestep: Tensor) -> Tensor:
        """The factors of clean latents at timesteps; same shape, float32 where those are whole numbers."""
        return 1.0 + (self.base_scale - 1.0) * (timestep / RESCALED_TIMESTEPS).clamp(max=1.0)

    def noisy(self, clean: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The clips (B, F, C, h, w) at their timesteps: alpha clean + sigma noise, the clean latents rescaled."""
        alpha, sigma = self._shares(timestep, clean)
        return alpha * self._rescaled(clean, timestep) + sigma * noise

    def target(self, clean: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """What the network should predict, of the shape of `clean`."""
        if self.prediction == "epsilon":
            return noise
        alpha, sigma = self._shares(timestep, clean)
        return alpha * noise - sigma * self._rescaled(clean, timestep)

    def separate(self, noisy: Tensor, timestep: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latents, rescaled as they are in `noisy`, and the noise that a prediction says; of its shape."""
        alpha, sigma = self._shares(timestep, noisy)
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        return alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy

    def loss(self, predict: Predict, clean: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each frame (B, F), at least in float32; `clean` and `noise` are (B, F, C, h, w)."""
        clean, noise = at_least_float32(clean), at_least_float32(noise)
        prediction = predict(self.noisy(clean, timestep, noise), timestep)  # (B, F, C, h, w)
        error = prediction.to(clean.dtype) - self.target(clean, timestep, noise)
        return error.square().flatten(2).mean(dim=2)  # (B, F)

    def _shares(self, timestep: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of timesteps, each (B, 1 or F, 1, 1, 1)."""
        signal = self.signal
        roots = torch.stack([signal.sqrt(), (1.0 - signal).sqrt()])
        alpha, sigma = roots.to(like.dtype).to(like.device)[:, timestep.to(like.device)]
        return _per_frame(alpha, like), _per_frame(sigma, like)

    def _rescaled(self, clean: Tensor, timestep: Tensor) -> Tensor:
        return _per_frame(self.rescale(timestep.to(clean)), clean) * clean


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of the two hinge terms of a discriminator (1705.02894), a scalar, from logits of any shape."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def vanilla_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half of the two cross-entropy terms of a discriminator (1406.2661), a scalar, from logits of any shape."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """What the generator lowers: the negative mean logit of its outputs, a scalar."""
    return -fake.mean()


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: where losses are computed, whatever the network's precision."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _per_frame(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(len(like), -1, *(1,) * (like.ndim - 2))  # (B, 1 or F, 1, 1, 1)


def _per_video(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(-1, *(1,) * (like.ndim - 1))  # (B, 1, 1, 1, 1)
