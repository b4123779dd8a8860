"""How well frames agree with a prompt, and with each other, by a CLIP model from a folder.

Agreement is the cosine between the embeddings of a frame and of the prompt, mean over frames (CLIPSIM: Wu et al. 2021;
no factor of 100, negative values kept); consistency the mean cosine of consecutive frames' embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from inflate.errors import CheckpointError, DataError
from inflate.models.unet import load_strictly
from inflate.models.weights import weights_sha256

BATCH = 32
"""Frames embedded together."""
_LAYOUTS = (
    "give the folder of a CLIP model (config.json, model.safetensors, tokenizer files), or one with the sub-folders "
    "text_encoder, image_encoder and tokenizer"
)


@dataclass(frozen=True)
class ClipModel:
    """The two towers of a CLIP model, its tokenizer and its image processor."""

    embed_text: Callable[..., Tensor]
    """unnormalised embeddings (N, D) of the tokenizer's output"""
    embed_images: Callable[[Tensor], Tensor]
    """unnormalised embeddings (N, D) of the processor's output"""
    tokenizer: Any
    processor: Any
    positions: int
    """tokens of a prompt that it sees, the marks of beginning and end included"""
    device: torch.device
    sha256: str
    """of its weights"""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> ClipModel:
        """Read a whole CLIP model's folder (transformers), or one with text_encoder, image_encoder and tokenizer.

        The second is diffusers' layout; its towers must both have a projection, to as many dimensions. The image
        processor is that of preprocessor_config.json, else CLIP's own at the model's image size. Raises CheckpointError
        naming what is missing.
        """
        device = torch.device(device)
        if (folder / "text_encoder").is_dir() and (folder / "image_encoder").is_dir():
            return _paired(folder, device)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder} holds no CLIP model; {_LAYOUTS}")
        return _whole(folder, device)

    @torch.no_grad()
    def frames(self, frames: npt.NDArray[np.uint8]) -> Tensor:
        """Unit vectors (F, D) of frames (F, H, W, 3): scaled to cover CLIP's square, cropped about the centre."""
        parts = []
        for first in range(0, len(frames), BATCH):
            pixels = self.processor(list(frames[first : first + BATCH]), return_tensors="pt")["pixel_values"]
            parts.append(self.embed_images(pixels.to(self.device)))
        return F.normalize(torch.cat(parts), dim=-1)  # (F, D)

    @torch.no_grad()
    def prompt(self, prompt: str) -> Tensor:
        """The unit vector (D,) of a prompt, of which CLIP sees as many tokens as it has positions."""
        tokens = self.tokenizer(prompt, truncation=True, max_length=self.positions, return_tensors="pt")
        return F.normalize(self.embed_text(**tokens.to(self.device))[0], dim=-1)  # (D,)

    def is_cut(self, prompt: str) -> bool:
        """Whether a prompt has more tokens than CLIP sees."""
        return len(self.tokenizer(prompt)["input_ids"]) > self.positions


def agreement(frames: Tensor, prompt: Tensor) -> Tensor:
    """Cosine of each frame with the prompt (F,), of unit vectors (F, D) and (D,)."""
    return frames @ prompt  # (F,)


def consistency(frames: Tensor) -> float:
    """Mean cosine of consecutive frames, of unit vectors (F >= 2, D); DataError for a single one."""
    if len(frames) < 2:
        raise DataError("the consistency of frames needs two or more of them")
    return float((frames[1:] * frames[:-1]).sum(-1).mean())


def _whole(folder: Path, device: torch.device) -> ClipModel:
    model = _loaded(CLIPModel, folder, device)
    return ClipModel(
        lambda **tokens: model.get_text_features(**tokens).pooler_output,
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        _tokenizer(folder),
        _processor(folder, model.config.vision_config.image_size),
        model.config.text_config.max_position_embeddings,
        device,
        weights_sha256(model),
    )


def _paired(folder: Path, device: torch.device) -> ClipModel:
    text = _loaded(CLIPTextModelWithProjection, folder / "text_encoder", device)
    vision = _loaded(CLIPVisionModelWithProjection, folder / "image_encoder", device)
    dimensions = text.config.projection_dim, vision.config.projection_dim
    if dimensions[0] != dimensions[1]:
        raise CheckpointError(
            f"{folder}: its text and image towers embed in {dimensions}: they are of different models"
        )
    return ClipModel(
        lambda **tokens: text(**tokens).text_embeds,
        lambda pixels: vision(pixel_values=pixels).image_embeds,
        _tokenizer(folder / "tokenizer"),
        _processor(folder / "feature_extractor", vision.config.image_size),
        text.config.max_position_embeddings,
        device,
        f"{weights_sha256(text)}+{weights_sha256(vision)}",
    )


def _loaded(kind: Any, folder: Path, device: torch.device) -> Any:
    try:
        model = load_strictly(kind.from_pretrained, folder, {"dtype": torch.float32})
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; download or copy it again") from error
    return model.eval().requires_grad_(False).to(device)


def _tokenizer(folder: Path) -> Any:
    if not any(
        (folder / name).is_file() for name in ("tokenizer.json", "vocab.json")
    ):  # transformers makes an empty one
        raise CheckpointError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt); {_LAYOUTS}")
    return CLIPTokenizer.from_pretrained(folder)


def _processor(folder: Path, side: int) -> Any:
    if (folder / "preprocessor_config.json").is_file():
        return CLIPImageProcessorPil.from_pretrained(folder)
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
