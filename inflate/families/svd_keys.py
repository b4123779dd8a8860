"""Key maps of Stable Video Diffusion: ours <-> diffusers' <-> the original (sgm) names.

Our names are those of the 2D model plus `.temporal.`, so they are the hub: each map goes from our keys to one of the
other two namings and is inverted for loading. `convert` applies a map and accounts for every tensor: a missing, a
surplus or a misshapen one is an error that lists the keys, and then nothing has been changed.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inflate.errors import CheckpointError

Names = dict[str, str]

_RESNET_TO_SGM = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION_TO_SGM = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_TOP_TO_SGM = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "conv_in": "input_blocks.0.0",
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


@dataclass(frozen=True)
class UNetLayout:
    """The part of a UNet's shape that sgm's running block numbers depend on."""

    layers: int
    attention: tuple[bool, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "UNetLayout":
        """Reads a UNet configuration; CheckpointError where its levels differ in depth, which sgm cannot name."""
        layers = config["layers_per_block"]
        counts = {layers} if isinstance(layers, int) else set(layers)
        if len(counts) != 1:
            raise CheckpointError(f"sgm's names need the same layers_per_block at every level, not {layers}")
        return cls(counts.pop(), tuple("CrossAttn" in block for block in config["down_block_types"]))


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


def inverse(names: Names) -> Names:
    """The map back; CheckpointError where two keys meet in one name."""
    back = {target: source for source, target in names.items()}
    if len(back) != len(names):
        twice = [source for source, target in names.items() if back[target] != source]
        raise CheckpointError(f"these keys share a name with another: {listing(twice)}")
    return back


def convert(
    tensors: Mapping[str, Tensor], names: Names, shapes: Mapping[str, torch.Size], origin: str
) -> dict[str, Tensor]:
    """Renames every tensor by `names` and fits 1x1 convolutions to linear layers and back, without copying.

    `shapes` are those of the target model and `origin` names the source in messages. Raises CheckpointError, listing
    the keys, where a tensor is missing, left over or of another shape.
    """
    sources = inverse(names)
    missing = [sources.get(target, target) for target in shapes if sources.get(target) not in tensors]
    surplus = [key for key in tensors if names.get(key) not in shapes]
    if missing or surplus:
        raise CheckpointError(f"{origin} does not fit the model: {_difference(missing, surplus)}; nothing was loaded")
    fitted = {target: _fit(tensors[sources[target]], shape) for target, shape in shapes.items()}
    wrong = [
        f"{sources[target]} {tuple(tensors[sources[target]].shape)} instead of {tuple(shapes[target])}"
        for target, tensor in fitted.items()
        if tensor is None
    ]
    if wrong:
        raise CheckpointError(f"{origin} has tensors of another shape: {listing(wrong)}; nothing was loaded")
    return {target: tensor for target, tensor in fitted.items() if tensor is not None}


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


def listing(keys: list[str], limit: int = 12) -> str:
    """The keys in a line, the rest of a long list as a count."""
    more = f" and {len(keys) - limit} more" if len(keys) > limit else ""
    return ", ".join(keys[:limit]) + more


def _difference(missing: list[str], surplus: list[str]) -> str:
    parts = [f"{len(missing)} missing ({listing(missing)})"] if missing else []
    return "; ".join(parts + ([f"{len(surplus)} left over ({listing(surplus)})"] if surplus else []))


def _fit(tensor: Tensor, shape: torch.Size) -> Tensor | None:
    if tensor.shape == shape:
        return tensor
    longer, shorter = (tensor.shape, shape) if tensor.ndim > len(shape) else (shape, tensor.shape)
    one_by_one = tuple(longer) == (*shorter, 1, 1)
    return tensor.reshape(shape) if one_by_one else None


def _substitute(key: str) -> str:
    for pattern, replacement in _TO_DIFFUSERS:
        key = re.sub(pattern, replacement, key)
    return key


def _rename_head(rest: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        if rest.startswith(ours + "."):
            return theirs + rest[len(ours) :]
    raise CheckpointError(f"no name in sgm's models for a layer that ends in {rest}")


def _unet_key_to_sgm(key: str, layout: UNetLayout) -> str:
    match = re.match(r"(down_blocks|up_blocks|mid_block)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key)
    if match is None:
        return _rename_head(key, _TOP_TO_SGM)
    side, level, kind, place, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    if kind == "attentions":
        rest = _transformer_to_sgm(rest)
    elif kind == "resnets":
        rest = _unet_resnet_to_sgm(rest)
    if side == "mid_block":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    first = level * (layout.layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layout.layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layout.layers}.{2 if layout.attention[-1 - level] else 1}.{rest}"
    stack, number = ("input_blocks", first + 1 + place) if side == "down_blocks" else ("output_blocks", first + place)
    return f"{stack}.{number}.{int(kind == 'attentions')}.{rest}"


def _unet_resnet_to_sgm(rest: str) -> str:
    if rest == "temporal.mix":
        return "time_mixer.mix_factor"
    if rest.startswith("temporal."):
        return "time_stack." + _rename_head(rest.removeprefix("temporal."), _RESNET_TO_SGM)
    return _rename_head(rest, _RESNET_TO_SGM)


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
    return re.sub(r"(?<=\.)temporal\.(.*)", lambda match: "time_stack." + _rename_head(match[1], _RESNET_TO_SGM), key)


def _vae_attention(rest: str) -> str:
    return ".mid.attn_1." + _rename_head(rest, _VAE_ATTENTION_TO_SGM)


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
