"""Ranges of pixels."""

import numpy as np
import torch

from inflate.data.pixels import tiled, to_uint8, unit


def test_pixels_are_clipped_and_rounded_as_a_file_stores_them() -> None:
    pixels = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1, 1)
    assert unit(pixels).flatten().tolist() == [0.0, 0.5, 1.0]
    assert to_uint8(unit(pixels)).tolist() == [[[[0, 128, 255]]]]


def test_clips_are_tiled_row_by_row() -> None:
    clips = [np.full((2, 1, 3, 3), value, np.uint8) for value in (1, 2, 3)]
    grid = tiled(clips)
    assert grid.shape == (2, 2, 6, 3)
    assert grid[1, :, ::3, 0].tolist() == [[1, 2], [3, 0]]
    assert np.array_equal(tiled(clips[:1]), clips[0])
