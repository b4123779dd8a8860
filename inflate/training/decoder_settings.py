"""The settings of decoder fine-tuning; importable without torch, so that the command line checks them at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inflate.errors import ConfigError


@dataclass
class Decoder:
    """How a decoder is fine-tuned."""

    temporal: bool = True
    """Decode clips with the temporal layers; false = frame by frame, the control."""
    trainable: Literal["temporal", "decoder"] = "temporal"
    """What is trained: the temporal layers, or the whole decoder."""
    lr: float | None = None
    """Learning rate of the decoder; null = training.lr."""
    l1: float = 1.0
    """Weight of the mean absolute pixel error, in pixels of [-1, 1]."""
    l2: float = 0.0
    """Weight of the mean squared pixel error."""
    perceptual: float = 0.25
    """Weight of the perceptual distance, mean over frames; 0 = off."""
    vgg_weights: Path | None = None
    """File of ImageNet VGG16 weights for LPIPS; null = distance of the VAE encoder's features instead."""
    lpips_heads: Path | None = None
    """File of LPIPS's linear heads for VGG16."""
    adversarial: float = 0.5
    """Weight of the adversarial loss, after the adaptive weight; 0 = no discriminator."""
    adversarial_start: int = 1000
    """First step at which the decoder is trained against the discriminator."""
    discriminator_lead: int = 0
    """Steps that the discriminator trains before that."""
    adaptive_bounds: tuple[float, float] = (0.0, 1e4)
    """Least and greatest adaptive weight, the ratio of reconstruction to adversarial gradient at the last 2D layer."""
    image_adversarial: bool = False
    """Add a discriminator of single frames, which shares the weight equally with that of clips; for comparison."""
    discriminator_lr: float | None = None
    """Learning rate of the discriminators; null = training.lr."""
    discriminator_channels: int = 64
    """Channels of the discriminators' first convolution, a multiple of 8."""
    discriminator_layers: int = 3
    """Convolutions with a norm in each discriminator; all but the last halve height and width."""
    discriminator_norm: Literal["group", "spectral"] = "group"
    """Normalisation of the discriminators."""
    temporal_stride: Literal[1, 2] = 2
    """How far the video discriminator thins frames out."""
    latent_noise: tuple[float, float] = (0.0, 0.3)
    """Range of the noise's standard deviation, drawn per clip, in scaled latents (their own deviation is about 1)."""
    clean_share: float = 0.25
    """Share of clips decoded from clean latents."""
    held_out_noise: float = 0.15
    """Standard deviation of the fixed noise on the held-out clips' noisy latents."""
    held_out_clips: int = 32
    """Held-out clips that the decoder is measured on."""
    train_clips: int = 8
    """Training clips that its PSNR is measured on as well, to tell overfitting; 0 = none."""
    previews: int = 4
    """Held-out clips shown in previews."""


def check(settings: Decoder) -> None:
    """Raise ConfigError naming the first setting that is out of range or contradicts another."""
    if not settings.temporal and settings.trainable == "temporal":
        raise ConfigError("decoder.temporal=false leaves no temporal layer to train: set decoder.trainable=decoder")
    for name in ("l1", "l2", "perceptual", "adversarial", "held_out_noise", "discriminator_lead", "adversarial_start"):
        if not getattr(settings, name) >= 0:
            raise ConfigError(f"decoder.{name}={getattr(settings, name)}: must be 0 or more")
    if settings.held_out_clips < 1:
        raise ConfigError(f"decoder.held_out_clips={settings.held_out_clips}: must be 1 or more")
    if settings.train_clips < 0:
        raise ConfigError(f"decoder.train_clips={settings.train_clips}: must be 0 or more")
    if settings.image_adversarial and not settings.adversarial:
        raise ConfigError("decoder.image_adversarial=true has no effect while decoder.adversarial is 0: raise it")
    if settings.vgg_weights and not settings.perceptual:
        raise ConfigError("decoder.vgg_weights is given while decoder.perceptual is 0: raise it, or leave the file out")
    if settings.l1 + settings.l2 + settings.perceptual <= 0:
        raise ConfigError("decoder.l1, decoder.l2 and decoder.perceptual are all 0: nothing asks for the true frames")
    if not 0 <= settings.clean_share <= 1:
        raise ConfigError(f"decoder.clean_share={settings.clean_share}: must lie in [0, 1]")
    for name in ("latent_noise", "adaptive_bounds"):
        low, high = getattr(settings, name)
        if not 0 <= low <= high:
            raise ConfigError(f"decoder.{name}={low, high}: must be two numbers, 0 <= low <= high")
    if settings.discriminator_lead > settings.adversarial_start:
        raise ConfigError(
            f"decoder.discriminator_lead={settings.discriminator_lead} is greater than "
            f"decoder.adversarial_start={settings.adversarial_start}: it would have to start before the run"
        )
