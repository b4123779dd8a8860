"""Which Stable Video Diffusion model is meant: the settings `model.*`."""

from __future__ import annotations

from dataclasses import dataclass

from inflate.families.svd import SVD
from inflate.families.svd_encoders import Encoders


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket"
    """`pocket`; a Stable Diffusion or Stable Video Diffusion folder in diffusers' layout, or its name on the Hub; or
    the original's .safetensors file"""
    image_encoder: str | None = None
    """folder of the CLIP image encoder, where `path` holds none"""
    norm_epsilon: float = 1e-5
    """group-norm epsilon of a newly inflated UNet's cross-attention blocks: with 1e-5, its parent's and the original's,
    it equals its parent exactly; with 1e-6, diffusers', the export is sampled exactly by diffusers' pipeline. The card
    states the difference"""

    def load(self, frames: int) -> SVD:
        """The model, inflated where it is an image model, for clips of so many frames; CheckpointError."""
        return SVD.load(self.path, self.image_encoder, self.norm_epsilon, frames=frames)

    def encoders(self) -> Encoders:
        """Its VAE and image encoder alone; CheckpointError."""
        return Encoders.load(self.path, self.image_encoder)
