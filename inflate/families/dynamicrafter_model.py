"""Which model DynamiCrafter's training starts from: the settings `model.*`."""

from __future__ import annotations

from dataclasses import dataclass

from inflate.families.dynamicrafter import DynamiCrafter, Encoders
from inflate.models import image_stream
from inflate.models.image_encoders import encoder_folder, image_statistics, load_image_encoder
from inflate.models.single_file import Prediction
from inflate.models.stable_diffusion import Encoding


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket"
    """stage=context: an image model, or a text-to-video model; stage=adapt: a text-to-video model; stage=joint and
    finetune: a DynamiCrafter folder, such as the export of the stage before"""
    image_stream: str | None = None
    """for stage=adapt: the export of a run of stage=context"""
    image_encoder: str | None = None
    """for stage=context and adapt: folder of the CLIP image encoder, where `path` holds none"""
    image_model: str | None = None
    """for stage=context and adapt: the Stable Diffusion that temporal layers alone go over, where it is another than
    the one they name or lies elsewhere"""
    tokenizer: str | None = None
    """for stage=context and adapt: folder of a tokenizer, for a single file, which holds none"""
    prediction: Prediction | None = None
    """for stage=context and adapt: what a Stable Diffusion 2 in a single file predicts, which it does not tell"""

    @property
    def places(self) -> tuple[str | None, ...]:
        """All models that must be there; CheckpointError where the image stream, which is none, is not."""
        if self.image_stream is not None:
            image_stream.check_place(self.image_stream)
        return self.path, self.image_encoder, self.image_model, self.tokenizer

    def load(self) -> DynamiCrafter:
        """The model, of a DynamiCrafter folder; CheckpointError."""
        return DynamiCrafter.load(self.path)

    def encoders(self, text: Encoding) -> Encoders:
        """The frozen networks of a text-to-video model beside its image encoder; CheckpointError."""
        folder = encoder_folder(self.image_encoder or self.path)
        statistics = image_statistics(folder, folder.parent / "feature_extractor")
        return Encoders(text.vae, text.text, load_image_encoder(folder), **statistics)
