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
    encode_frames: int = 0
    """Most frames that the VAE encodes at once, in steps, held-out losses, previews and `inflate data cache`; 0 = all
    frames of a clip. Exact: it sees frames one by one. 1 needs least memory; a large frame fills a GPU by itself."""

    def __post_init__(self) -> None:
        if self.encode_frames < 0:
            raise ConfigError(
                f"memory.encode_frames={self.encode_frames}: a number of frames, or 0 for all frames of a clip at once"
            )
