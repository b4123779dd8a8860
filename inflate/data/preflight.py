"""The check of all clips before the first step: each is decoded once, and is used or dropped with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from inflate.data import video
from inflate.data.buckets import Bucket, candidates, is_mixture, largest, nearest
from inflate.data.isolation import Helpers
from inflate.data.settings import Data
from inflate.data.sources import Clip
from inflate.data.windows import Window, frames_of, left_over, missed, windows
from inflate.errors import DataError
from inflate.tables import aligned

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with (clips checked, clips in all)."""
Known = Callable[[Clip], video.Probe | None]
"""What decoding a clip showed before; DataError where its file cannot be read."""
log = logging.getLogger(__name__)
_IN_FLIGHT = 8
"""Clips decoded together: more would pile up, each as large as the whole cache, behind a slow one."""
_SHOWN = 10
"""Dropped clips that the log lists; the table has all."""
_HEAD = ("clip", "frames", "fps", "size", "bucket", "")


@dataclass(frozen=True)
class Checked:
    """What the preflight found out about one clip."""

    clip: Clip
    probe: video.Probe | None
    """None if the clip does not decode"""
    windows: tuple[Window, ...]
    """its samples in an epoch, all of one bucket unless those are a mixture; none if it is dropped"""
    reason: str
    """why the clip is dropped; empty if it is used"""
    missed: Mapping[Bucket, str] = field(default_factory=dict)
    """the buckets of a mixture that a used clip does not serve in, being too short or slow for them, and why"""


@dataclass(frozen=True)
class Findings:
    """What decides whether a run may start, of all clips or of one process's."""

    clips: int
    dropped: list[tuple[str, str]]
    """names of clips, with the reason"""
    missed: list[tuple[Bucket, str, str]]
    """buckets of a mixture, names of clips that are left out of them, with the reason"""
    filled: frozenset[Bucket]

    @classmethod
    def joined(cls, parts: Sequence[Findings]) -> Findings:
        """Those of the clips of all parts together."""
        return cls(
            sum(part.clips for part in parts),
            [one for part in parts for one in part.dropped],
            [one for part in parts for one in part.missed],
            frozenset(bucket for part in parts for bucket in part.filled),
        )

    def refuse(self, settings: Data) -> None:
        """Raise DataError, listing the clips, if too many are dropped, or a bucket of a mixture has none."""
        if len(self.dropped) == self.clips or len(self.dropped) > settings.max_dropped * self.clips:
            raise DataError(
                f"{settings.path}: {len(self.dropped)} of {self.clips} clips are unusable, data.max_dropped "
                f"allows {settings.max_dropped:.0%}\n{_listed(self.dropped)}\n"
                "mend or remove them, or raise data.max_dropped; `inflate data check` lists every clip"
            )
        for bucket in settings.sizes if is_mixture(settings.sizes) else ():
            if bucket not in self.filled:
                faults = [(name, reason) for one, name, reason in self.missed if one == bucket]
                raise DataError(
                    f"data.buckets: no clip of {settings.path} fills {bucket}, so that it cannot have its share of the "
                    f"steps: leave it out, or let it ask for less\n{_listed(faults) or 'none has its shape'}"
                )

    def tell(self) -> None:
        """Log the first of the clips that are dropped, or left out of a bucket of a mixture, with the reasons."""
        left_out = [(name, f"left out of {bucket}: {reason}") for bucket, name, reason in self.missed]
        for what, faults in (("dropped", self.dropped), ("used, but", left_out)):
            for name, reason in faults[:_SHOWN]:
                log.warning("%s: %s: %s", what, name, reason)
            if len(faults) > _SHOWN:
                log.warning("... and %d more", len(faults) - _SHOWN)


