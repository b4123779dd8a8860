"""Applies a run's measures that save memory to the networks that it trains."""

from __future__ import annotations

from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE
from inflate.training.memory_settings import Memory


def save_memory(network: VideoUNet | VideoVAE, settings: Memory) -> None:
    """Let a network, whose trained parameters are chosen already, run as the settings say."""
    if settings.recompute == "units":
        network.enable_gradient_checkpointing()
