"""Windows: which frames of a clip make a sample, and which bucket they go to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from inflate.data.buckets import Bucket, candidates, largest, nearest
from inflate.data.settings import Data
from inflate.data.video import Probe
from inflate.errors import DataError

IMAGE_FPS = 1.0
"""An image has no rate: it is told as a clip that lasts one second."""


@dataclass(frozen=True)
class Window:
    """Frames of one clip that make a sample in one bucket."""

    bucket: Bucket
    starts: range
    """frames of the clip that it may start at: those that a random window is drawn from, one for all others"""
    fps: float
    """frames per second that the model is told"""
    offset: float = 0.0
    """seconds that it begins after its first frame appears, where it goes by time"""
    stride: int = 1
    """frames of the (resampled) clip from one to the next"""
    wider: tuple[Window, ...] = ()
    """the same with greater strides, where each sample draws its own"""

    @property
    def variants(self) -> tuple[Window, ...]:
        """The windows of all strides that a sample may draw."""
        return (self, *self.wider)

    @property
    def middle(self) -> int:
        """The middle of the starts."""
        return self.starts[(len(self.starts) - 1) // 2]


def windows(found: Probe, settings: Data) -> list[Window]:
    """The windows of one clip in an epoch, by `data.window`; raises DataError with the reason where there is none."""
    if found.is_image:
        return [Window(_bucket_of_image(found, settings), range(1), IMAGE_FPS)]
    _refuse_slow(found, settings)
    bucket = _bucket_of_video(found, settings)
    strides = range(settings.stride + 1, (settings.stride_to or settings.stride) + 1)
    others = [replace(settings, stride=stride, stride_to=None) for stride in strides]
    wider = tuple(window for one in others for window in _cut(found, one, bucket) if window.starts)
    return [replace(window, wider=wider) for window in _cut(found, settings, bucket)]


def _cut(found: Probe, settings: Data, bucket: Bucket) -> list[Window]:
    """The windows of one stride."""
    stride = settings.stride
    fps = _spread_rate(found, bucket.frames) if settings.window == "uniform" else _rate(found, settings) / stride
    return [Window(bucket, starts, fps, offset, stride) for starts, offset in _starts(found, settings, bucket.frames)]


def frames_of(window: Window, start: int, found: Probe, settings: Data) -> list[int]:
    """The window's frame numbers; a steady clip at its own rate is counted, all others go by time stamps."""
    if settings.window == "uniform":
        return _spread(found, window.bucket.frames)
    steps = np.arange(window.bucket.frames) * window.stride
    if _is_counted(found, settings):
        return [int(i) for i in np.minimum(start + steps, found.frames - 1)]
    return found.shown_at(found.times[start] + window.offset + steps / _rate(found, settings))


def left_over(taken: Sequence[Window], found: Probe, settings: Data) -> int:
    """Frames behind the last of a clip's windows that no sample shows."""
    return found.frames - 1 - frames_of(taken[-1], taken[-1].starts[-1], found, settings)[-1]


def _refuse_slow(found: Probe, settings: Data) -> None:
    rate = _rate(found, settings)
    if rate > 1.02 * found.typical_fps:
        raise DataError(f"{found.typical_fps:.4g} frames per second, data.fps asks for {rate:.4g}: frames would repeat")


def _bucket_of_image(found: Probe, settings: Data) -> Bucket:
    single = candidates(settings.sizes, image=True)
    if not single:
        raise DataError(
            f"an image, and no bucket has one frame: add one such as 1x{settings.main.height}x{settings.main.width} "
            "to data.buckets"
        )
    return largest(nearest(single, found.width, found.height), found.width, found.height)


def _bucket_of_video(found: Probe, settings: Data) -> Bucket:
    """The bucket of the nearest aspect and, of those that the clip fills, of most frames."""
    near = nearest(candidates(settings.sizes, image=False), found.width, found.height)
    filled = [bucket for bucket in near if _count(found, settings, bucket.frames)]
    if filled:
        return largest(filled, found.width, found.height)
    shortest = min(near, key=lambda bucket: bucket.frames)
    raise DataError(_too_short(found, settings, shortest))


def _too_short(found: Probe, settings: Data, bucket: Bucket) -> str:
    window = f"a window of {bucket.frames} frames"
    if len(settings.sizes) > 1:
        window += f" ({bucket}, the shortest bucket of the nearest aspect)"
    if settings.window == "uniform":
        return f"too short: {found.frames} frames for {window}"
    span = _span(found, settings, bucket.frames) + 1 / _rate(found, settings)
    return f"too short: {found.duration:.4g} s, {window} takes {span:.4g} s"


def _count(found: Probe, settings: Data, frames: int) -> int:
    """First frames from which a window of so many frames fits: 0, 1, ... up to one less than this."""
    if settings.window == "uniform":
        return int(found.frames >= frames)
    ends = np.asarray(found.times) + _span(found, settings, frames)
    return int(np.searchsorted(ends, _last(found), side="right"))


def _starts(found: Probe, settings: Data, frames: int) -> Iterator[tuple[range, float]]:
    """Where the windows of a clip may start, and how long after: the clip is known to be long enough for one."""
    count = _count(found, settings, frames)
    if settings.window == "random":
        yield range(count), 0.0
    elif settings.window == "centre":
        yield range((count - 1) // 2, (count - 1) // 2 + 1), 0.0
    elif settings.window in ("chunk", "slide"):
        hop = frames if settings.window == "chunk" else settings.hop or max(1, frames // 2)
        yield from _every(found, settings, frames, hop * settings.stride)
    else:
        yield range(1), 0.0


def _every(found: Probe, settings: Data, frames: int, hop: int) -> Iterator[tuple[range, float]]:
    """The starts, `hop` frames of the (resampled) clip apart, of all windows that fit."""
    if _is_counted(found, settings):
        yield from ((range(start, start + 1), 0.0) for start in range(0, _count(found, settings, frames), hop))
        return
    times = np.arange(0.0, _last(found) - _span(found, settings, frames), hop / _rate(found, settings))
    for time, start in zip(times, found.shown_at(times), strict=True):
        yield range(start, start + 1), float(time) - found.times[start]


def _is_counted(found: Probe, settings: Data) -> bool:
    """Whether frames are taken by their number; else by their time."""
    return settings.fps is None and not found.variable


def _last(found: Probe) -> float:
    """The latest time of a window's last frame, half a frame forgiven."""
    return found.times[-1] + 0.5 / found.typical_fps


def _spread(found: Probe, frames: int) -> list[int]:
    """So many frames from the first to the last, evenly in number, or in time where the rate varies; one is central."""
    if frames == 1:
        return [(found.frames - 1) // 2]
    if found.variable:
        return found.shown_at(np.linspace(0, found.times[-1], frames))
    return [int(i) for i in np.linspace(0, found.frames - 1, frames).round()]


def _spread_rate(found: Probe, frames: int) -> float:
    return (frames - 1) / found.times[-1] if frames > 1 else found.fps


def _span(found: Probe, settings: Data, frames: int) -> float:
    """Seconds from a window's first frame to its last."""
    return (frames - 1) * settings.stride / _rate(found, settings)


def _rate(found: Probe, settings: Data) -> float:
    return found.fps if settings.fps is None else settings.fps
