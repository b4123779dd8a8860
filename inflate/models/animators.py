"""What models of Stable Diffusion that animate an image by a prompt share: an image encoder beside the other parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.models import image_encoders, temporal_layers
from inflate.models.exports import ExportedEncoders, ExportedModel
from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD
from inflate.models.stable_diffusion import Encoding


class ImageEncoding(Encoding, ABC):
    """What a model with an autoencoder, text encoders and an image encoder makes of frames and prompts."""

    image_encoder: CLIPVisionModelWithProjection
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]

    @abstractmethod
    def embed_image(self, images: Tensor) -> Tensor:
        """What the image encoder tells of images (B, 3, H, W) in [-1, 1]: (B, P, E)."""


@dataclass
class AnimatorEncoders(ExportedEncoders):
    """The frozen networks of such a model, without a UNet."""

    image_encoder: CLIPVisionModelWithProjection
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""

    @classmethod
    def _loaded(cls, folder: Path) -> dict[str, Any]:
        encoder = image_encoders.load_image_encoder(folder / "image_encoder")
        statistics = image_encoders.image_statistics(folder / "feature_extractor")
        return {**super()._loaded(folder), "image_encoder": encoder, **statistics}

    @classmethod
    def _outlined(cls, folder: Path) -> dict[str, Any]:
        encoder = image_encoders.outline_image_encoder(folder / "image_encoder")
        return {**super()._outlined(folder), "image_encoder": encoder}

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Of the image encoder's inputs, as a model takes them."""
        return {"image_mean": self.image_mean, "image_std": self.image_std}


@dataclass
class Animator(ExportedModel):
    """A model that animates an image by a prompt."""

    image_encoder: CLIPVisionModelWithProjection
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.config.addition_embed_type is not None:
            raise CheckpointError(
                "the UNet adds a pooled text to its time embedding, as Stable Diffusion XL's does, which this family "
                "does not know: use Stable Diffusion 1 or 2"
            )
        if self.unet.spec.added_ids not in (0, 1):
            raise CheckpointError(f"the UNet is told {self.unet.spec.added_ids} numbers; the frame rate alone is known")

    @classmethod
    def _remembered(cls, file: Path) -> Mapping[str, Any]:
        objective = temporal_layers.entry(file, cls.encoders.clips.family, "objective")
        return {"base_scale": float(objective.get("base_scale", 1.0))}

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The UNet and the frozen networks."""
        return *super().networks, self.image_encoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {**super().parts, "image_encoder": self.image_encoder}

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        self.image_encoder.save_pretrained(folder / "image_encoder")
        processor = CLIPImageProcessorPil(image_mean=list(self.image_mean), image_std=list(self.image_std))
        processor.save_pretrained(folder / "feature_extractor")
