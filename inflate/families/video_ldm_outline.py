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

from inflate.families.video_ldm import FAMILY, Clips, VideoLDM
from inflate.models import exchange, folders, single_file, temporal_layers
from inflate.models.single_file_text import load_text_encoders
from inflate.models.stable_diffusion import load_noise, noise_of
from inflate.models.text_encoders import SUFFIXES, TextEncoders
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE


def outline(path: str | Path, tokenizer: str | Path | None = None) -> VideoLDM:
    """What `VideoLDM.load` loads from a folder, by a published name, or from a file, on the meta device.

    No weights are read. CheckpointError where a configuration is missing, or a file is not whole.
    """
    if str(path).endswith(folders.SAFETENSORS):
        return _of_file(Path(path).expanduser(), tokenizer)
    folder = folders.outline(path)
    if temporal_layers.are_in(folder):
        return outline(temporal_layers.image_model_of(folder / folders.SETTINGS_FILE, FAMILY), tokenizer)
    noise = load_noise(folder / "scheduler")
    return VideoLDM(_unet(folder / "unet"), _vae(folder / "vae"), _text(folder), noise, Clips())


@dataclass(frozen=True)
class Tokens:
    """A tokenizer that knows how long prompts become, and nothing else."""

    model_max_length: int

    def __call__(self, prompts: Sequence[str], **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), self.model_max_length, dtype=torch.long))


def _of_file(file: Path, tokenizer: str | Path | None) -> VideoLDM:
    image = single_file.load_image_model(file, "epsilon", exchange.read_headers)  # what it predicts costs nothing
    text = load_text_encoders(file, tokenizer, exchange.read_headers)
    for network in (image.vae, *text.networks):
        network.float()
    unet = exchange.build_unet(folders.plain(image.unet.config), VIDEO_LDM)
    return VideoLDM(unet, image.vae, text, noise_of(image.noise.config, file), Clips())


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
