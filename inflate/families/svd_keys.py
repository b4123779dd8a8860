"""Key maps of Stable Video Diffusion: ours <-> diffusers' <-> the original (sgm) names.

Our names are those of the 2D model plus `.temporal.`, so they are the hub: each map goes from our keys to one of the
other two namings and is inverted for loading.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models.exchange import RESNET_NAMES, TOP_NAMES, Names, UNetLayout, rename_head

_VAE_ATTENTION_TO_SGM = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TOP_TO_SGM = {
    **TOP_NAMES,
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
}
_TO_DIFFUSERS = (
    (r"^class_embedding\.", "add_embedding."),
    (r"^decoder\.conv_out\.temporal\.", "decoder.time_conv_out."),
    (r"(\.transformer_blocks)\.(\d+)\.temporal\.", r".temporal_transformer_blocks.\2."),
    (r"(\.attentions\.\d+)\.temporal\.position\.", r"\1.time_pos_embed."),
    (r"(\.(?:attentions|resnets)\.\d+)\.temporal\.mix$", r"\1.time_mixer.mix_factor"),
    (r"(\.resnets\.\d+)\.temporal\.", r"\1.temporal_res_block."),
    (r"(\.resnets\.\d+)\.(?!temporal_res_block|time_mixer)", r"\1.spatial_res_block."),
)


def unet_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our UNet keys to UNetSpatioTemporalConditionModel's."""
    return {key: _substitute(key) for key in keys}


def vae_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our VAE keys to AutoencoderKLTemporalDecoder's, whose encoder keeps its 2D names."""
    return {key: _substitute(key) if key.startswith("decoder.") else key for key in keys}


def unet_to_sgm(keys: Iterable[str], layout: UNetLayout) -> Names:
    """Maps our UNet keys to those of sgm's VideoUNet (without its `model.diffusion_model.` prefix)."""
    return {key: _unet_key_to_sgm(key, layout) for key in keys}


def vae_to_sgm(keys: Iterable[str], levels: int) -> Names:
    """Maps our VAE keys to `encoder.*` and `decoder.*` of sgm's first stage, for a VAE of that many levels."""
    return {key: _vae_key_to_sgm(key, levels) for key in keys}


def sgm_unet_config(tensors: Mapping[str, Tensor], head_channels: int = 64) -> dict[str, Any]:
    """The 2D UNet configuration that fits sgm's tensors; the width of a head is not in them."""
    levels = _sgm_levels(tensors)
    channels = tuple(blocks[0][0] for blocks in levels)
    attention = [blocks[0][1] for blocks in levels]
    depths = [blocks[0][2] for blocks in levels]
    middle = _sgm_depth(tensors, "middle_block.1.")
    return {
        "in_channels": _size(tensors, "input_blocks.0.0.weight", 1),
        "out_channels": _size(tensors, "out.2.weight", 0),
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "cross_attention_dim": _size(tensors, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": tuple(width // head_channels for width in channels),
        "transformer_layers_per_block": tuple(depth or middle for depth in depths),
        "use_linear_projection": _tensor(tensors, "middle_block.1.proj_in.weight").ndim == 2,
    }


def sgm_added_ids(tensors: Mapping[str, Tensor]) -> int:
    """The width of all added-id embeddings together."""
    return _size(tensors, "label_emb.0.0.weight", 1)


def sgm_vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The AutoencoderKL configuration that fits sgm's first stage, which has neither quant nor post-quant layers."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    width = [_size(tensors, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)]
    return {
        "in_channels": _size(tensors, "encoder.conv_in.weight", 1),
        "out_channels": _size(tensors, "decoder.conv_out.weight", 0),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(width),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "latent_channels": _size(tensors, "decoder.conv_in.weight", 1),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _substitute(key: str) -> str:
    for pattern, replacement in _TO_DIFFUSERS:
        key = re.sub(pattern, replacement, key)
    return key


def _unet_key_to_sgm(key: str, layout: UNetLayout) -> str:
    placed = layout.place(key)
    if placed is None:
        return rename_head(key, _TOP_TO_SGM)
    layer, kind, rest = placed
    if kind == "attentions":
        rest = _transformer_to_sgm(rest)
    elif kind == "resnets":
        rest = _unet_resnet_to_sgm(rest)
    elif kind == "downsamplers":
        rest = f"op.{rest.removeprefix('conv.')}"
    return f"{layer}.{rest}"


def _unet_resnet_to_sgm(rest: str) -> str:
    if rest == "temporal.mix":
        return "time_mixer.mix_factor"
    if rest.startswith("temporal."):
        return "time_stack." + rename_head(rest.removeprefix("temporal."), RESNET_NAMES)
    return rename_head(rest, RESNET_NAMES)


def _transformer_to_sgm(rest: str) -> str:
    if rest.startswith("temporal."):
        rest = rest.replace("temporal.position.linear_1", "time_pos_embed.0")
        rest = rest.replace("temporal.position.linear_2", "time_pos_embed.2")
        return rest.replace("temporal.mix", "time_mixer.mix_factor")
    return re.sub(r"^transformer_blocks\.(\d+)\.temporal\.", r"time_stack.\1.", rest)


def _vae_key_to_sgm(key: str, levels: int) -> str:
    key = key.replace("decoder.conv_out.temporal.", "decoder.conv_out.time_mix_conv.")
    key = key.replace(".conv_norm_out.", ".norm_out.")
    key = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", key)
    key = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", key)
    key = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", key)
    key = re.sub(r"\.mid_block\.attentions\.0\.(.*)", lambda match: _vae_attention(match[1]), key)
    key = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda match: f".mid.block_{int(match[1]) + 1}.", key)
    key = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", key).replace(".conv_shortcut.", ".nin_shortcut.")
    key = re.sub(r"(?<=\.)temporal\.mix$", "mix_factor", key)
    return re.sub(r"(?<=\.)temporal\.(.*)", lambda match: "time_stack." + rename_head(match[1], RESNET_NAMES), key)


def _vae_attention(rest: str) -> str:
    return ".mid.attn_1." + rename_head(rest, _VAE_ATTENTION_TO_SGM)


def _sgm_levels(tensors: Mapping[str, Tensor]) -> list[list[tuple[int, bool, int]]]:
    """Per level, each input block's (channels, whether it has attention, depth of its transformer)."""
    levels: list[list[tuple[int, bool, int]]] = [[]]
    for number in range(1, _count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{number}.0.op.weight" in tensors:
            levels.append([])
            continue
        channels = _size(tensors, f"input_blocks.{number}.0.out_layers.3.weight", 0)
        depth = _sgm_depth(tensors, f"input_blocks.{number}.1.")
        levels[-1].append((channels, depth > 0, depth))
    if not all(levels):
        raise CheckpointError("these are not the tensors of a sgm VideoUNet: a level has no block")
    return levels


def _sgm_depth(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return _count(tensors, re.escape(prefix) + r"transformer_blocks\.(\d+)\.")


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in tensors if (match := re.match(pattern, key))})


def _tensor(tensors: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"this is not Stable Video Diffusion in sgm's format: {key} is missing")
    return tensors[key]


def _size(tensors: Mapping[str, Tensor], key: str, dimension: int) -> int:
    return _tensor(tensors, key).shape[dimension]
