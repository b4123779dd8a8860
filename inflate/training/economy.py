"""Applies a run's measures that save memory to the networks that it trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import AutoencoderKL

from inflate.adapters.bases import on_cpu
from inflate.errors import ConfigError
from inflate.layers import quantised
from inflate.layers.quantised import Kind
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE
from inflate.training.memory import bytes_of
from inflate.training.memory_settings import Memory

logger = logging.getLogger(__name__)


def save_memory(network: VideoUNet | VideoVAE, settings: Memory) -> None:
    """Let a network, whose trained parameters are chosen already, run as the settings say; ConfigError."""
    if settings.base != "as_loaded":
        _store(network, settings.base)
    if settings.recompute == "units":
        network.enable_gradient_checkpointing()


def save_decoding(vae: AutoencoderKL, settings: Memory) -> None:
    """Let a VAE, trained or not, decode as the settings say; that of an image model decodes image by image."""
    if settings.decode_rows and isinstance(vae, VideoVAE):
        vae.stream(settings.decode_rows)
    elif settings.decode_rows:
        vae.enable_slicing()


def _store(network: VideoUNet | VideoVAE, kind: Kind) -> None:
    before = bytes_of(network.parameters())
    layers = quantised.store(network, kind)
    if not layers:
        raise ConfigError(
            f"memory.base={kind} is for weights that stay as they are, and every layer learns: train an adapter "
            "(adapters/temporal_lora.yaml) or the temporal layers alone, or set memory.base=as_loaded"
        )
    after = bytes_of([*network.parameters(), *network.buffers()])
    logger.info(
        "memory.base=%s: %d layers stay as they are; all weights take %.3f GB instead of %.3f. What is measured and "
        "previewed is computed by these, what is exported by the weights as loaded",
        kind, len(layers), after / 1e9, before / 1e9,
    )  # fmt: skip


@contextmanager
def as_loaded(unet: VideoUNet) -> Iterator[None]:
    """A UNet with its stored weights as they were loaded, meanwhile; it is then on the CPU, where those are."""
    if quantised.kind_of(unet) is None:
        yield
        return
    with quantised.as_loaded(unet), on_cpu(unet):
        yield
