"""Key map of ModelScope's video UNets: ours <-> diffusers' `UNet3DConditionModel`.

Our names are the hub: the map goes from our keys to the other naming and is inverted for loading. The original (VGen)
names are those of `inflate.models.original_video_names`.
"""

from __future__ import annotations

from collections.abc import Iterable

from inflate.models.exchange import Names
from inflate.models.original_names import substituted

_TO_DIFFUSERS = (
    (r"^conv_in\.temporal\.", "transformer_in."),
    (r"\.resnets\.(\d+)\.temporal\.", r".temp_convs.\1."),
    (r"\.attentions\.(\d+)\.temporal\.", r".temp_attentions.\1."),
)
TOKENS_PREFIX = "context_embedding."
"""The layers that make context tokens of an image embedding; they stand beside the UNet."""


def unet_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our UNet keys to UNet3DConditionModel's."""
    return {key: substituted(key, _TO_DIFFUSERS) for key in keys}
