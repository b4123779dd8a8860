"""Stable Video Diffusion without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPVisionModelWithProjection

from inflate.families import svd_files
from inflate.families.svd import FAMILY, SVD
from inflate.families.svd_encoders import needed_encoder
from inflate.families.svd_original import Original
from inflate.models import exchange, folders, single_file, temporal_layers
from inflate.models.image_encoders import outline_image_encoder
from inflate.models.unet import TemporalSpec


def outline(path: str | Path, image_encoder: str | Path | None = None, frames: int = 14) -> SVD:
    """What `SVD.load` loads from a folder, by a published name, or from a file, on the meta device.

    No weights are read. CheckpointError where a configuration is missing, or a file is not whole.
    """
    if str(path).endswith(folders.SAFETENSORS):
        return _of_file(Path(path).expanduser(), image_encoder, frames)
    folder = folders.outline(path)
    own = folder / folders.SETTINGS_FILE
    if temporal_layers.are_in(folder):
        parent = temporal_layers.image_model_of(own, FAMILY)
        return outline(parent, temporal_layers.source(own, "image_encoder", image_encoder), frames)
    settings = folders.read_json(own) if own.is_file() else {}
    vision = _vision(image_encoder or folder)
    if svd_files.is_image_model(folder):
        vae = exchange.with_defaults(AutoencoderKL, folder / "vae")
        return _inflated(exchange.with_defaults(UNet2DConditionModel, folder / "unet"), vae, vision, frames)
    unet = svd_files.outline_unet(folder / "unet", settings.get("unet"))
    stated = settings or folders.read_json(folder / "unet" / "config.json")
    chunk = stated.get("decode_chunk", stated.get("num_frames", frames))
    vae = svd_files.outline_vae(folder / "vae", settings.get("vae"))
    return SVD(unet, vae, vision, frames=frames, decode_chunk=chunk)


def _of_file(file: Path, image_encoder: str | Path | None, frames: int) -> SVD:
    if single_file.is_single_image_model(file):
        image = single_file.load_image_model(file, "epsilon", exchange.read_headers)  # what it predicts costs nothing
        vision = _vision(needed_encoder(file, image_encoder))
        return _inflated(folders.plain(image.unet.config), folders.plain(image.vae.config), vision, frames)
    original, told = Original.read(file, exchange.read_headers), exchange.told_by(file)
    vision = _vision(image_encoder) if image_encoder else original.load_image_encoder().float()
    length = told.get("frames", frames)
    chunk = told.get("decode_chunk", length)
    return SVD(original.load_unet().float(), original.load_vae().float(), vision, frames=length, decode_chunk=chunk)


def _vision(path: str | Path) -> CLIPVisionModelWithProjection:
    folder = folders.outline(path)
    inside = folder / "image_encoder"
    return outline_image_encoder(inside if inside.is_dir() else folder)


def _inflated(
    unet: Mapping[str, Any], vae: Mapping[str, Any], vision: CLIPVisionModelWithProjection, frames: int
) -> SVD:
    """The shape of an image model of these configurations, inflated."""
    video = svd_files.build_vae(vae)
    config = {**unet, "in_channels": 2 * video.config.latent_channels}
    return SVD(exchange.build_unet(config, TemporalSpec()), video, vision, frames=frames, decode_chunk=frames)
