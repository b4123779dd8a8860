"""What the formats of all families share: tensors read, renamed and handed over, each of them accounted for.

`convert` applies a map of names: a missing, a surplus or a misshapen tensor is an error that lists the keys, and then
nothing has been changed. Models are built without memory and take the tensors over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.models.folders import HALF_WEIGHTS_NAME, plain, read_json
from inflate.models.unet import TemporalSpec, VideoUNet

Names = dict[str, str]

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
        return f"{self._block(side, level, kind, number)}", kind, rest

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
    """Renames every tensor by `names` and fits pointwise convolutions to linear layers and back, without copying.

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


def rename_head(rest: str, table: Mapping[str, str]) -> str:
    """`rest` with its first words renamed by a table of layers; CheckpointError where the table lacks them."""
    for ours, theirs in table.items():
        if rest.startswith(ours + "."):
            return theirs + rest[len(ours) :]
    raise CheckpointError(f"the format has no name for a layer that ends in {rest}")


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
    pointwise = len(shorter) == 2 and tuple(longer) in ((*shorter, 1), (*shorter, 1, 1))
    return tensor.reshape(shape) if pointwise else None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a diffusers model folder, in float32; CheckpointError where a file is missing or cut short."""
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, HALF_WEIGHTS_NAME) if (folder / name).is_file()][
            :1
        ]
    if not files:
        raise CheckpointError(f"{folder} holds no weights: {SAFETENSORS_WEIGHTS_NAME} is missing")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(read_tensors(file))
    return tensors


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file, in float32; CheckpointError where it is missing or cut short."""
    try:
        return {key: tensor.float() for key, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; download or copy it again") from error


def build_unet(config: Mapping[str, Any], spec: TemporalSpec) -> VideoUNet:
    """A VideoUNet without memory (on the meta device) from a 2D configuration."""
    width = spec.added_ids * spec.added_id_dim
    ids = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": width} if width else {}
    with torch.device("meta"):
        return VideoUNet.from_config({**config, **ids, "temporal": spec.to_dict()})


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor of a model."""
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def adopt(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a model without memory its tensors, without a copy."""
    model.load_state_dict(tensors, assign=True)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def with_defaults(kind: type[ConfigMixin], folder: Path) -> dict[str, Any]:
    read_json(folder / "config.json")
    with torch.device("meta"):
        return plain(kind.from_config(kind.load_config(folder)).config)


def detached(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


BUILT_IN: dict[str, Any] = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_time_scale_shift": "default",
    "addition_embed_type": None,
    "encoder_hid_dim": None,
    "dual_cross_attention": False,
    "only_cross_attention": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "time_embedding_type": "positional",
}
"""What every video UNet of diffusers has built in: a model that differs cannot be told to them."""


def differing(unet: VideoUNet, built_in: Mapping[str, Any]) -> list[str]:
    """The settings of a UNet that are not as a format has them built in, with their values."""
    return [f"unet {name} {unet.config[name]}" for name, value in built_in.items() if unet.config[name] != value]


def differing_spec(spec: TemporalSpec, built_in: TemporalSpec) -> list[str]:
    """The settings of a temporal specification that are not as a format has them built in, with their values."""
    own, theirs = spec.to_dict(), built_in.to_dict()
    different = [name for name in own if own[name] != theirs[name] and _matters(name, spec, built_in)]
    return [f"temporal {name} {own[name]}" for name in different]


def _matters(name: str, *specs: TemporalSpec) -> bool:
    """Whether the specs have the layers that a setting is about."""
    about = {"each_up_to": "block", "dropout": "conv", "added_id_dim": "added_ids"}
    layers = "motion" if name.startswith("motion_") else about.get(name)
    return layers is None or all(getattr(spec, layers) for spec in specs)


def transformers(unet: VideoUNet) -> list[Transformer2DModel]:
    """The 2D transformers of a UNet."""
    return [module for module in unet.modules() if isinstance(module, Transformer2DModel)]


def original_unet_config(tensors: Mapping[str, Tensor], head_channels: int = 64) -> dict[str, Any]:
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
