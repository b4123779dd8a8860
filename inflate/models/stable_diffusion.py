"""What a text-conditioned model of Stable Diffusion has beside its UNet: autoencoder, text encoders, noise schedule."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor, nn

from inflate.errors import CheckpointError, ConfigError
from inflate.models import folders
from inflate.models.text_encoders import SUFFIXES, TextCondition, TextEncoders
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE, decode_clips, encode_clips
from inflate.objectives import BETA_END, BETA_START, DDPM, TRAIN_TIMESTEPS, Predict, Schedule, schedule_signal

SHARED_WITH_EULER = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
    "steps_offset", "rescale_betas_zero_snr", "trained_betas",
)  # fmt: skip
_STEPS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")
_PUBLISHED_STEPS = {"steps_offset": 1, "set_alpha_to_one": False}
_SETTINGS: dict[Schedule, dict[str, Any]] = {
    "scaled_linear": {"beta_start": BETA_START, "beta_end": BETA_END, "beta_schedule": "scaled_linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}
"""Of the schedules that diffusers knows; the shifted cosine it is told beta by beta."""
_ROUNDING = 1e-5
"""By how much shares of signal may differ from a schedule's, whose betas were computed in float32."""


class Encoding:
    """What a model with a VAE and text encoders makes of frames and prompts."""

    vae: AutoencoderKL
    text: TextEncoders

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w), the posterior's mode, of clips (B, F, 3, H, W) in [-1, 1]; no gradient."""
        return encode_clips(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, F, 3, H, W), about in [-1, 1], of scaled latents (B, F, C, h, w), one clip at a time.

        Frame by frame with an image model's decoder, all frames of a clip together with a temporal one.
        """
        temporal = isinstance(self.vae, VideoVAE)
        return torch.cat([decode_clips(self.vae, clip, temporal=temporal) for clip in latents.split(1)])

    def embed(self, prompts: Sequence[str]) -> TextCondition:
        """What the UNet is told of prompts; the empty one is the null condition."""
        return self.text.embed(prompts)


@dataclass
class TextToVideo(Encoding, ABC):
    """A model that draws clips of prompts: its networks, its noise schedule, and what its clips were."""

    unet: VideoUNet
    vae: AutoencoderKL
    text: TextEncoders
    noise: DDIMScheduler
    """the image model's noise schedule, as a DDIM sampler's settings"""
    clips: TrainedClips
    """what the clips of training were"""
    base_scale: float = field(default=1.0, kw_only=True)
    """what clean latents are scaled by at noisy timesteps (dynamic rescale); 1: not at all"""

    def __post_init__(self) -> None:
        width, needed = self.text.width, self.unet.config.cross_attention_dim
        if width != needed:
            raise CheckpointError(f"the text encoders have {width} dimensions but the UNet's context has {needed}")

    @property
    def objective(self) -> DDPM:
        """What the image model was trained with."""
        return replace(objective_of(self.noise.config, "the noise schedule"), base_scale=self.base_scale)

    @abstractmethod
    def predict(self, condition: Any, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a condition of the family's own kind.

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed.
        """

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The UNet and the frozen networks."""
        return self.unet, self.vae, *self.text.networks

    @property
    def device(self) -> torch.device:
        """Where the UNet's parameters are."""
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the clips of training or, freshly inflated, of the image model."""
        if self.clips.height and self.clips.width:
            return self.clips.height, self.clips.width
        latent = self.unet.config.sample_size
        height, width = (latent, latent) if isinstance(latent, int) else latent
        return height * self.factor, width * self.factor

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks, in place."""
        for network in self.networks:
            network.to(device)
        return self

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        text = {f"text_encoder{one}": each for one, each in zip(SUFFIXES, self.text.networks, strict=False)}
        return {"unet": self.unet, "vae": self.vae, **text}

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes every part in its own sub-folder, and `settings` to inflate.json; atomic.

        CheckpointError, with nothing written, where the folder holds other files.
        """
        folders.write(Path(folder), self._write)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What is kept of the model beside its parts, as JSON values."""

    def _write(self, folder: Path) -> None:
        for name, part in (("unet", self.unet), ("vae", self.vae), ("scheduler", self.noise)):
            part.save_pretrained(folder / name)
        self.text.save_pretrained(folder)
        (folder / folders.SETTINGS_FILE).write_text(json.dumps(self.settings, indent=2) + "\n")


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, an image model's or one with a temporal decoder; CheckpointError."""
    kind = folders.unet_kind(folder, AutoencoderKL, VideoVAE)
    return folders.load_parent(kind, folder)


