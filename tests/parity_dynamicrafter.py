"""DynamiCrafter compared with recordings of its original: what compares which, and what the image encoder is shown."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from parity_cases import WEIGHTS, Case, Runner, difference, read_json
from parity_dynamicrafter_keys import checkpoint_key_cases, query_key_cases, unet_key_cases, vae_key_cases
from parity_dynamicrafter_steps import described_cases, sampling_cases, table_cases, training_cases
from parity_dynamicrafter_unet import block_cases, query_cases, unet_cases
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD, shown

PIXEL = 1e-5  # float32 sums of a blur, in another order on another processor
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
RUNNERS: dict[str, Runner] = {
    r"unet_\w+_intermediates": block_cases,
    r"resampler_\w+": query_cases,
    r"train_sampler_\w+": described_cases,
    r"train_\w+": training_cases,
    r"sampler_\w+": sampling_cases,
    r"schedule": table_cases,
    r"state_keys_full_ckpt_\d\w*": checkpoint_key_cases,
    r"state_keys_resampler_\d\w*": query_key_cases,
    r"state_keys_vae_\d\w*": vae_key_cases,
    r"state_keys_\d\w*": unet_key_cases,
}
"""By the names of recordings, the first that fits."""


def runner_of(folder: Path, stem: str) -> Runner | None:
    """What compares a recording of a folder; None where it is not of this family."""
    described = folder / f"{stem}.json"
    if stem.startswith("unet_") and described.is_file():
        return unet_cases if "unet_config" in read_json(described) else None
    if stem == "clip_preprocess":
        return pixel_cases
    return next((runner for pattern, runner in RUNNERS.items() if re.fullmatch(pattern, stem)), None)


def pixel_cases(folder: Path, stem: str) -> Iterator[Case]:
    """What the image encoder is shown of images in [-1, 1]: rows, every n-th pixel, and the value of a grey image."""
    recorded = load_file(folder / f"{stem}{WEIGHTS}")
    size = next(tensor.shape[-1] for key, tensor in recorded.items() if ".y_row" in key)
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**TINY, image_size=size, patch_size=size))
    for key, theirs in recorded.items():
        name, what = key.split(".")
        if what != "x_int8":
            image = torch.zeros(1, 3, 8, 8) if name == "zeros" else recorded[f"{name}.x_int8"].float() / 127
            yield Case(f"{stem}.{key}", difference(_shown_part(encoder, image, what), theirs), PIXEL)


def _shown_part(encoder: CLIPVisionModelWithProjection, image: Tensor, what: str) -> Tensor:
    pixels = shown(encoder, image, CLIP_MEAN, CLIP_STD)  # (B, 3, size, size)
    if what == "value_per_channel":
        return pixels[0, :, 0, 0]
    if match := re.fullmatch(r"y_row(\d+)", what):
        return pixels[:, :, int(match[1])]
    if match := re.fullmatch(r"y_strided(\d+)", what):
        step = int(match[1])
        return pixels[:, :, ::step, ::step]
    raise ValueError(f"{what} is not known")
