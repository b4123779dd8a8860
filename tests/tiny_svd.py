"""Stable Video Diffusion in float64, so small that twenty steps of training take two seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from helpers import randomise, tiny_unet, tiny_vae
from inflate.families.svd import SVD
from inflate.models.unet import TemporalSpec
from inflate.surgery import inflate_unet, inflate_vae
from inflate.training.economy import save_memory
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.memory_settings import Memory

FRAMES, SIDE = 2, 12


class Clips:
    """Five clips in float64; every `image`-th is one frame only (0 = none)."""

    def __init__(self, image: int = 0) -> None:
        self.image = image

    def __len__(self) -> int:
        return 5

    def __getitem__(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(number % 5)
        frames = 1 if self.image and number % self.image == 0 else FRAMES
        pixels = torch.rand(frames, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 2 - 1
        return {"pixels": pixels, "fps": torch.tensor(8.0), "motion": torch.tensor(0.2), "number": torch.tensor(number)}


def family() -> SVD:
    """All kinds of layers, of one level each, in float64."""
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = tiny_unet(True, block_out_channels=(8,), norm_num_groups=4, cross_attention_dim=8, **kinds)
    video_unet, _ = inflate_unet(unet, TemporalSpec(), in_channels=8)
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae, _ = inflate_vae(tiny_vae(block_out_channels=(8,), norm_num_groups=4, **kinds))
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=8,
    )  # fmt: skip
    made = SVD(video_unet, vae, CLIPVisionModelWithProjection(vision), frames=FRAMES)
    for network in (made.unet, made.vae, made.image_encoder):
        randomise(network.double())
    return made


def image_to_video(memory: Memory | None = None, **changes: Any) -> ImageToVideoTask:
    """A task on one held-out clip, as cheap as can be."""
    batch = {name: value[None] for name, value in Clips()[100].items()}
    small = ImageToVideo(held_out_clips=1, bands=1, preview_clips=1, **changes)
    task = ImageToVideoTask(family(), small, [batch], Preview(steps=1), lr=1e-3, seed=3)
    save_memory(task.family.unet, memory or Memory())
    return task


def largest_difference(ours: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest absolute difference between tensors of the same names."""
    assert ours.keys() == others.keys()
    return max(float((ours[name] - others[name]).abs().max()) for name in ours)
