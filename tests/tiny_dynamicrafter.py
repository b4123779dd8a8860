"""A tiny DynamiCrafter: the tiny text-to-video model, which attends to an image and is shown its latent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_video_ldm import FRAMES, PROMPT, clip
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import randomise
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext
from inflate.training.encoding import ImageTextClipEncoder

CONTEXT = ImageContext(embedding=8, width=16, depth=1, heads=2, head_width=8, queries=2, frames=FRAMES)


def vision(seed: int = 3) -> CLIPVisionModelWithProjection:
    """An image encoder of one layer, whose images are cut into four patches."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def made(folder: Path, detail: bool = True, context: ImageContext | None = CONTEXT) -> DynamiCrafter:
    """The text-to-video model of a folder, made one that animates images; all of its weights take part."""
    text = VideoLDM.load(folder)
    torch.manual_seed(5)
    family = DynamiCrafter.from_text_to_video(text, vision(), Clips(FRAMES), context)
    if detail:
        family.take_detail()
    randomise(family.unet)
    return family


def strided(number: int, frames: int = FRAMES) -> dict[str, Any]:
    """A batch of one clip, of which every second frame is taken."""
    return {**clip(number, frames), "stride": torch.tensor([2.0])}


class CachedClips:
    """Four clips as a cache gives them, with the features of every frame or of the first."""

    def __init__(self, family: DynamiCrafter, every_frame: bool = True, frames: int = FRAMES) -> None:
        encoder = ImageTextClipEncoder(family, "float32", every_frame)
        text = {name: rows[0] for name, rows in encoder.captions([PROMPT]).items()}
        self.items = [self._item(encoder, strided(n, frames)["pixels"][0]) | text for n in range(4)]

    @staticmethod
    def _item(encoder: ImageTextClipEncoder, pixels: torch.Tensor) -> dict[str, Any]:
        starts = {name: rows[0] for name, rows in encoder.starts(pixels[:1], [""]).items()}
        told = {"fps": torch.tensor(8.0), "stride": torch.tensor(2.0)}
        return {"latents": encoder.latents(pixels), **encoder.of_frames(pixels), **starts, **told}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.items[number % 4], "number": torch.tensor(number)}