@dataclass(frozen=True)
class Preflight:
    """Every clip with its windows and their bucket, or the reason it is dropped."""

    settings: Data
    rows: tuple[Checked, ...]

    @property
    def used(self) -> list[Checked]:
        return [row for row in self.rows if not row.reason]

    @property
    def dropped(self) -> list[Checked]:
        return [row for row in self.rows if row.reason]

    @property
    def findings(self) -> Findings:
        """What of it decides whether a run may start."""
        return Findings(
            len(self.rows),
            [(row.clip.name, row.reason) for row in self.dropped],
            [(bucket, row.clip.name, reason) for row in self.used for bucket, reason in row.missed.items()],
            frozenset(window.bucket for row in self.used for window in row.windows),
        )

    def summary(self) -> str:
        """One line on all clips, then one per bucket: clips, windows, drops, enlargements."""
        count = sum(len(row.windows) for row in self.used)
        text = f"{len(self.rows)} clips: {len(self.used)} used with {_windows(count)}, {len(self.dropped)} dropped"
        return "\n".join([text, *(self._bucket_line(bucket) for bucket in self.settings.sizes)])

    def table(self) -> str:
        """One aligned line per window or dropped clip, then the summary."""
        cells = [_HEAD, *(line for row in self.rows for line in _lines(row, self.settings))]
        return "\n".join([*aligned(cells), self.summary()])

    def tell(self) -> None:
        """Log the summary, and the first of the dropped clips with their reasons."""
        log.info("%s", self.summary())
        self.findings.tell()

    def refuse(self) -> None:
        """Raise DataError if too many clips are dropped, or a bucket of a mixture has none."""
        self.findings.refuse(self.settings)

    def _bucket_line(self, bucket: Bucket) -> str:
        counts = [sum(window.bucket == bucket for window in row.windows) for row in self.used]
        rows = [row for row, count in zip(self.used, counts, strict=True) if count]
        if not rows:
            return f"bucket {bucket}: no clip"
        clips = "1 clip" if len(rows) == 1 else f"{len(rows)} clips"
        text = f"bucket {bucket}: {_windows(sum(counts))} of {clips}"
        if left_out := sum(bucket in row.missed for row in self.used):
            text += f", {left_out} left out"
        if self.settings.tokens is not None:
            text += f", {bucket.batch(self.settings.tokens)} in a batch"
        small = sum(_is_enlarged(row, bucket) for row in rows)
        return text + (f", {small} enlarged to {bucket.width}x{bucket.height}" if small else "")


