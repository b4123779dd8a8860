"""Stable Video Diffusion without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel

from inflate.errors import CheckpointError
from inflate.families import svd_files
from inflate.families.svd import FAMILY, SVD
from inflate.models import exchange, folders, temporal_layers
from inflate.models.unet import TemporalSpec


def outline(path: str | Path, image_encoder: str | Path | None = None, frames: int = 14) -> SVD:
    """What `SVD.load` loads from a folder or by a published name, on the meta device; no weights are read.

    CheckpointError for a single file, and where a configuration is missing.
    """
    if str(path).endswith(folders.SAFETENSORS):
        raise CheckpointError(f"{path} holds no configurations: plan with the folder of a model of the same shape")
    folder = folders.outline(path)
    own = folder / folders.SETTINGS_FILE
    if temporal_layers.are_in(folder):
        parent = temporal_layers.image_model_of(own, FAMILY)
        return outline(parent, temporal_layers.source(own, "image_encoder", image_encoder), frames)
    settings = folders.read_json(own) if own.is_file() else {}
    encoder = folders.outline(image_encoder) if image_encoder else folder
    inside = encoder / "image_encoder" if (encoder / "image_encoder").is_dir() else encoder
    vision = svd_files.outline_image_encoder(inside)
    if svd_files.is_image_model(folder):
        vae = svd_files.build_vae(exchange.with_defaults(AutoencoderKL, folder / "vae"))
        config = exchange.with_defaults(UNet2DConditionModel, folder / "unet")
        unet = exchange.build_unet({**config, "in_channels": 2 * vae.config.latent_channels}, TemporalSpec())
        return SVD(unet, vae, vision, frames=frames, decode_chunk=frames)
    unet = svd_files.outline_unet(folder / "unet", settings.get("unet"))
    stated = settings or folders.read_json(folder / "unet" / "config.json")
    chunk = stated.get("decode_chunk", stated.get("num_frames", frames))
    vae = svd_files.outline_vae(folder / "vae", settings.get("vae"))
    return SVD(unet, vae, vision, frames=frames, decode_chunk=chunk)
