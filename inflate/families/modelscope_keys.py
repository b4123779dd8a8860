"""Key maps of ModelScope's video UNets: ours <-> diffusers' `UNet3DConditionModel` <-> the original (VGen) names.

Our names are the hub: each map goes from our keys to one of the other two namings and is inverted for loading. VGen
holds the projections of its temporal transformers as one-dimensional convolutions, ours are linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models.exchange import Names
from inflate.models.original_names import RESNET_NAMES, TOP_NAMES, UNetLayout, rename_head, substituted

_TOP_TO_VGEN = {
    "conv_in.temporal": "input_blocks.0.1",
    **TOP_NAMES,
    "class_embedding.linear_1": "fps_embedding.0",
    "class_embedding.linear_2": "fps_embedding.2",
}
_TO_DIFFUSERS = (
    (r"^conv_in\.temporal\.", "transformer_in."),
    (r"\.resnets\.(\d+)\.temporal\.", r".temp_convs.\1."),
    (r"\.attentions\.(\d+)\.temporal\.", r".temp_attentions.\1."),
)
_PROJECTION = re.compile(r"\.temporal\.proj_(in|out)\.weight$")
TOKENS_PREFIX = "context_embedding."
"""The layers that make context tokens of an image embedding; they stand beside the UNet."""


def layout_of(config: Mapping[str, object]) -> UNetLayout:
    """The running block numbers of VGen, where a temporal transformer is numbered after its 2D one."""
    return UNetLayout.of(config, transformers=2)


def unet_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our UNet keys to UNet3DConditionModel's."""
    return {key: substituted(key, _TO_DIFFUSERS) for key in keys}


def unet_to_vgen(keys: Iterable[str], layout: UNetLayout) -> Names:
    """Maps our UNet keys to those of VGen's and ModelScope's UNets."""
    return {key: _to_vgen(key, layout) for key in keys}


def vgen_shapes(shapes: Mapping[str, torch.Size], names: Names) -> dict[str, torch.Size]:
    """The shapes of a UNet of ours in VGen's file, by VGen's names."""
    return {names[key]: torch.Size((*shape, 1)) if _PROJECTION.search(key) else shape for key, shape in shapes.items()}


def head_width(tensors: Mapping[str, Tensor]) -> int:
    """Width of a head by VGen's tensors, whose first temporal transformer has 8; CheckpointError for other tensors."""
    key = "input_blocks.0.1.proj_in.weight"
    if key not in tensors:
        raise CheckpointError(f"this is not a UNet in VGen's format: {key} is missing")
    return tensors[key].shape[0] // 8


def _to_vgen(key: str, layout: UNetLayout) -> str:
    placed = layout.place(key)
    if placed is None:
        return rename_head(key, _TOP_TO_VGEN)
    layer, kind, rest = placed
    if kind == "downsamplers":
        return f"{layer.removesuffix('.0')}.op.{rest.removeprefix('conv.')}"
    if kind == "resnets":
        return f"{layer}.{_resnet_to_vgen(rest)}"
    if rest.startswith("temporal."):
        return f"{layer.removesuffix('.1')}.2.{rest.removeprefix('temporal.')}"
    return f"{layer}.{rest}"


def _resnet_to_vgen(rest: str) -> str:
    if rest.startswith("temporal."):
        return f"temopral_conv.{rest.removeprefix('temporal.')}"  # spelt so in every published file
    return rename_head(rest, RESNET_NAMES)
