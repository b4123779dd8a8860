"""DynamiCrafter, tiny, over the pocket model's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_video_ldm import write_text_model
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import randomise
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext

FRAMES, SIDE = 3, 16
STRETCHED = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CONTEXT = ImageContext(embedding=8, width=8, depth=1, heads=2, head_width=4, queries=2, frames=FRAMES)


def image_encoder() -> CLIPVisionModelWithProjection:
    """Of 16 pixels a side, in 4 patches of width 8."""
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    return CLIPVisionModelWithProjection(vision).eval()


def family(folder: Path, detail: bool = True, clips: Clips | None = None, **schedule: Any) -> DynamiCrafter:
    """A model all of whose layers do something, in float64; an empty folder is for what it is made of."""
    parent = VideoLDM.load(write_text_model(folder, **(schedule or STRETCHED)))
    clips = clips or Clips(FRAMES, 8.0, SIDE, SIDE)
    made = DynamiCrafter.from_text_to_video(parent, image_encoder(), clips, CONTEXT)
    if detail:
        made.take_detail()
    randomise(made.unet)
    for network in made.networks:
        network.double()
    return made
