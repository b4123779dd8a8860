"""A text-to-video model without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from inflate.errors import CheckpointError
from inflate.families.video_ldm import FAMILY, Clips, VideoLDM, load_noise
from inflate.models import exchange, folders, temporal_layers
from inflate.models.text_encoders import SUFFIXES, TextEncoders
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE


def outline(path: str | Path) -> VideoLDM:
    """What `VideoLDM.load` loads from a folder or by a published name, on the meta device; no weights are read.

    CheckpointError for a single file, and where a configuration is missing.
    """
    if str(path).endswith(folders.SAFETENSORS):
        raise CheckpointError(f"{path} holds no configurations: plan with the folder of a model of the same shape")
    folder = folders.outline(path)
    if temporal_layers.are_in(folder):
        return outline(temporal_layers.image_model_of(folder / folders.SETTINGS_FILE, FAMILY))
    noise = load_noise(folder / "scheduler")
    return VideoLDM(_unet(folder / "unet"), _vae(folder / "vae"), _text(folder), noise, Clips())


@dataclass(frozen=True)
class Tokens:
    """A tokenizer that knows how long prompts become, and nothing else."""

    model_max_length: int

    def __call__(self, prompts: Sequence[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), self.model_max_length, dtype=torch.long))


def _unet(folder: Path) -> VideoUNet:
    if folders.unet_kind(folder, UNet2DConditionModel, VideoUNet) is UNet2DConditionModel:
        return exchange.build_unet(exchange.with_defaults(UNet2DConditionModel, folder), VIDEO_LDM)
    config = folders.plain(folders.read_json(folder / "config.json"))
    return exchange.build_unet(config, TemporalSpec.from_dict(config.get("temporal") or {}))


def _vae(folder: Path) -> AutoencoderKL:
    kind: Any = folders.unet_kind(folder, AutoencoderKL, VideoVAE)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder))


def _text(folder: Path) -> TextEncoders:
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)[: 1 + (folder / "text_encoder_2").is_dir()]
    found = [CLIPTextConfig.from_pretrained(folder / f"text_encoder{one}") for one in SUFFIXES[: len(kinds)]]
    with torch.device("meta"):
        networks = tuple(kind(config) for kind, config in zip(kinds, found, strict=True))
    tokenizers: Any = tuple(Tokens(config.max_position_embeddings) for config in found)
    return TextEncoders(networks, tokenizers, len(kinds) > 1)
