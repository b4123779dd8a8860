"""Key maps of AnimateDiff: ours <-> diffusers' `UNetMotionModel` and `MotionAdapter` <-> the original names.

A motion adapter's keys are those of the motion modules within `UNetMotionModel`. The original files hold the table of
positions once per attention, ours and diffusers' once per block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models.exchange import Names, listing

_PLACE = re.compile(r"\.(?:attentions|resnets)\.(\d+)\.temporal\.")
_TO_ORIGINAL = (
    (r"\.motion_modules\.(\d+)\.", r".motion_modules.\1.temporal_transformer."),
    (r"\.pos_embed\.pe$", ".attention_blocks.0.pos_encoder.pe"),
    (r"\.attn1\.", ".attention_blocks.0."),
    (r"\.attn2\.", ".attention_blocks.1."),
    (r"\.norm1\.", ".norms.0."),
    (r"\.norm2\.", ".norms.1."),
    (r"\.norm3\.", ".ff_norm."),
)
_SECOND = re.compile(r"\.attention_blocks\.1(\.pos_encoder\.pe)$")
_FIRST = re.compile(r"\.attention_blocks\.0(\.pos_encoder\.pe)$")


def to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our UNet keys to UNetMotionModel's, of which a MotionAdapter has those of its motion modules."""
    return {key: _PLACE.sub(r".motion_modules.\1.", key) for key in keys}


def to_original(keys: Iterable[str]) -> Names:
    """Maps our keys of motion modules to those of AnimateDiff's files; of two tables of positions to the first."""
    return {key: _original(name) for key, name in to_diffusers(keys).items()}


def without_second_tables(tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """An original file's tensors with one table of positions per block; CheckpointError where its two differ."""
    seconds = [key for key in tensors if _SECOND.search(key)]
    strange = [key for key in seconds if not _same(tensors, key, _SECOND.sub(r".attention_blocks.0\1", key))]
    if strange:
        raise CheckpointError(f"{origin} gives two attentions of a block other positions: {listing(strange)}")
    return {key: tensor for key, tensor in tensors.items() if key not in seconds}


def with_second_tables(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the table of positions of each first attention repeated for the second, as original files do."""
    seconds = {
        _FIRST.sub(r".attention_blocks.1\1", key): tensor for key, tensor in tensors.items() if _FIRST.search(key)
    }
    return {**tensors, **seconds}


def _same(tensors: Mapping[str, Tensor], one: str, other: str) -> bool:
    return other in tensors and torch.equal(tensors[one], tensors[other])


def _original(key: str) -> str:
    for pattern, replacement in _TO_ORIGINAL:
        key = re.sub(pattern, replacement, key)
    return key
