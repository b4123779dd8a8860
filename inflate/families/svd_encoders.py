"""The frozen networks of Stable Video Diffusion: what they make of frames, and how they are loaded alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.families import svd_files
from inflate.families.svd_original import Original
from inflate.models import exchange, folders, temporal_layers
from inflate.models.image_encoders import (
    CLIP_MEAN,
    CLIP_STD,
    encoder_folder,
    image_statistics,
    load_image_encoder,
    shown,
)
from inflate.models.single_file import is_single_image_model, load_vae
from inflate.models.vae import VideoVAE, decode_clips, encode_clips, encode_frames
from inflate.surgery import inflate_vae

FAMILY = "svd"


class Encoding:
    """What a model with a VAE and an image encoder makes of frames."""

    vae: VideoVAE
    image_encoder: CLIPVisionModelWithProjection
    decode_chunk: int
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w), the posterior's mode, of clips (B, F, 3, H, W) in [-1, 1]; no gradient."""
        return encode_clips(self.vae, pixels, self.decode_chunk)

    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, F, 3, H, W), about in [-1, 1], of scaled latents (B, F, C, h, w), chunk by chunk of frames."""
        return decode_clips(self.vae, latents, self.decode_chunk)

    def image_latent(self, first_frame: Tensor, aug: Tensor, noise: Tensor) -> Tensor:
        """The unscaled latent (B, C, h, w) of first frames (B, 3, H, W), noise of level `aug` (B,) on their pixels."""
        return encode_frames(self.vae, first_frame + aug[:, None, None, None] * noise)

    @torch.no_grad()
    def embed(self, image: Tensor) -> Tensor:
        """CLIP's projected embedding (B, 1, D) of images (B, 3, H, W) in [-1, 1], squashed to the encoder's square."""
        pixels = shown(self.image_encoder, image, self.image_mean, self.image_std)
        embedding: Tensor = self.image_encoder(pixels).image_embeds
        return embedding.unsqueeze(1)  # (B, 1, D)


@dataclass
class Encoders(Encoding):
    """The frozen networks without a UNet."""

    vae: VideoVAE
    image_encoder: CLIPVisionModelWithProjection
    decode_chunk: int = 14
    """frames encoded or decoded together"""
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""

    @classmethod
    def load(
        cls, path: str | Path, image_encoder: str | Path | None = None, image_model: str | Path | None = None
    ) -> Self:
        """The encoders of what `SVD.load` loads, with the weights that it gives them; CheckpointError as there."""
        folder = folders.place_of(path)
        if image_model is not None or temporal_layers.are_in(folder):
            return cls._over_image_model(folder, image_encoder, image_model)
        if folder.suffix == folders.SAFETENSORS:
            return cls._of_file(folder, image_encoder)
        statistics = image_statistics(folder / "feature_extractor")
        if svd_files.is_image_model(folder):
            inside = encoder_folder(image_encoder) if image_encoder else folder / "image_encoder"
            vae, _ = inflate_vae(folders.load_parent(AutoencoderKL, folder / "vae"))
            statistics = image_statistics(inside, folder / "feature_extractor")
        else:
            refuse_another_encoder(path, image_encoder)
            inside, vae = folder / "image_encoder", load_video_vae(folder)
        return cls(vae, load_image_encoder(inside), **statistics)

    @classmethod
    def _of_file(cls, file: Path, image_encoder: str | Path | None) -> Self:
        if is_single_image_model(file):
            folder = encoder_folder(needed_encoder(file, image_encoder))
            vae, _ = inflate_vae(load_vae(file))
            return cls(vae, load_image_encoder(folder), **image_statistics(folder))
        original = Original.read(file)
        encoder, statistics = encoder_of(original, image_encoder)
        return cls(original.load_vae(), encoder, **statistics)

    @classmethod
    def _over_image_model(cls, folder: Path, image_encoder: str | Path | None, image_model: str | Path | None) -> Self:
        """The encoders below temporal layers alone, with the decoder's own."""
        temporal_layers.refuse_others(folder)
        file = folder / folders.SETTINGS_FILE
        parent = image_model or temporal_layers.image_model_of(file, FAMILY)
        encoders = cls.load(parent, temporal_layers.source(file, "image_encoder", image_encoder))
        temporal_layers.adopt({"vae": encoders.vae}, temporal_layers.read(folder, "vae."), folder)
        return encoders


def load_video_vae(folder: Path) -> VideoVAE:
    """The autoencoder of diffusers' Stable Video Diffusion folder, or of an export of ours; CheckpointError."""
    own, extra = folder / folders.SETTINGS_FILE, folder / folders.TENSORS_FILE
    settings = folders.read_json(own) if own.is_file() else {}
    overrides = exchange.read_tensors(extra) if extra.is_file() else {}
    return svd_files.load_diffusers_vae(folder / "vae", settings.get("vae"), overrides)


def needed_encoder(path: str | Path, image_encoder: str | Path | None) -> str | Path:
    """The image encoder that goes with an image model's single file; CheckpointError where none is named."""
    if image_encoder is None:
        raise CheckpointError(f"{path} holds no image encoder: give its folder as image_encoder")
    return image_encoder


def encoder_of(
    original: Original, image_encoder: str | Path | None
) -> tuple[CLIPVisionModelWithProjection, dict[str, Any]]:
    """The image encoder that is named, else the file's own, and what is stated of its inputs' mean and deviation.

    CheckpointError where there is none, or not a whole one.
    """
    if image_encoder is None:
        return original.load_image_encoder(), {}
    folder = encoder_folder(image_encoder)
    return load_image_encoder(folder), image_statistics(folder)


def refuse_another_encoder(path: str | Path, image_encoder: str | Path | None) -> None:
    """Raise CheckpointError where a video model is to have another image encoder than its own."""
    if image_encoder is not None:
        raise CheckpointError(f"{path} is a video model with an image encoder of its own; leave image_encoder out")
