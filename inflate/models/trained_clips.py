"""What the clips of a model's training were, which its export remembers and sampling repeats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from inflate.errors import CheckpointError, ConfigError
from inflate.models import temporal_layers


@dataclass(frozen=True)
class TrainedClips:
    """What all families remember of clips; each has a class of its own, with what it alone is told."""

    family: ClassVar[str]

    frames: int = 16
    """length"""
    fps: float = 8.0
    """frames per second"""
    height: int | None = None
    """pixels; none: the size that the UNet's configuration names"""
    width: int | None = None
    """pixels"""

    def __post_init__(self) -> None:
        if self.frames < 1 or not 0 < self.fps < math.inf:
            raise ConfigError(f"clips: frames ({self.frames}) and fps ({self.fps:g}) must be positive")

    @classmethod
    def read(cls, file: Path) -> Self:
        """What an export's settings file says of its clips.

        CheckpointError where it is missing, not whole or another family's.
        """
        try:
            return cls(**temporal_layers.entry(file, cls.family, "clips"))
        except TypeError as error:
            raise CheckpointError(f"{file} is not whole: {error}; export the model again") from error
