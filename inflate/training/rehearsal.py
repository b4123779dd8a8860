"""A rehearsal of training: the pocket model on clips of noise, to try out machines; nothing is learnt from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from inflate.data.clips import Item, collate
from inflate.families.svd import SVD
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.loop import Batch, Numbers
from inflate.training.noise import seed_of
from inflate.training.processes import join_processes
from inflate.training.settings import Training

FRAMES, SIDE = 2, 32


class NoiseClips:
    """Eight clips of pixels that depend on the sample number alone."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> Item:
        generator = torch.Generator().manual_seed(seed_of("rehearsal", number))
        pixels = torch.rand(FRAMES, 3, SIDE, SIDE, generator=generator) * 2 - 1
        return {
            "pixels": pixels, "fps": torch.tensor(8.0), "stride": torch.tensor(1.0), "motion": torch.tensor(0.2),
            "caption": "", "number": torch.tensor(number), "name": f"noise {number}",
        }  # fmt: skip


def settings(output: Path, **changes: Any) -> Training:
    """Settings of a rehearsal, which is short and quiet and reads clips in its own process."""
    return Training(output=output, workers=0, log_every=1, tracker="none", progress=False, **changes)


def batches(training: Training, processes: int, process: int) -> list[Batch]:
    """What one of so many processes trains on, one batch per forward pass."""
    clips = NoiseClips()
    numbers = Numbers(clips, training, processes, process, 0)
    return [dict(collate([clips[number] for number in row])) for row in numbers]


def pocket_task(training: Training) -> ImageToVideoTask:
    """The pocket model, inflated as a recipe does it, on this process's device."""
    torch.manual_seed(seed_of(training.seed, "model"))
    family = SVD.load("pocket", frames=FRAMES).to(join_processes().device)
    small = ImageToVideo(held_out_clips=1, bands=1, preview_clips=1)
    held_out = dict(collate([NoiseClips()[-1]]))
    return ImageToVideoTask(family, small, [held_out], Preview(steps=1), training.lr, training.seed)
