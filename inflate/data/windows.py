"""Windows: which frames of a clip make a sample, and which bucket they go to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from inflate.data.buckets import Bucket, candidates, is_mixture, largest, nearest, of_its_shape
from inflate.data.settings import Data
from inflate.data.video import Probe
from inflate.errors import DataError

IMAGE_FPS = 1.0
"""An image has no rate: it is told as a clip that lasts one second, and so is a single frame in a mixture."""


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
    return [window for bucket in _buckets(found, settings) for window in _windows_in(bucket, found, settings)]


def missed(found: Probe, settings: Data) -> dict[Bucket, str]:
    """The buckets of a mixture that a clip has the shape for, but does not fill, with the reasons."""
    if not is_mixture(settings.sizes):
        return {}
    asked = {bucket: _too_little(found, settings, bucket) for bucket in _of_its_shape(found, settings)}
    return {bucket: reason for bucket, reason in asked.items() if reason}


def _windows_in(bucket: Bucket, found: Probe, settings: Data) -> list[Window]:
    """The windows of a clip in a bucket that it fills."""
    if found.is_image:
        return [Window(bucket, range(1), IMAGE_FPS)]
    if bucket.is_still:
        return [Window(bucket, starts, IMAGE_FPS, offset) for starts, offset in _starts(found, settings, bucket)]
    strides = range(settings.stride + 1, (settings.stride_to or settings.stride) + 1)
    others = [replace(settings, stride=stride, stride_to=None) for stride in strides]
    wider = tuple(window for one in others for window in _cut(found, one, bucket) if window.starts)
    return [replace(window, wider=wider) for window in _cut(found, settings, bucket)]


def _cut(found: Probe, settings: Data, bucket: Bucket) -> list[Window]:
    """The windows of one stride."""
    stride = settings.stride
    spread = settings.window == "uniform"
    fps = _spread_rate(found, bucket.frames) if spread else _rate(found, settings, bucket) / stride
    return [Window(bucket, starts, fps, offset, stride) for starts, offset in _starts(found, settings, bucket)]


def frames_of(window: Window, start: int, found: Probe, settings: Data) -> list[int]:
    """The window's frame numbers; a steady clip at its own rate is counted, all others go by time stamps."""
    if settings.window == "uniform":
        return _spread(found, window.bucket.frames)
    steps = np.arange(window.bucket.frames) * window.stride
    if _is_counted(found, settings, window.bucket):
        return [int(i) for i in np.minimum(start + steps, found.frames - 1)]
    return found.shown_at(found.times[start] + window.offset + steps / _rate(found, settings, window.bucket))


def left_over(taken: Sequence[Window], found: Probe, settings: Data) -> int:
    """Frames behind the last of a clip's windows that no sample shows."""
    return found.frames - 1 - frames_of(taken[-1], taken[-1].starts[-1], found, settings)[-1]


def _buckets(found: Probe, settings: Data) -> list[Bucket]:
    """The buckets that a clip serves in: all that it fills of a mixture, otherwise one."""
    if found.is_image and not candidates(settings.sizes, image=True):
        raise DataError(
            f"an image, and no bucket has one frame: add one such as 1x{settings.main.height}x{settings.main.width} "
            "to data.buckets"
        )
    if is_mixture(settings.sizes):
        return _filled(found, settings, _of_its_shape(found, settings))
    near = nearest(candidates(settings.sizes, found.is_image), found.width, found.height)
    filled = near if found.is_image else _filled(found, settings, near)
    return [largest(filled, found.width, found.height)]


def _of_its_shape(found: Probe, settings: Data) -> list[Bucket]:
    """The buckets of a mixture that a clip serves in, as far as it is long and fast enough."""
    return of_its_shape(candidates(settings.sizes, found.is_image), found.width, found.height)


def _filled(found: Probe, settings: Data, near: Sequence[Bucket]) -> list[Bucket]:
    """Those of the buckets that a clip fills; DataError, with why it is none of the shortest, where it fills none."""
    filled = [bucket for bucket in near if not _too_little(found, settings, bucket)]
    if not filled:
        raise DataError(_too_little(found, settings, min(near, key=lambda bucket: bucket.frames)))
    return filled


def _too_little(found: Probe, settings: Data, bucket: Bucket) -> str:
    """Why a clip does not fill a bucket, being too slow or too short; nothing where it does."""
    rate = _rate(found, settings, bucket)
    if rate > 1.02 * found.typical_fps and not (found.is_image or bucket.is_still):
        asking = "data.fps" if bucket.fps is None else f"bucket {bucket}"
        return f"{found.typical_fps:.4g} frames per second, {asking} asks for {rate:.4g}: frames would repeat"
    return "" if _count(found, settings, bucket) else _too_short(found, settings, bucket)


def _too_short(found: Probe, settings: Data, bucket: Bucket) -> str:
    window = f"a window of {bucket.frames} frames"
    if is_mixture(settings.sizes):
        window += f" ({bucket})"
    elif len(settings.sizes) > 1:
        window += f" ({bucket}, the shortest bucket of the nearest aspect)"
    if settings.window == "uniform":
        return f"too short: {found.frames} frames for {window}"
    span = _span(found, settings, bucket) + 1 / _rate(found, settings, bucket)
    return f"too short: {found.duration:.4g} s, {window} takes {span:.4g} s"


def _count(found: Probe, settings: Data, bucket: Bucket) -> int:
    """First frames from which a window of the bucket fits: 0, 1, ... up to one less than this."""
    if settings.window == "uniform":
        return int(found.frames >= bucket.frames)
    ends = np.asarray(found.times) + _span(found, settings, bucket)
    return int(np.searchsorted(ends, _last(found), side="right"))


def _starts(found: Probe, settings: Data, bucket: Bucket) -> Iterator[tuple[range, float]]:
    """Where the windows of a clip may start, and how long after: the clip is known to be long enough for one."""
    count = _count(found, settings, bucket)
    if settings.window == "random":
        yield range(count), 0.0
    elif settings.window == "centre":
        yield range((count - 1) // 2, (count - 1) // 2 + 1), 0.0
    elif settings.window in ("chunk", "slide"):
        hop = bucket.frames if settings.window == "chunk" else settings.hop or max(1, bucket.frames // 2)
        yield from _every(found, settings, bucket, hop * settings.stride)
    else:
        yield range(1), 0.0


def _every(found: Probe, settings: Data, bucket: Bucket, hop: int) -> Iterator[tuple[range, float]]:
    """The starts, `hop` frames of the (resampled) clip apart, of all windows that fit."""
    if _is_counted(found, settings, bucket):
        yield from ((range(start, start + 1), 0.0) for start in range(0, _count(found, settings, bucket), hop))
        return
    end, rate = _last(found) - _span(found, settings, bucket), _rate(found, settings, bucket)
    times = np.arange(0.0, end, hop / rate)
    for time, start in zip(times, found.shown_at(times), strict=True):
        yield range(start, start + 1), float(time) - found.times[start]


def _is_counted(found: Probe, settings: Data, bucket: Bucket) -> bool:
    """Whether frames are taken by their number; else by their time."""
    return settings.rate(bucket) is None and not found.variable


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


def _span(found: Probe, settings: Data, bucket: Bucket) -> float:
    """Seconds from a window's first frame to its last."""
    return (bucket.frames - 1) * settings.stride / _rate(found, settings, bucket)


def _rate(found: Probe, settings: Data, bucket: Bucket) -> float:
    return settings.rate(bucket) or found.fps
