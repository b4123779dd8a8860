"""OpenCLIP's names for the tensors of a CLIP image encoder, on which the files of Stable Diffusion 2's kin are built.

It keeps queries, keys and values as one tensor and the projection turned; what no tensor tells of an encoder follows
from its width, by which the published ones are known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.models import exchange
from inflate.models.original_names import count_of, rename_head, tensor_of

UNTOLD: dict[int, dict[str, Any]] = {
    1280: {"num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-5},
}
"""What the tensors of an encoder of this width do not tell: 1280 is ViT-H/14, laion/CLIP-ViT-H-14-laion2B-s32B-b79K."""
_TOLD = ("image_size", "patch_size", "num_channels")
_TELLING = (
    "class_embedding", "conv1.weight", "positional_embedding", "proj", "transformer.resblocks.0.mlp.c_fc.weight"
)  # fmt: skip
_PROJECTION = "visual_projection.weight"
_WHOLE = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    _PROJECTION: "proj",
}
_TOP = {"embeddings.patch_embedding": "conv1", "pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
_BLOCK = {
    "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"
}  # fmt: skip


def image_encoder_tensors(encoder: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """An image encoder's tensors as OpenCLIP's `visual` has them."""
    return _renamed(exchange.detached(encoder))


def load_image_encoder(tensors: Mapping[str, Tensor], origin: str) -> CLIPVisionModelWithProjection:
    """The image encoder of the tensors of OpenCLIP's `visual`, or of transformers' names, which ComfyUI saves there.

    CheckpointError, listing the tensors, where one is missing, left over or of another shape, and where the width is
    that of no encoder that is known.
    """
    tensors = _renamed(tensors) if _PROJECTION in tensors else tensors
    with torch.device("meta"):
        encoder = CLIPVisionModelWithProjection(image_encoder_config(tensors, origin))
    wanted = {key: tensor.shape for key, tensor in _joined(encoder.state_dict()).items()}
    names = exchange.inverse(image_encoder_names(wanted))
    exchange.adopt(encoder, _parted(exchange.convert(tensors, names, wanted, origin)))
    embeddings = encoder.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions)[None]  # made on the meta device; no file holds it
    return encoder


def image_encoder_config(tensors: Mapping[str, Tensor], origin: str) -> CLIPVisionConfig:
    """The configuration that fits the tensors of OpenCLIP's `visual`; CheckpointError where they do not tell it."""
    missing = [key for key in _TELLING if key not in tensors]
    if missing:
        raise CheckpointError(
            f"{origin} holds no whole image encoder under OpenCLIP's names: {exchange.listing(missing)} missing; "
            "give the encoder's folder as image_encoder"
        )
    width, patch = len(tensors["class_embedding"]), tensors["conv1.weight"].shape[2]
    if width not in UNTOLD:
        raise CheckpointError(
            f"{origin} holds an image encoder {width} channels wide, whose tensors do not tell its number of heads; "
            f"known are those of {', '.join(map(str, UNTOLD))} channels: give the encoder's folder as image_encoder"
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["transformer.resblocks.0.mlp.c_fc.weight"]),
        num_hidden_layers=count_of(tensors, r"transformer\.resblocks\.(\d+)\."),
        num_channels=tensors["conv1.weight"].shape[1],
        image_size=patch * math.isqrt(len(tensors["positional_embedding"]) - 1),
        patch_size=patch,
        projection_dim=tensors["proj"].shape[1],
        **UNTOLD[width],
    )


def differing(encoder: CLIPVisionModelWithProjection) -> list[str]:
    """The settings of an image encoder that its tensors under OpenCLIP's names would not tell, with their values."""
    own = encoder.config
    if own.hidden_size not in UNTOLD:
        return [f"image encoder hidden_size {own.hidden_size}"]
    read = image_encoder_config(image_encoder_tensors(encoder), "this image encoder")
    names = (*UNTOLD[own.hidden_size], *_TOLD)
    return [f"image encoder {name} {getattr(own, name)}" for name in names if getattr(own, name) != getattr(read, name)]


def image_encoder_names(keys: Iterable[str]) -> dict[str, str]:
    """Maps transformers' keys, queries, keys and values being `in_proj_*`, to those of OpenCLIP's `visual`."""
    return {key: _name(key.removeprefix("vision_model.")) for key in keys}


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    joined = _joined(tensors)
    names = image_encoder_names(joined)
    return {names[key]: tensor for key, tensor in joined.items()}


def _name(key: str) -> str:
    block = re.match(r"encoder\.layers\.(\d+)\.(.*)", key)
    if block:
        return f"transformer.resblocks.{block[1]}.{rename_head(block[2], _BLOCK)}"
    return _WHOLE.get(key) or rename_head(key, _TOP)


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors with queries, keys and values in one: `in_proj_*`, (3 W, W) and (3 W)."""
    joined = {key: tensor for key, tensor in tensors.items() if not re.search(r"\.[qkv]_proj\.", key)}
    for name in sorted({re.sub(r"\.[qkv]_proj\.", ".in_proj_", key) for key in tensors.keys() - joined.keys()}):
        parts = [tensor_of(tensors, name.replace(".in_proj_", f".{part}_proj.")) for part in "qkv"]
        joined[name] = torch.cat(parts)
    return joined


def _joined(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors with queries, keys and values in one, and the projection turned (W, D)."""
    return {**fused(tensors), _PROJECTION: tensors[_PROJECTION].T.contiguous()}


def _parted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_joined`."""
    parted = {key: tensor for key, tensor in tensors.items() if ".in_proj_" not in key}
    for key, tensor in tensors.items():
        if ".in_proj_" in key:
            pieces = zip("qkv", tensor.chunk(3), strict=True)
            # each in memory of its own, without which a folder cannot be written
            parted |= {key.replace(".in_proj_", f".{part}_proj."): piece.clone() for part, piece in pieces}
    return {**parted, _PROJECTION: tensors[_PROJECTION].T.contiguous()}
