"""What models share that are loaded from exports of ours alone: how they are read, and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL

from inflate.models import folders, temporal_layers
from inflate.models.outlines import outline_text, outline_unet, outline_vae
from inflate.models.stable_diffusion import Encoding, TextToVideo, load_noise, load_vae
from inflate.models.text_encoders import ZEROS, TextEncoders
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet, load_strictly


@dataclass
class ExportedEncoders(Encoding):
    """The frozen networks of such a model, without a UNet; they have the names that they have in the model."""

    clips: ClassVar[type[TrainedClips]]

    vae: AutoencoderKL
    text: TextEncoders

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Those of an export of ours; CheckpointError where a part is missing or not whole."""
        folder = folders.resolve(path)
        temporal_layers.entry(folder / folders.SETTINGS_FILE, cls.clips.family, "clips")
        return cls(**cls._loaded(folder))

    @classmethod
    def outline(cls, folder: Path) -> Self:
        """Those of a folder, on the meta device; no weights are read."""
        return cls(**cls._outlined(folder))

    @classmethod
    def _loaded(cls, folder: Path) -> dict[str, Any]:
        return {"vae": load_vae(folder / "vae"), "text": TextEncoders.load(folder)}

    @classmethod
    def _outlined(cls, folder: Path) -> dict[str, Any]:
        return {"vae": outline_vae(folder / "vae"), "text": outline_text(folder)}


@dataclass
class ExportedModel(TextToVideo):
    """A model whose folders are exports of ours: its networks, its noise schedule, and what its clips were."""

    encoders: ClassVar[type[ExportedEncoders]]

    further: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """further entries of inflate.json, which stay with the model"""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Loads an export of ours; CheckpointError, listing the tensors, where a part is missing or not whole."""
        folder = folders.resolve(path)
        file = folder / folders.SETTINGS_FILE
        clips, encoders = cls.encoders.clips.read(file), cls.encoders.load(folder)
        unet = load_strictly(VideoUNet.from_pretrained, folder / "unet", {"torch_dtype": torch.float32})
        noise = load_noise(folder / "scheduler")
        made = cls(unet=unet, noise=noise, clips=clips, **vars(encoders), **cls._remembered(file))
        made.further = {name: value for name, value in folders.read_json(file).items() if name not in made.settings}
        return made

    @classmethod
    def outline(cls, path: str | Path) -> Self:
        """What `load` loads, on the meta device, from configurations alone: what its training would cost.

        CheckpointError where a configuration is missing.
        """
        folder = folders.outline(path)
        clips, encoders = cls.encoders.clips.read(folder / folders.SETTINGS_FILE), cls.encoders.outline(folder)
        unet, noise = outline_unet(folder / "unet"), load_noise(folder / "scheduler")
        return cls(unet=unet, noise=noise, clips=clips, **vars(encoders))

    @classmethod
    def _remembered(cls, file: Path) -> Mapping[str, Any]:
        """What a settings file tells beside the clips that is an argument of the model."""
        return {}

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept of the model beside its parts, as JSON values."""
        return {
            "family": self.clips.family,
            "clips": asdict(self.clips),
            "objective": asdict(self.objective),
            ZEROS: self.text.zeros_for_empty,
            **self.further,
        }