def _listed(faults: Sequence[tuple[str, str]]) -> str:
    """A line for each of the first clips, by name and reason."""
    shown = "\n".join(f"{name}: {reason}" for name, reason in faults[:_SHOWN])
    return shown + (f"\n... and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else "")


def preflight(
    clips: Sequence[Clip],
    settings: Data,
    progress: Progress | None = None,
    known: Known | None = None,
    seen: Callable[[Checked], None] | None = None,
) -> tuple[Preflight, Decoded]:
    """Decode every clip once: the table of what is used, and the decoded clips that fit in memory.

    They are decoded in helper processes, which a file that crashes or hangs the decoder takes with it instead of the
    run, unless `data.seconds_per_clip` is null. Those whose probe is `known` are not decoded; `seen` is called with
    each row at once.
    """
    decoded = Decoded(0 if known else settings.memory_megabytes * 2**20)
    rows: list[Checked] = []
    with Helpers(settings.seconds_per_clip) as helpers, ThreadPoolExecutor(helpers.count) as pool:
        for first in range(0, len(clips), _IN_FLIGHT):
            together = clips[first : first + _IN_FLIGHT]
            for row, frames in pool.map(lambda clip: _checked(clip, settings, decoded.left, helpers, known), together):
                rows.append(row)
                if seen is not None:
                    seen(row)
                if frames is not None and not row.reason:
                    decoded.add(row.clip.name, frames)
                if progress is not None:
                    progress(len(rows), len(clips))
    return Preflight(settings, tuple(rows)), decoded


class Decoded:
    """Decoded clips by name, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.frames: dict[str, Pixels] = {}

    def add(self, name: str, frames: Pixels) -> None:
        if frames.nbytes <= self.left:
            self.frames[name] = frames
            self.left -= frames.nbytes


def scan(media: video.Media, settings: Data, room: int) -> tuple[video.Probe, Pixels | None]:
    """Decode one clip whole, its frames as large as its likely bucket's; they are kept up to `room` bytes."""
    usual = candidates(settings.sizes, video.is_image(media)) or settings.sizes
    return video.scan(media, partial(_likely_size, usual), room)


def _likely_size(buckets: Sequence[Bucket], width: int, height: int) -> video.Size:
    """The size that frames will have, unless the clip turns out too short for the longest bucket of its aspect."""
    return largest(nearest(buckets, width, height), width, height).size


def _checked(
    clip: Clip, settings: Data, room: int, helpers: Helpers, known: Known | None
) -> tuple[Checked, Pixels | None]:
    found, frames = None, None
    try:
        found = known(clip) if known else None
        if found is None:
            found, frames = helpers.call(clip.media, scan, settings, room)
        taken = windows(found, settings)
    except DataError as error:
        return Checked(clip, found, (), str(error).removeprefix(f"{clip.media}: ")), None
    fits = frames is not None and any(frames.shape[1:3] == window.bucket.size for window in taken)
    return Checked(clip, found, tuple(taken), "", missed(found, settings)), frames if fits else None


# ---------------------------------------------------------------------------------------------------- the table


def _windows(count: int) -> str:
    return "1 window" if count == 1 else f"{count} windows"


def _is_enlarged(row: Checked, bucket: Bucket) -> bool:
    return row.probe is not None and (row.probe.height < bucket.height or row.probe.width < bucket.width)


def _lines(row: Checked, settings: Data) -> Iterator[tuple[str, ...]]:
    """The table's lines of one clip: one per window, or one that says why it is dropped."""
    probe = row.probe
    if probe is None:
        yield row.clip.name, "-", "-", "-", "-", f"dropped: {row.reason}"
        return
    rate = "image" if probe.is_image else f"{probe.fps:.4g}{' variable' if probe.variable else ''}"
    size = f"{probe.width}x{probe.height}{f' rotated {probe.rotation}' if probe.rotation else ''}"
    clip = row.clip.name, str(probe.frames), rate, size
    if row.reason:
        yield *clip, "-", f"dropped: {row.reason}"
    for window in row.windows:
        yield *clip, str(window.bucket), f"used: {_place(window, probe, settings)}{_rest(window, row, settings)}"
    for bucket, reason in row.missed.items():
        yield *clip, str(bucket), f"left out: {reason}"


def _place(window: Window, probe: video.Probe, settings: Data) -> str:
    if probe.is_image:
        return "the image"
    if window.bucket.is_still and len(window.starts) > 1:
        return f"one frame of {len(window.starts)}"
    first, last = (_ends(frames_of(window, start, probe, settings)) for start in (window.starts[0], window.starts[-1]))
    place = f"frames {first}"
    if len(window.starts) > 1:
        place += f" to {last}, one of {len(window.starts)}"
    slowest = f" to {window.wider[-1].fps:.4g}" if window.wider else ""
    return f"{place} at {window.fps:.4g}{slowest} fps"


def _ends(shown: Sequence[int]) -> str:
    return f"{shown[0]}-{shown[-1]}"


def _rest(window: Window, row: Checked, settings: Data) -> str:
    """What the last window of a clip leaves over, where the way of sampling is meant to show all of it."""
    taken = [one for one in row.windows if one.bucket == window.bucket]
    if row.probe is None or window is not taken[-1] or settings.window not in ("chunk", "slide", "full"):
        return ""
    count = left_over(taken, row.probe, settings)
    return f"; {count} left over" if count else ""
