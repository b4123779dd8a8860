"""The names that latent diffusion's own code gives to its networks' layers, on which many published files are built.

Blocks have running numbers, which depend on the UNet's shape; the shape can be read off the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from inflate.errors import CheckpointError

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block, in our names and in latent diffusion's original ones."""
TOP_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "conv_in": "input_blocks.0.0",
}
"""Layers outside the blocks of a UNet, likewise."""


@dataclass(frozen=True)
class UNetLayout:
    """The part of a UNet's shape that the running block numbers of latent diffusion's original names depend on."""

    layers: int
    attention: tuple[bool, ...]
    transformers: int = 1
    """Layers after a residual block where a level has attention: 2 where a temporal transformer has its own number."""

    @classmethod
    def of(cls, config: Mapping[str, Any], transformers: int = 1) -> UNetLayout:
        """Reads a UNet configuration; CheckpointError where its levels differ in depth, which the names cannot tell."""
        layers = config["layers_per_block"]
        counts = {layers} if isinstance(layers, int) else set(layers)
        if len(counts) != 1:
            raise CheckpointError(f"running numbers need the same layers_per_block at every level, not {layers}")
        return cls(counts.pop(), tuple("CrossAttn" in block for block in config["down_block_types"]), transformers)

    def place(self, key: str) -> tuple[str, str, str] | None:
        """The numbered layer of a key of ours, its kind and the rest of the key; None outside the blocks.

        For instance input_blocks.4.0, resnets and conv1.bias for down_blocks.1.resnets.0.conv1.bias.
        """
        match = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key)
        if match is None:
            return None
        side, level, kind, number, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        return self._block(side, level, kind, number), kind, rest

    def _block(self, side: str, level: int, kind: str, number: int) -> str:
        if side == "mid_block":
            return f"middle_block.{1 if kind == 'attentions' else (self.transformers + 1) * number}"
        first = level * (self.layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + self.layers + 1}.0"
        if kind == "upsamplers":
            return f"output_blocks.{first + self.layers}.{1 + self.transformers * self.attention[-1 - level]}"
        stack, start = ("input_blocks", 1) if side == "down_blocks" else ("output_blocks", 0)
        return f"{stack}.{start + first + number}.{int(kind == 'attentions')}"


def rename_head(rest: str, table: Mapping[str, str]) -> str:
    """`rest` with its first words renamed by a table of layers; CheckpointError where the table lacks them."""
    for ours, theirs in table.items():
        if rest.startswith(ours + "."):
            return theirs + rest[len(ours) :]
    raise CheckpointError(f"the format has no name for a layer that ends in {rest}")


_TOP = TOP_NAMES | {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def substituted(key: str, table: Iterable[tuple[str, str]]) -> str:
    """A key after each pattern of a table was replaced in it, in turn."""
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


def unet_names(keys: Iterable[str], layout: UNetLayout) -> dict[str, str]:
    """Maps a 2D UNet's keys to the original ones, without their `model.diffusion_model.`."""
    return {key: _unet_key(key, layout) for key in keys}


def _unet_key(key: str, layout: UNetLayout) -> str:
    placed = layout.place(key)
    if placed is None:
        return rename_head(key, _TOP)
    layer, kind, rest = placed
    if kind == "resnets":
        rest = rename_head(rest, RESNET_NAMES)
    elif kind == "downsamplers":
        rest = f"op.{rest.removeprefix('conv.')}"
    return f"{layer}.{rest}"


def vae_names(keys: Iterable[str], levels: int) -> dict[str, str]:
    """Maps an autoencoder's keys to the original ones, without their `first_stage_model.`; it has so many levels."""
    return {key: vae_key(key, levels) for key in keys}


def vae_key(key: str, levels: int) -> str:
    """The original name of one of an autoencoder's tensors."""
    key = key.replace(".conv_norm_out.", ".norm_out.")
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    key = re.sub(r"\.mid_block\.attentions\.0\.(.*)", lambda match: _vae_attention(match[1]), key)
    key = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", key)
    return re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key).replace(".conv_shortcut.", ".nin_shortcut.")


def _vae_attention(rest: str) -> str:
    return ".mid.attn_1." + rename_head(rest, _VAE_ATTENTION)


def as_convolution(key: str, tensor: Tensor) -> Tensor:
    """An autoencoder's tensor in the original's shape: linear layers of its attention are 1x1 convolutions there."""
    linear = re.search(r"\.mid\.attn_1\.(?:q|k|v|proj_out)\.weight$", key) and tensor.ndim == 2
    return tensor[:, :, None, None] if linear else tensor


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The AutoencoderKL configuration that fits an autoencoder's tensors."""
    levels = count_of(tensors, r"encoder\.down\.(\d+)\.")
    width = [size_of(tensors, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    return {
        "in_channels": size_of(tensors, "encoder.conv_in.weight", 1),
        "out_channels": size_of(tensors, "decoder.conv_out.weight", 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(width),
        "layers_per_block": count_of(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": size_of(tensors, "decoder.conv_in.weight", 1),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def unet_config(tensors: Mapping[str, Tensor], head_channels: int = 64) -> dict[str, Any]:
    """The 2D UNet configuration that fits tensors under latent diffusion's original names, which lack a head's width.

    CheckpointError where a tensor is missing that it is read off.
    """
    levels = _levels(tensors)
    channels = tuple(blocks[0][0] for blocks in levels)
    attention = [blocks[0][1] for blocks in levels]
    depths = [blocks[0][2] for blocks in levels]
    middle = _depth(tensors, "middle_block.1.")
    return {
        "in_channels": size_of(tensors, "input_blocks.0.0.weight", 1),
        "out_channels": size_of(tensors, "out.2.weight", 0),
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "cross_attention_dim": size_of(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": tuple(width // head_channels for width in channels),
        "transformer_layers_per_block": tuple(depth or middle for depth in depths),
        "use_linear_projection": tensor_of(tensors, "middle_block.1.proj_in.weight").ndim == 2,
    }


def _levels(tensors: Mapping[str, Tensor]) -> list[list[tuple[int, bool, int]]]:
    """Per level, each input block's (channels, whether it has attention, depth of its transformer)."""
    levels: list[list[tuple[int, bool, int]]] = [[]]
    for number in range(1, count_of(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
            continue
        channels = size_of(tensors, f"input_blocks.{number}.0.out_layers.3.weight", 0)
        depth = _depth(tensors, f"input_blocks.{number}.1.")
        levels[-1].append((channels, depth > 0, depth))
    if not all(levels):
        raise CheckpointError("these are not the tensors of a UNet under its original names: a level has no block")
    return levels


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return count_of(tensors, re.escape(prefix) + r"transformer_blocks\.(\d+)\.")


def count_of(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many values the first group of a pattern takes over the keys."""
    return len({match[1] for key in tensors if (match := re.match(pattern, key))})


def tensor_of(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    """The tensor of a key; CheckpointError where it is missing."""
    if key not in tensors:
        raise CheckpointError(f"these are not a model's tensors under its original names: {key} is missing")
    return tensors[key]


def size_of(tensors: Mapping[str, Tensor], key: str, dimension: int) -> int:
    """One dimension of the tensor of a key; CheckpointError where it is missing."""
    return tensor_of(tensors, key).shape[dimension]
