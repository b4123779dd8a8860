"""Models without memory, from the configurations of their folders alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from inflate.models import exchange, folders
from inflate.models.text_encoders import SUFFIXES, TextEncoders
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE


@dataclass(frozen=True)
class Tokens:
    """A tokenizer that knows how long prompts become, and nothing else."""

    model_max_length: int

    def __call__(self, prompts: Sequence[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), self.model_max_length, dtype=torch.long))


def outline_unet(folder: Path) -> VideoUNet:
    """A `VideoUNet` on the meta device."""
    config = folders.plain(folders.read_json(folder / "config.json"))
    return exchange.build_unet(config, TemporalSpec.from_dict(config.get("temporal") or {}))


def outline_vae(folder: Path) -> AutoencoderKL:
    """An autoencoder, an image model's or one with a temporal decoder, on the meta device."""
    kind: Any = folders.unet_kind(folder, AutoencoderKL, VideoVAE)
    with torch.device("meta"):
        return kind.from_config(kind.load_config(folder))


def outline_text(folder: Path) -> TextEncoders:
    """The text encoders of a pipeline's folder, on the meta device."""
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)[: 1 + (folder / "text_encoder_2").is_dir()]
    found = [CLIPTextConfig.from_pretrained(folder / f"text_encoder{one}") for one in SUFFIXES[: len(kinds)]]
    with torch.device("meta"):
        networks = tuple(kind(config) for kind, config in zip(kinds, found, strict=True))
    tokenizers: Any = tuple(Tokens(config.max_position_embeddings) for config in found)
    return TextEncoders(networks, tokenizers, len(kinds) > 1)
