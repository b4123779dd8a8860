"""Between the networks' [-1, 1], the measures' [0, 1] and the files' 0 to 255."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def unit(pixels: Tensor) -> Tensor:
    """Pixels of [-1, 1] in [0, 1], float32, clipped as a file would be."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)


def to_float(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Frames (F, H, W, 3) of a file as (F, 3, H, W) in [-1, 1].

    In numpy: torch would start threads for so little work, and those get in the way of the model's.
    """
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(frames: Tensor) -> npt.NDArray[np.uint8]:
    """Frames (F, 3, H, W) in [0, 1] as uint8 (F, H, W, 3)."""
    return np.asarray((frames * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def tiled(clips: Sequence[npt.NDArray[np.uint8]], columns: int | None = None) -> npt.NDArray[np.uint8]:
    """Clips (F, H, W, 3) of one size as one (F, rows * H, columns * W, 3), by default about as many rows as columns."""
    columns = columns or math.ceil(math.sqrt(len(clips)))
    empty = [np.zeros_like(clips[0])] * (-len(clips) % columns)
    cells = [*clips, *empty]
    rows = [np.concatenate(cells[first : first + columns], axis=2) for first in range(0, len(cells), columns)]
    return np.concatenate(rows, axis=1)
