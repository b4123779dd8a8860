"""DynamiCrafter, tiny, over the pocket model's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_video_ldm import PROMPT, clip, write_text_model
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import randomise
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext
from inflate.training.encoding import ImageTextClipEncoder

FRAMES, SIDE = 3, 16
STRETCHED = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CONTEXT = ImageContext(embedding=8, width=8, depth=1, heads=2, head_width=4, queries=2, frames=FRAMES)


def image_encoder(seed: int = 3) -> CLIPVisionModelWithProjection:
    """Of 16 pixels a side, in 4 patches of width 8."""
    torch.manual_seed(seed)
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


def made(folder: Path, detail: bool = True, context: ImageContext | None = CONTEXT) -> DynamiCrafter:
    """The text-to-video model of a folder, made one that animates images, in float32; all its layers do something."""
    torch.manual_seed(5)
    text = VideoLDM.load(folder)
    family = DynamiCrafter.from_text_to_video(text, image_encoder(), Clips(FRAMES), context)
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
