"""Which model the training of I2VGen-XL starts from: the settings `model.*`."""

from __future__ import annotations

from dataclasses import dataclass

from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.models.single_file import Prediction


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket-t2v"
    """an image model, which is inflated, a text-to-video model, or a folder of I2VGen-XL: of its base stage for either
    stage, of a refiner for stage=refine"""
    image_encoder: str | None = None
    """for stage=base: folder of the CLIP image encoder, where `path` holds none"""
    image_model: str | None = None
    """for temporal layers alone, or of a text-to-video model: the Stable Diffusion that they go over, where it is
    another than their own or lies elsewhere"""
    tokenizer: str | None = None
    """folder of a tokenizer, for a single file, which holds none"""
    prediction: Prediction | None = None
    """what a Stable Diffusion 2 in a single file predicts, which it does not tell"""

    @property
    def places(self) -> tuple[str | None, ...]:
        """All that must be there."""
        return self.path, self.image_encoder, self.image_model, self.tokenizer

    def load(self) -> I2VGenXL:
        """The model of the base stage in a folder of I2VGen-XL; CheckpointError."""
        return I2VGenXL.load(self.path)

    def load_refiner(self) -> Refiner:
        """The refiner in a folder of one; CheckpointError."""
        return Refiner.load(self.path)