def load_noise(folder: Path) -> DDIMScheduler:
    """The noise schedule of an image model's scheduler, of whatever class; CheckpointError where it is not SD's."""
    return noise_of(folders.read_json(folder / "scheduler_config.json"), folder)


def noise_of(config: Mapping[str, Any], origin: Path) -> DDIMScheduler:
    """The noise schedule of a scheduler's settings, as a DDIM sampler's; CheckpointError where it is not known.

    How steps are taken is as it says of Stable Diffusion's schedule, and as published of the others.
    """
    objective = objective_of(config, origin)
    if objective.schedule != "scaled_linear":
        return noise_for(objective)
    return noise_for(objective, {key: value for key, value in config.items() if key in _STEPS})


def noise_for(objective: DDPM, steps: Mapping[str, Any] = _PUBLISHED_STEPS) -> DDIMScheduler:
    """An objective's noise schedule, as the settings of a DDIM sampler that takes `steps` so.

    Of Stable Diffusion's schedule with zero terminal SNR, sampling begins at the last timestep, which other spacings
    leave out; the published steps of the cosine begin below it.
    """
    last = objective.schedule == "scaled_linear" and objective.zero_terminal_snr
    spacing = {"timestep_spacing": "trailing"} if last else {}
    schedule = _SETTINGS.get(objective.schedule) or {"trained_betas": objective.betas.tolist()}
    return DDIMScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS, prediction_type=objective.prediction,
        rescale_betas_zero_snr=objective.zero_terminal_snr, clip_sample=False, **schedule, **{**steps, **spacing},
    )  # fmt: skip


def objective_of(config: Mapping[str, Any], origin: Path | str) -> DDPM:
    """What a scheduler's settings say that a model was trained with; CheckpointError where that is not known."""
    prediction, zero = config.get("prediction_type", "epsilon"), bool(config.get("rescale_betas_zero_snr"))
    if prediction not in ("epsilon", "v_prediction"):
        raise CheckpointError(f"{origin} predicts {prediction}; only epsilon and v_prediction are known")
    try:
        return DDPM(prediction, zero, schedule=_schedule_of(config, origin))
    except ConfigError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _schedule_of(config: Mapping[str, Any], origin: Path | str) -> Schedule:
    betas = {name: config.get(name) for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
    if betas["num_train_timesteps"] == TRAIN_TIMESTEPS:
        if config.get("trained_betas") is not None:
            return _shifted_cosine_of(config["trained_betas"], origin)
        for schedule, settings in _SETTINGS.items():
            if settings.items() <= betas.items():
                return schedule
    raise CheckpointError(
        f"{origin} has betas {(*betas.values(),)}; only Stable Diffusion's schedule and squaredcos_cap_v2, both of "
        f"{TRAIN_TIMESTEPS} timesteps, are known"
    )


def _shifted_cosine_of(betas: Sequence[float], origin: Path | str) -> Schedule:
    ours = schedule_signal(False, "shifted_cosine")
    signal = torch.cumprod(1.0 - ours.new_tensor(betas), dim=0)
    if signal.shape != ours.shape or not torch.allclose(signal, ours, rtol=0.0, atol=_ROUNDING):
        raise CheckpointError(f"{origin} has trained_betas, of which only those of the shifted cosine are known")
    return "shifted_cosine"
