"""Original names of the video UNets whose temporal layers are four convolutions and transformers over frames.

Two dialects of latent diffusion's names are in use for them: that of VGen and ModelScope, and that of VideoCrafter and
DynamiCrafter. Both hold some projections of transformers over frames as one-dimensional convolutions; ours are linear
layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.layers.hierarchy import Hierarchy
from inflate.models import exchange
from inflate.models.exchange import Names
from inflate.models.original_names import (
    RESNET_NAMES,
    TOP_NAMES,
    UNetLayout,
    rename_head,
    size_of,
    substituted,
    unet_config,
)
from inflate.models.unet import INPUT_HEADS, MODELSCOPE, TemporalSpec, VideoUNet

FPS = "fps_embedding.0.weight"
"""A tensor of those models that are told the frame rate."""
_IMAGE = ((r"\.attn2\.image\.gate$", ".attn2.alpha"), (r"\.attn2\.image\.(to_[kv])\.", r".attn2.\1_ip."))
"""Keys, values and the gate of image tokens in cross-attention, in our names and in the original ones."""


@dataclass(frozen=True)
class Dialect:
    """How a code base names what latent diffusion's own did not have."""

    code: str
    """whose code"""
    input: str
    """the transformer after the input convolution"""
    numbered_op: bool
    """whether downsampling has a number of its own in its block"""
    convolved: re.Pattern[str]
    """our keys of the linear layers that are convolutions there"""
    first_frame: Mapping[str, str] = field(default_factory=dict)
    """our layers that tell the UNet of its first frame, and what they are called there"""

    def names(self, keys: Iterable[str], layout: UNetLayout) -> Names:
        """Maps our UNet keys to the original ones; CheckpointError for a layer that has no name."""
        return {key: self._name(key, layout) for key in keys}

    def shapes(self, shapes: Mapping[str, torch.Size], names: Names) -> dict[str, torch.Size]:
        """The shapes of a UNet of ours as the original has them, by the original names."""
        return {names[key]: self._shape(key, shape) for key, shape in shapes.items()}

    def config(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """The 2D UNet configuration that fits tensors in the original names; CheckpointError for another model's."""
        width = self._head_width(tensors)
        return unet_config({self._numbered(key): tensor for key, tensor in tensors.items()}, width)

    def _head_width(self, tensors: Mapping[str, Tensor]) -> int:
        """Width of a head, which the transformer after the input tells."""
        key = f"{self.input}.proj_in.weight"
        if key not in tensors:
            raise CheckpointError(f"this is not a UNet in {self.code}'s format: {key} is missing")
        return tensors[key].shape[0] // INPUT_HEADS

    def _numbered(self, key: str) -> str:
        return key if self.numbered_op else key.replace(".op.", ".0.op.")

    def _shape(self, key: str, shape: torch.Size) -> torch.Size:
        if key.endswith(".attn2.image.gate"):
            return torch.Size(())
        return torch.Size((*shape, 1)) if self.convolved.search(key) else shape

    def _name(self, key: str, layout: UNetLayout) -> str:
        placed = layout.place(key)
        if placed is None:
            return rename_head(key, {"conv_in.temporal": self.input, **self.first_frame, **_TOP})
        layer, kind, rest = placed
        if kind == "downsamplers":
            block = layer if self.numbered_op else layer.removesuffix(".0")
            return f"{block}.op.{rest.removeprefix('conv.')}"
        if kind == "resnets":
            return f"{layer}.{_resnet(rest)}"
        if rest.startswith("temporal."):
            return f"{layer.removesuffix('.1')}.2.{rest.removeprefix('temporal.')}"
        return f"{layer}.{substituted(rest, _IMAGE)}"


_TOP = {
    **TOP_NAMES,
    "class_embedding.linear_1": "fps_embedding.0",
    "class_embedding.linear_2": "fps_embedding.2",
}
DETAIL, WHOLE, TOKENS = "local_image_concat", "local_image_embedding", "context_embedding"
"""What VGen calls the convolutions before the encoder of details, the encoder of the whole first frame, and what makes
context tokens of CLIP's embedding of it."""
_OVER_FRAMES = "local_temporal_encoder.layers.0"
_FIRST_FRAME = {
    "first_frame.detail.convolutions": DETAIL,
    "first_frame.detail.frames.norm": f"{_OVER_FRAMES}.0.norm",
    "first_frame.detail.frames.to_qkv": f"{_OVER_FRAMES}.0.fn.to_qkv",
    "first_frame.detail.frames.to_out": f"{_OVER_FRAMES}.0.fn.to_out.0",
    "first_frame.detail.frames.linear_1": f"{_OVER_FRAMES}.1.net.0.0",
    "first_frame.detail.frames.linear_2": f"{_OVER_FRAMES}.1.net.2",
    "first_frame.whole": WHOLE,
    "first_frame.tokens": TOKENS,
}
VGEN = Dialect("VGen", "input_blocks.0.1", False, re.compile(r"\.temporal\.proj_(in|out)\.weight$"), _FIRST_FRAME)
"""VGen's and ModelScope's."""
LVDM = Dialect("VideoCrafter", "init_attn.0", True, re.compile(r"^conv_in\.temporal\.proj_(in|out)\.weight$"))
"""VideoCrafter's and DynamiCrafter's."""

BUILT_IN: dict[str, Any] = {**exchange.BUILT_IN, "use_linear_projection": True, "upcast_attention": False}
"""What the UNets of these code bases, and diffusers' class for them, have built in."""


def hierarchy_of(tensors: Mapping[str, Tensor], width: int) -> Hierarchy | None:
    """How a UNet with a context so wide is told of its first frame, by its tensors in VGen's names; None: it is not.

    CheckpointError where a tensor is missing that this is read off.
    """
    detail, whole, clip = (any(key.startswith(f"{name}.") for key in tensors) for name in (DETAIL, WHOLE, TOKENS))
    if not (detail or whole or clip):
        return None
    latent = DETAIL if detail else WHOLE if whole else "input_blocks.0"
    told: dict[str, Any] = {"channels": size_of(tensors, f"{latent}.0.weight", 1), "clip_tokens": 0}
    if clip:
        told["embedding"] = size_of(tensors, f"{TOKENS}.0.weight", 1)
        told["clip_tokens"] = size_of(tensors, f"{TOKENS}.2.weight", 0) // width
    return Hierarchy(**told, detail_encoder=detail, global_encoder=whole)


def with_fps(width: int) -> TemporalSpec:
    """The layers of a model that is told the frame rate by an embedding of that width."""
    return replace(MODELSCOPE, added_ids=1, added_id_dim=width)


def refuse_what_originals_lack(unet: VideoUNet, code: str, padding: Any = 1) -> None:
    """CheckpointError, naming the settings, where the UNets of a code base, which pad so, cannot represent a model."""
    told_fps = unet.spec.added_ids > 0
    slots = with_fps(unet.config.block_out_channels[0]) if told_fps else MODELSCOPE
    fixed = {"norm_num_groups": 32, "norm_eps": 1e-5, "act_fn": "silu", "downsample_padding": padding}
    refuse_other_layers(unet, slots, code, {**fixed, "class_embed_type": "projection" if told_fps else None})


def refuse_other_layers(unet: VideoUNet, slots: TemporalSpec, target: str, built_in: Mapping[str, Any]) -> None:
    """CheckpointError, naming the settings, where a model has others than these slots and what is built in."""
    wrong = exchange.differing(unet, {**BUILT_IN, **built_in})
    wrong += exchange.differing_spec(unet.spec, replace(slots, dropout=unet.spec.dropout))
    widths = head_widths(unet)
    if len(widths) != 1:
        wrong.append(f"heads of different widths ({', '.join(map(str, sorted(widths)))})")
    if {len(transformer.transformer_blocks) for transformer in exchange.transformers(unet)} != {1}:
        wrong.append("more than one block per transformer")
    if wrong:
        raise CheckpointError(f"{target} has no place for: {'; '.join(wrong)}")


def head_widths(unet: VideoUNet) -> set[int]:
    """Widths of the heads of a UNet's 2D transformers."""
    return {layer.inner_dim // layer.config.num_attention_heads for layer in exchange.transformers(unet)}


def layout_of(config: Mapping[str, object]) -> UNetLayout:
    """The running block numbers, where a temporal transformer is numbered after its 2D one."""
    return UNetLayout.of(config, transformers=2)


def _resnet(rest: str) -> str:
    if rest.startswith("temporal."):
        return f"temopral_conv.{rest.removeprefix('temporal.')}"  # spelt so in every published file
    return rename_head(rest, RESNET_NAMES)
