"""The frozen networks of Stable Video Diffusion: what they make of frames, and how they are loaded alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.families import svd_files
from inflate.families.svd_original import Original
from inflate.models import exchange, folders, temporal_layers
from inflate.models.single_file import is_single_image_model, load_vae
from inflate.models.vae import VideoVAE, decode_clips, encode_clips, encode_frames
from inflate.surgery import inflate_vae

FAMILY = "svd"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
        size = self.image_encoder.config.image_size
        small = (resize_antialiased(image, (size, size)) + 1.0) / 2.0  # (B, 3, size, size)
        mean, std = (small.new_tensor(value)[:, None, None] for value in (self.image_mean, self.image_std))
        pixels = ((small - mean) / std).to(self.image_encoder.dtype)
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
            inside = svd_files.encoder_folder(image_encoder) if image_encoder else folder / "image_encoder"
            vae, _ = inflate_vae(folders.load_parent(AutoencoderKL, folder / "vae"))
            statistics = image_statistics(inside, folder / "feature_extractor")
        else:
            refuse_another_encoder(path, image_encoder)
            inside, vae = folder / "image_encoder", load_video_vae(folder)
        return cls(vae, svd_files.load_image_encoder(inside), **statistics)

    @classmethod
    def _of_file(cls, file: Path, image_encoder: str | Path | None) -> Self:
        if is_single_image_model(file):
            folder = svd_files.encoder_folder(needed_encoder(file, image_encoder))
            vae, _ = inflate_vae(load_vae(file))
            return cls(vae, svd_files.load_image_encoder(folder), **image_statistics(folder))
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
    folder = svd_files.encoder_folder(image_encoder)
    return svd_files.load_image_encoder(folder), image_statistics(folder)


def refuse_another_encoder(path: str | Path, image_encoder: str | Path | None) -> None:
    """Raise CheckpointError where a video model is to have another image encoder than its own."""
    if image_encoder is not None:
        raise CheckpointError(f"{path} is a video model with an image encoder of its own; leave image_encoder out")


def image_statistics(*places: Path) -> dict[str, Any]:
    """The input mean and deviation that the first preprocessor_config.json found states; none: the class's own."""
    for folder in places:
        file = folder / "preprocessor_config.json"
        if file.is_file():
            stated = folders.read_json(file)
            return {name: tuple(stated[name]) for name in ("image_mean", "image_std") if name in stated}
    return {}


def resize_antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) at another size (h, w): a Gaussian blur as wide as the shrinking needs, then bicubic.

    The corners stay in place; each axis has its own standard deviation (shrinking - 1) / 2, in pixels, and a window
    of four of them: what the published model's image encoder was fed with.
    """
    for axis, target in zip((2, 3), size, strict=True):
        image = _blur(image, axis, image.shape[axis] / target)
    return F.interpolate(image, size=size, mode="bicubic", align_corners=True)  # (B, C, h, w)


def _blur(image: Tensor, axis: int, shrinking: float) -> Tensor:
    deviation = max((shrinking - 1.0) / 2.0, 0.001)
    radius = int(max(4.0 * deviation, 3)) // 2
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    weights = torch.exp(-(offsets**2) / (2.0 * deviation**2))
    kernel = (weights / weights.sum()).reshape((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
    padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    padded = F.pad(image, padding, mode="reflect").flatten(0, 1).unsqueeze(1)  # (B C, 1, H', W')
    return F.conv2d(padded, kernel).reshape(image.shape)  # (B, C, H, W)
