"""What models of Stable Diffusion that animate an image by a prompt share: an image encoder beside the other parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.models import folders, temporal_layers
from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD, image_statistics, load_image_encoder
from inflate.models.stable_diffusion import Encoding, TextToVideo, load_vae
from inflate.models.text_encoders import TextEncoders


@dataclass
class AnimatorEncoders(Encoding):
    """The frozen networks of such a model, without a UNet."""

    family: ClassVar[str]

    vae: AutoencoderKL
    text: TextEncoders
    image_encoder: CLIPVisionModelWithProjection
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Those of an export of ours; CheckpointError where a part is missing or not whole."""
        folder = folders.resolve(path)
        temporal_layers.entry(folder / folders.SETTINGS_FILE, cls.family, "clips")
        encoder = load_image_encoder(folder / "image_encoder")
        statistics = image_statistics(folder / "feature_extractor")
        return cls(load_vae(folder / "vae"), TextEncoders.load(folder), encoder, **statistics)

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Of the image encoder's inputs, as a model takes them."""
        return {"image_mean": self.image_mean, "image_std": self.image_std}


def base_scale_of(file: Path, family: str) -> float:
    """What an export's settings file says of `TextToVideo.base_scale`; errors of `temporal_layers.entry`."""
    return float(temporal_layers.entry(file, family, "objective").get("base_scale", 1.0))


@dataclass
class Animator(TextToVideo):
    """A model that animates an image by a prompt."""

    image_encoder: CLIPVisionModelWithProjection
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""
    further: dict[str, Any] = field(default_factory=dict)
    """further entries of inflate.json, which stay with the model"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.unet.config.addition_embed_type is not None:
            raise CheckpointError(
                "the UNet adds a pooled text to its time embedding, as Stable Diffusion XL's does, which this family "
                "does not know: use Stable Diffusion 1 or 2"
            )
        if self.unet.spec.added_ids not in (0, 1):
            raise CheckpointError(f"the UNet is told {self.unet.spec.added_ids} numbers; the frame rate alone is known")

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
