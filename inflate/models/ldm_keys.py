"""Latent diffusion's original names for the networks of Stable Diffusion, and what their tensors tell of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models.exchange import RESNET_NAMES, TOP_NAMES, Names, UNetLayout, rename_head

_TOP = TOP_NAMES | {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_to_ldm(keys: Iterable[str], layout: UNetLayout) -> Names:
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


def vae_to_ldm(keys: Iterable[str], levels: int) -> Names:
    """Maps an autoencoder's keys to the original ones, without their `first_stage_model.`; it has so many levels."""
    return {key: vae_key_to_ldm(key, levels) for key in keys}


def vae_key_to_ldm(key: str, levels: int) -> str:
    """The original name of one tensor."""
    key = key.replace(".conv_norm_out.", ".norm_out.")
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    key = re.sub(r"\.mid_block\.attentions\.0\.(.*)", lambda match: _vae_attention(match[1]), key)
    key = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", key)
    return re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key).replace(".conv_shortcut.", ".nin_shortcut.")


def _vae_attention(rest: str) -> str:
    return ".mid.attn_1." + rename_head(rest, _VAE_ATTENTION)


def unet_config(tensors: Mapping[str, Tensor], head_channels: int = 64) -> dict[str, Any]:
    """The 2D UNet configuration that fits the tensors; the width of a head is not in them."""
    levels = _levels(tensors)
    channels = tuple(blocks[0][0] for blocks in levels)
    attention = [blocks[0][1] for blocks in levels]
    depths = [blocks[0][2] for blocks in levels]
    middle = _depth(tensors, "middle_block.1.")
    return {
        "in_channels": size(tensors, "input_blocks.0.0.weight", 1),
        "out_channels": size(tensors, "out.2.weight", 0),
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "cross_attention_dim": size(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": tuple(width // head_channels for width in channels),
        "transformer_layers_per_block": tuple(depth or middle for depth in depths),
        "use_linear_projection": _tensor(tensors, "middle_block.1.proj_in.weight").ndim == 2,
    }


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The AutoencoderKL configuration that fits the tensors."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    width = [size(tensors, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    return {
        "in_channels": size(tensors, "encoder.conv_in.weight", 1),
        "out_channels": size(tensors, "decoder.conv_out.weight", 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(width),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": size(tensors, "decoder.conv_in.weight", 1),
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }


def size(tensors: Mapping[str, Tensor], key: str, dimension: int) -> int:
    """A dimension of a tensor; CheckpointError where it is not there."""
    return _tensor(tensors, key).shape[dimension]


def _levels(tensors: Mapping[str, Tensor]) -> list[list[tuple[int, bool, int]]]:
    """Per level, each input block's (channels, whether it has attention, depth of its transformer)."""
    levels: list[list[tuple[int, bool, int]]] = [[]]
    for number in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
            continue
        channels = size(tensors, f"input_blocks.{number}.0.out_layers.3.weight", 0)
        depth = _depth(tensors, f"input_blocks.{number}.1.")
        levels[-1].append((channels, depth > 0, depth))
    if not all(levels):
        raise CheckpointError("these are not the tensors of a UNet in the original format: a level has no block")
    return levels


def _depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return _count(tensors, re.escape(prefix) + r"transformer_blocks\.(\d+)\.")


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in tensors if (match := re.match(pattern, key))})


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"this is no model in the original format: {key} is missing")
    return tensors[key]
