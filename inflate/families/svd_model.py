"""Which Stable Video Diffusion model is meant: the settings `model.*`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inflate.errors import CheckpointError, ConfigError
from inflate.families.svd import SVD, is_image_model
from inflate.families.svd_encoders import Encoders
from inflate.models import folders


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket"
    """`pocket`; a Stable Diffusion or Stable Video Diffusion folder in diffusers' layout, or its name on the Hub; or
    a .safetensors file: a Stable Diffusion 1 or 2 as communities share them, or the original's of the video model"""
    prediction: Literal["epsilon", "v_prediction"] | None = None
    """what a Stable Diffusion 2 in a single file predicts, which it does not tell: the 768-pixel ones v_prediction"""
    image_encoder: str | None = None
    """folder of the CLIP image encoder, where `path` holds none"""
    image_model: str | None = None
    """for temporal layers alone: the Stable Diffusion that they go over, where it is another than the one they name or
    lies elsewhere"""
    frames: int | None = None
    """clip length of a video model in the original's .safetensors file, where that does not tell it: 14 of SVD, which
    is assumed, 25 of SVD-XT"""
    norm_epsilon: float = 1e-5
    """group-norm epsilon of a newly inflated UNet's cross-attention blocks: with 1e-5, its parent's and the original's,
    it equals its parent exactly; with 1e-6, diffusers', the export is sampled exactly by diffusers' pipeline. The card
    states the difference"""

    def __post_init__(self) -> None:
        """A clip has frames."""
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"model.frames={self.frames}: must be at least 1, or null where the file tells it")

    def load(self, frames: int) -> SVD:
        """The model, inflated where it is an image model, for clips of so many frames; CheckpointError."""
        is_file = self.path.endswith(folders.SAFETENSORS)
        is_original = is_file and not is_image_model(Path(self.path).expanduser())
        if self.frames is not None and not is_original:
            raise CheckpointError(
                f"model.frames is for a video model in the original's {folders.SAFETENSORS} file, which {self.path} is "
                "not: leave it out"
            )
        length = self.frames if is_original else frames
        return SVD.load(self.path, self.image_encoder, self.norm_epsilon, length, self.prediction, self.image_model)

    def encoders(self) -> Encoders:
        """Its VAE and image encoder alone; CheckpointError."""
        return Encoders.load(self.path, self.image_encoder, self.image_model)
