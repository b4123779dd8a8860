"""What a run does to need less memory; importable without torch, so that the command line checks it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from inflate.errors import ConfigError


@dataclass
class Memory:
    """How a run saves memory of the GPU. Every measure leaves results as they are, but for those that say otherwise."""

    recompute: Literal["nothing", "units"] = "nothing"
    """What the backward pass computes again: nothing, or every residual block and every transformer, its temporal
    layers included, for about a third more time."""
    decode_rows: int = 0
    """Decode clips frame by frame, and the temporal layers by so many pixel rows at a time, such as 16; 0 = whole clips
    at once. Exact, for a tenth more arithmetic; training a decoder takes two thirds more."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.decode_rows < 0:
            raise ConfigError(f"memory.decode_rows={self.decode_rows}: must be 1 or more, or 0 to decode whole clips")
