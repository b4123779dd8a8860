"""Ranges of pixels."""

import torch

from inflate.data.pixels import to_uint8, unit


def test_pixels_are_clipped_and_rounded_as_a_file_stores_them() -> None:
    pixels = torch.tensor([-2.0, 0.0, 2.0]).view(1, 3, 1, 1)
    assert unit(pixels).flatten().tolist() == [0.0, 0.5, 1.0]
    assert to_uint8(unit(pixels)).tolist() == [[[[0, 128, 255]]]]
