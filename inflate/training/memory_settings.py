"""What a run does to need less memory; importable without torch, so that the command line checks it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class Memory:
    """How a run saves memory of the GPU. Every measure leaves results as they are, but for those that say otherwise."""

    recompute: Literal["nothing", "units"] = "nothing"
    """What the backward pass computes again: nothing, or every residual block and every transformer, its temporal
    layers included, for about a third more time."""
    base: Literal["as_loaded", "bf16", "int8", "nf4"] = "as_loaded"
    """How the weights of linear layers and convolutions that do not learn are kept: as loaded, or, rounded, in 16, 8 or
    4.25 bits each. They are read layer by layer, twice per step, which takes time; held-out losses and previews are of
    the rounded ones, the export of those as loaded, which the CPU keeps."""
