"""Which Stable Video Diffusion model is meant: the settings `model.*`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inflate.families.svd import SVD
from inflate.families.svd_encoders import Encoders


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
    norm_epsilon: float = 1e-5
    """group-norm epsilon of a newly inflated UNet's cross-attention blocks: with 1e-5, its parent's and the original's,
    it equals its parent exactly; with 1e-6, diffusers', the export is sampled exactly by diffusers' pipeline. The card
    states the difference"""

    def load(self, frames: int) -> SVD:
        """The model, inflated where it is an image model, for clips of so many frames; CheckpointError."""
        return SVD.load(self.path, self.image_encoder, self.norm_epsilon, frames, self.prediction)

    def encoders(self) -> Encoders:
        """Its VAE and image encoder alone; CheckpointError."""
        return Encoders.load(self.path, self.image_encoder)
