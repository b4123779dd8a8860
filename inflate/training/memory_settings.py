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
    decode_rows: int = 0
    """Decode clips frame by frame, and the temporal layers by so many pixel rows at a time, such as 16; 0 = whole clips
    at once. Exact, for a tenth more arithmetic; training a decoder takes three quarters more."""
    base: Literal["as_loaded", "bf16", "int8", "nf4"] = "as_loaded"
    """How the weights of linear layers and convolutions that do not learn are kept: as loaded, or, rounded, in 16, 8 or
    4.25 bits each. They are read layer by layer, twice per step, which takes time; held-out losses and previews are of
    the rounded ones, the export of those as loaded, which the CPU keeps."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        if self.encode_frames < 0:
            raise ConfigError(
                f"memory.encode_frames={self.encode_frames}: a number of frames, or 0 for all frames of a clip at once"
            )
        if self.decode_rows < 0:
            raise ConfigError(f"memory.decode_rows={self.decode_rows}: must be 1 or more, or 0 to decode whole clips")
