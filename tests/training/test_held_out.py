"""Held-out clips of several sizes."""

from __future__ import annotations

from typing import Any

import torch

from inflate.data.buckets import Bucket
from inflate.training.held_out import of_size


def clip(frames: int, side: int, fps: float) -> dict[str, Any]:
    pixels, stride = torch.zeros(1, frames, 3, side, side), torch.tensor([2.0])
    return {"pixels": pixels, "fps": torch.tensor([fps]), "stride": stride}


def test_an_export_remembers_the_rate_of_a_clip_of_the_main_buckets_size() -> None:
    clips = [clip(1, 16, 1.0), clip(4, 32, 4.0), clip(4, 16, 8.0), clip(4, 16, 6.0)]
    assert of_size(clips, Bucket(4, 16, 16)) is clips[2]
    assert of_size(clips, Bucket(9, 16, 16)) is clips[0]


def test_a_buckets_own_rate_is_remembered_whatever_the_clips_of_its_size_have() -> None:
    for frames in (4, 9):
        assert float(of_size([clip(4, 16, 8.0)], Bucket(frames, 16, 16, 12.0))["fps"][0]) == 6.0, "every second frame"
