"""Key maps of Stable Video Diffusion: ours <-> diffusers' <-> the original (sgm) names.

Our names are those of the 2D model plus `.temporal.`, so they are the hub: each map goes from our keys to one of the
other two namings and is inverted for loading.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from inflate.models.exchange import Names
from inflate.models.original_names import (
    RESNET_NAMES,
    TOP_NAMES,
    UNetLayout,
    rename_head,
    size_of,
    substituted,
    vae_key,
)

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
    return {key: substituted(key, _TO_DIFFUSERS) for key in keys}


def vae_to_diffusers(keys: Iterable[str]) -> Names:
    """Maps our VAE keys to AutoencoderKLTemporalDecoder's, whose encoder keeps its 2D names."""
    return {key: substituted(key, _TO_DIFFUSERS) if key.startswith("decoder.") else key for key in keys}


def unet_to_sgm(keys: Iterable[str], layout: UNetLayout) -> Names:
    """Maps our UNet keys to those of sgm's VideoUNet (without its `model.diffusion_model.` prefix)."""
    return {key: _unet_key_to_sgm(key, layout) for key in keys}


def vae_to_sgm(keys: Iterable[str], levels: int) -> Names:
    """Maps our VAE keys to `encoder.*` and `decoder.*` of sgm's first stage, for a VAE of that many levels."""
    return {key: _vae_key_to_sgm(key, levels) for key in keys}


def sgm_added_ids(tensors: Mapping[str, Tensor]) -> int:
    """The width of all added-id embeddings together."""
    return size_of(tensors, "label_emb.0.0.weight", 1)


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
    key = vae_key(key.replace("decoder.conv_out.temporal.", "decoder.conv_out.time_mix_conv."), levels)
    key = re.sub(r"(?<=\.)temporal\.mix$", "mix_factor", key)
    return re.sub(r"(?<=\.)temporal\.(.*)", lambda match: "time_stack." + rename_head(match[1], RESNET_NAMES), key)
