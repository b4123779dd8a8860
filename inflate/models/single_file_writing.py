"""Stable Diffusion 1, 2 and XL into a single file, without text encoders, where reading it gives the same model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models import folders
from inflate.models.exchange import detached, save_file_telling
from inflate.models.original_names import UNetLayout, as_convolution, unet_names, vae_names
from inflate.models.single_file import UNET, VAE, Generation, ImageModel, image_model_of, told_prediction

SCHEDULER = {
    "prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None, "num_train_timesteps": 1000
}  # fmt: skip
"""What a scheduler's settings are where its file leaves them out."""
_NO_MATTER = ("sample_size", "upcast_attention", "force_upcast", "transformer_layers_per_block")
"""Settings that change no result or, of the last, are told by the tensors where a level has transformers."""


def save_image_model(
    unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: Mapping[str, Any], file: Path
) -> Generation:
    """Writes a .safetensors file in the original names, atomic; returns what is read from it.

    Its header tells the size of its latents. CheckpointError, with nothing written, where a reader would take it for
    another model, naming the settings.
    """
    schedule = {**SCHEDULER, **scheduler}
    tensors = {**image_tensors(unet, vae), **_marks(schedule)}
    read = image_model_of(tensors, file, schedule["prediction_type"])
    wrong = untold(unet, vae, schedule, read)
    if told_prediction(tensors, read.generation) not in (None, schedule["prediction_type"]):
        wrong.append(f"scheduler prediction_type {schedule['prediction_type']}")
    if wrong:
        raise CheckpointError(f"a single file of {read.generation} does not tell: {'; '.join(wrong)}")
    save_file_telling(tensors, file, {"sample_size": unet.config.sample_size})
    return read.generation


def untold(unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: Mapping[str, Any], read: ImageModel) -> list[str]:
    """The settings of models that are others in what was `read` from their tensors, with their values."""
    pairs = {
        "unet": (unet.config, read.unet.config),
        "vae": (vae.config, read.vae.config),
        "scheduler": (scheduler, {**SCHEDULER, **read.scheduler}),
    }
    return [setting for part, (own, theirs) in pairs.items() for setting in differing(part, own, theirs)]


def image_tensors(unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors of both networks as latent diffusion's own files have them; they share the models' memory."""
    names = unet_names(detached(unet), UNetLayout.of(unet.config))
    return {**{f"{UNET}{names[key]}": tensor for key, tensor in detached(unet).items()}, **vae_tensors(vae)}


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The tensors of an autoencoder, likewise."""
    names = vae_names(detached(vae), len(vae.config.block_out_channels))
    return {f"{VAE}{names[key]}": as_convolution(names[key], tensor) for key, tensor in detached(vae).items()}


def _marks(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors without values by whose names community models say how they predict."""
    said = {
        "v_pred": scheduler["prediction_type"] == "v_prediction",
        "ztsnr": bool(scheduler["rescale_betas_zero_snr"]),
    }
    return {name: torch.zeros(0) for name, is_so in said.items() if is_so}


def differing(part: str, own: Mapping[str, Any], read: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a network that are others in what was read, with their values, but for those of no matter."""
    for name, value in folders.plain(read).items():
        if name not in _NO_MATTER and _uniform(own.get(name)) != _uniform(value):
            yield f"{part} {name} {own.get(name)}"


def _uniform(value: Any) -> Any:
    """A setting per level as a tuple or, where all are alike, as the one value that it may be written as."""
    if not isinstance(value, list | tuple):
        return value
    return value[0] if len(set(value)) == 1 else tuple(value)
