"""A tiny DynamiCrafter with the pocket model's text encoder, whose every condition matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_video_ldm import FRAMES, SIDE, write_text_model
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import randomise
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext

CONTEXT = ImageContext(embedding=16, width=8, depth=1, heads=2, head_width=4, queries=2, frames=FRAMES)


def image_encoder() -> CLIPVisionModelWithProjection:
    """Of four patches."""
    torch.manual_seed(5)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        projection_dim=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(config).eval()


def write_dynamicrafter(folder: Path, detail: bool = True, **clips: Any) -> Path:
    """An export in `folder`/model of clips of three frames of 16x16, with random weights; `clips` are its settings."""
    parent = VideoLDM.load(write_text_model(folder / "parent", prediction_type="v_prediction"))
    told = Clips(**{"frames": FRAMES, "height": SIDE, "width": SIDE} | clips)
    family = DynamiCrafter.from_text_to_video(parent, image_encoder(), told, CONTEXT)
    if detail:
        family.take_detail()
    randomise(family.unet, scale=0.1)
    family.save_pretrained(folder / "model")
    return folder / "model"
