"""Key maps of the video UNets of ModelScope and VGen: ours <-> `UNet3DConditionModel` and `I2VGenXLUNet` of diffusers.

Our names are the hub: a map goes from our keys to the other naming and is inverted for loading. The original (VGen)
names are those of `inflate.models.original_video_names`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from inflate.models.exchange import Names
from inflate.models.original_names import substituted

_TO_DIFFUSERS = (
    (r"^conv_in\.temporal\.", "transformer_in."),
    (r"\.resnets\.(\d+)\.temporal\.", r".temp_convs.\1."),
    (r"\.attentions\.(\d+)\.temporal\.", r".temp_attentions.\1."),
    (r"^class_embedding\.linear_1\.", "fps_embedding.0."),
    (r"^class_embedding\.linear_2\.", "fps_embedding.2."),
    (r"^first_frame\.detail\.convolutions\.", "image_latents_proj_in."),
    (r"^first_frame\.detail\.frames\.norm\.", "image_latents_temporal_encoder.norm1."),
    (r"^first_frame\.detail\.frames\.to_qkv\.", "image_latents_temporal_encoder.attn1.to_qkv."),
    (r"^first_frame\.detail\.frames\.to_out\.", "image_latents_temporal_encoder.attn1.to_out.0."),
    (r"^first_frame\.detail\.frames\.linear_1\.", "image_latents_temporal_encoder.ff.net.0.proj."),
    (r"^first_frame\.detail\.frames\.linear_2\.", "image_latents_temporal_encoder.ff.net.2."),
    (r"^first_frame\.whole\.", "image_latents_context_embedding."),
    (r"^first_frame\.tokens\.", "context_embedding."),
)
FUSED = ".to_qkv."
"""What VGen and ours have as one tensor, and diffusers as three."""
_APART = tuple(f"image_latents_temporal_encoder.attn1.to_{part}.weight" for part in "qkv")


def unet_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our UNet keys to those of diffusers' classes, but for queries, keys and values being apart there."""
    return {key: substituted(key, _TO_DIFFUSERS) for key in keys}


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of diffusers' classes with the queries, keys and values joined (3 W, C) that ours has in one."""
    if not all(key in tensors for key in _APART):
        return dict(tensors)
    joined = torch.cat([tensors[key] for key in _APART])
    others = {key: tensor for key, tensor in tensors.items() if key not in _APART}
    return {**others, _APART[0].replace(".to_q.", FUSED): joined}


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, by our names or diffusers', with the queries, keys and values apart, each in memory of its own."""
    found = {key: tensor for key, tensor in tensors.items() if FUSED not in key}
    for key in tensors.keys() - found.keys():
        parts = zip("qkv", tensors[key].chunk(3), strict=True)
        # views of one tensor could not be written to a file
        found |= {key.replace(FUSED, f".to_{part}."): each.clone() for part, each in parts}
    return found
