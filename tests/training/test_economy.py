"""Measures that save memory are applied to the networks that they concern."""

from __future__ import annotations

import pytest

from helpers import tiny_vae
from inflate.errors import ConfigError
from inflate.models.vae import VideoVAE, streams
from inflate.training.economy import save_decoding
from inflate.training.memory_settings import Memory


def test_clips_are_decoded_in_parts_where_that_is_asked_for() -> None:
    image = tiny_vae()
    video = VideoVAE.from_2d(image)
    for rows in (0, 4):
        for vae in (image, video):
            save_decoding(vae, Memory(decode_rows=rows))
        assert streams(video) is streams(image) is (rows > 0)
    with pytest.raises(ConfigError, match=r"memory.decode_rows=-1: must be 1 or more, or 0"):
        Memory(decode_rows=-1)
