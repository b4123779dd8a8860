"""Small video files of every kind, sound and damaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_files import Pixels

MakeClip = Callable[..., Path]


@pytest.fixture
def make_clip(tmp_path: Path) -> MakeClip:
    """Encode frames with PyAV directly, so that the tests of reading do not rest on our writing."""

    def make(
        name: str,
        frames: Pixels,
        fps: float = 8,
        codec: str = "libx264",
        stamps: Sequence[int] | None = None,
        rotation: int = 0,
        gap: int = 12,
        kind: str | None = None,
        ratio: Fraction | None = None,
        encoder: dict[str, str] | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"movflags": "+faststart"} if name.endswith("mp4") else {}
        with av.open(str(path), "w", format=kind, options=options) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.codec_context.thread_count = 1
            stream.codec_context.gop_size = gap
            stream.codec_context.options = encoder or {}
            if ratio:
                stream.codec_context.sample_aspect_ratio = ratio
            if rotation:
                stream.set_display_rotation(rotation)
            for number, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                if stamps is not None:
                    frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


@pytest.fixture
def make_sound(tmp_path: Path) -> MakeClip:
    """A file with a sound track and no picture."""

    def make(name: str) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=16_000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16_000
            frame.pts = 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return path

    return make


@pytest.fixture
def make_frameless(tmp_path: Path) -> MakeClip:
    """An mp4 whose header declares a video stream in which there is no frame."""

    def make(name: str) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
            container.start_encoding()
        return path

    return make
