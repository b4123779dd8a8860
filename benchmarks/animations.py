"""What clips drawn of first frames keep of them, and how they move: the same for every family that animates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inflate.data import demo
from inflate.data.motion import motion_score
from inflate.data.pixels import to_uint8, unit
from inflate.metrics.video import psnr, ssim
from inflate.models.stable_diffusion import TextToVideo
from record import command, record, write
from scenes import agreement, likeness

Embed = Callable[[Tensor], Tensor]
"""Vectors (N, D) of frames (N, 3, H, W) in [-1, 1], by an image encoder and its projection."""


@torch.no_grad()
def reconstructed(family: TextToVideo, clips: Tensor) -> Tensor:
    """What the autoencoder makes of clips (N, F, 3, H, W) in [-1, 1]."""
    return torch.cat([family.decode(family.encode(clip)) for clip in clips.split(1)]).clamp(-1, 1)


def moving(clips: Tensor, scenes: list[demo.Scene]) -> dict[str, float]:
    """The share of clips (N, F, 3, H, W) in [-1, 1] that move as their captions say, and how much all do."""
    judged = agreement(clips, scenes)
    return {"moves as captioned": judged["share"], "by chance": judged["chance"], "motion per frame": amount(clips)}


def amount(clips: Tensor) -> float:
    """The mean motion of clips (N, F, 3, H, W) in [-1, 1] from frame to frame, in sides; noise moves, too."""
    return fmean(motion_score(to_uint8(unit(clip)), 1.0) for clip in clips)


@torch.no_grad()
def cosines(embed: Embed, clips: Tensor, images: Tensor) -> Tensor:
    """The mean cosine (N,) of the frames of clips (N, F, 3, H, W) to an image each (N, 3, H, W)."""
    frames = F.normalize(embed(clips.flatten(0, 1)), dim=-1).unflatten(0, clips.shape[:2])  # (N, F, D)
    return (frames @ F.normalize(embed(images), dim=-1)[:, :, None])[..., 0].mean(1)


def keeping(embed: Embed, clips: Tensor, truth: Tensor, scenes: list[demo.Scene]) -> dict[str, float]:
    """What clips (N, F, 3, H, W) in [-1, 1] keep of the real ones' first frames, and how they move."""
    first, real = unit(clips[:, :1]), unit(truth[:, :1])
    return {
        "psnr": float(psnr(first, real).mean()),
        "ssim": float(ssim(first, real).mean()),
        "cosine": float(cosines(embed, clips, truth[:, 0]).mean()),
        **likeness(clips, scenes),
        **moving(clips, scenes),
    }


def tell(
    path: Path, result: dict[str, Any], places: Sequence[str], runs: Sequence[str], refiners: Sequence[str] = ()
) -> None:
    """Write a result below the command that found it.

    In it the script's first arguments stand by the names of `places`, `refiners` as REFINER, runs by their stages.
    """
    names = {text: text.partition("=")[0] + "=RUN" for text in runs} | dict.fromkeys(refiners, "REFINER")
    told = command(*places)
    for text, name in names.items():
        told = told.replace(text, name)
    write(path, record(told, result))
