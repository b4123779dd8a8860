"""What a run does to need less memory; importable without torch, so that the command line checks it at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from inflate.errors import ConfigError
from inflate.layers.policy import POLICIES, WHOLE, Policy


@dataclass
class Memory:
    """How a run saves memory of the GPU. Every measure leaves results as they are, but for those that say otherwise."""

    recompute: Policy = "nothing"
    """What the backward pass computes again: nothing; feed_forward, the wide middle of the transformers' feed-forwards;
    units, every residual block and every transformer, its temporal layers included, for about a third more time;
    all_but_attention, units of which attention's outputs are kept, for less time; nested, units whose transformers are
    then recomputed block by block, for the most time and the least memory."""
    recompute_in: dict[str, str] = field(default_factory=dict)
    """Another choice for some blocks, by their names or patterns of them, the last that fits:
    {up_blocks.3: nested, "down_blocks.*": nothing}."""
    feed_forward_parts: int = 1
    """Parts in which the feed-forwards of transformers run, over the tokens, each computed again in the backward pass:
    their wide middle is there for one part at a time. 1: all at once."""
    offload: bool = False
    """What units keep for their recomputation rests in pinned memory of the CPU and comes back a unit ahead, while the
    GPU computes. Without a GPU nothing is gained."""
    encode_frames: int = 0
    """Most frames that the VAE encodes at once, in steps, held-out losses, previews and `inflate data cache`; 0 = all
    frames of a clip. Exact: it sees frames one by one. 1 needs least memory; a large frame fills a GPU by itself."""
    decode_rows: int = 0
    """Decode clips frame by frame, and the temporal layers by so many pixel rows at a time, such as 16; 0 = whole clips
    at once. Exact, for a tenth more arithmetic; training a decoder takes two thirds more."""
    decode_bf16: bool = False
    """Decode previews in bfloat16 by autocast, in about half the memory. It rounds what is shown, and nothing else."""
    base: Literal["as_loaded", "bf16", "int8", "nf4"] = "as_loaded"
    """How the weights of linear layers and convolutions that do not learn are kept: as loaded, or, rounded, in 16, 8 or
    4.25 bits each. They are read layer by layer, twice per step, which takes time; held-out losses and previews are of
    the rounded ones, the export of those as loaded, which the CPU keeps."""

    def __post_init__(self) -> None:
        """Refuse what cannot be done."""
        for pattern, policy in self.recompute_in.items():
            if policy not in POLICIES:
                raise ConfigError(f"memory.recompute_in: {pattern}: {policy} is none of {', '.join(POLICIES)}")
        if self.feed_forward_parts < 1:
            raise ConfigError(f"memory.feed_forward_parts={self.feed_forward_parts}: at least 1, which divides nothing")
        if self.offload and not {self.recompute, *self.recompute_in.values()} & {*WHOLE}:
            raise ConfigError(
                "memory.offload=true moves what recomputed units keep, and none is recomputed: set "
                "memory.recompute=units, all_but_attention or nested"
            )
        if self.encode_frames < 0:
            raise ConfigError(
                f"memory.encode_frames={self.encode_frames}: a number of frames, or 0 for all frames of a clip at once"
            )
        if self.decode_rows < 0:
            raise ConfigError(f"memory.decode_rows={self.decode_rows}: must be 1 or more, or 0 to decode whole clips")
