"""Applies a run's measures that save memory to the networks that it trains."""

from __future__ import annotations

from diffusers import AutoencoderKL

from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE
from inflate.training.memory_settings import Memory


def save_memory(network: VideoUNet | VideoVAE, settings: Memory) -> None:
    """Let a network, whose trained parameters are chosen already, run as the settings say."""
    if settings.recompute == "units":
        network.enable_gradient_checkpointing()


def save_decoding(vae: AutoencoderKL, settings: Memory) -> None:
    """Let a VAE, trained or not, decode as the settings say; that of an image model decodes image by image."""
    if settings.decode_rows and isinstance(vae, VideoVAE):
        vae.stream(settings.decode_rows)
    elif settings.decode_rows:
        vae.enable_slicing()
