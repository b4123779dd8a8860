"""Windows of frames out of clips: checked before the first step, then a function of (seed, sample number)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import numpy.typing as npt

from inflate.data import video
from inflate.data.motion import motion_score
from inflate.data.settings import Data
from inflate.data.sources import Clip, find_clips
from inflate.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to import, and a clip check needs none of it
    from torch import Tensor

__all__ = ["Batch", "Checked", "ClipDataset", "Data", "Item", "Preflight", "collate", "preflight"]

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with (clips checked, clips in all)."""
log = logging.getLogger(__name__)
_IN_FLIGHT = 8
"""Clips decoded together: more would pile up, each as large as the whole cache, behind a slow one."""
_ORDER, _START = 0, 1
"""Purposes that keep the random streams of one seed apart."""


class Item(TypedDict):
    """One sample; `collate` stacks them."""

    pixels: Tensor
    """float32 (F, 3, H, W) in [-1, 1]"""
    fps: Tensor
    """float32 (), of the window: the clip's rate, or data.fps, over the stride"""
    motion: Tensor
    """float32 (), see `motion_score`"""
    caption: str
    number: Tensor
    """int64 (), the sample number"""
    name: str


class Batch(TypedDict):
    """Items stacked: a leading batch axis on each tensor."""

    pixels: Tensor
    fps: Tensor
    motion: Tensor
    caption: list[str]
    number: Tensor
    name: list[str]


@dataclass(frozen=True)
class Checked:
    """What the preflight found out about one clip."""

    clip: Clip
    probe: video.Probe | None
    """None if the clip does not decode"""
    fps: float
    """of the windows, frames per second; 0 if the clip is dropped"""
    starts: int
    """windows that fit, starting at frames 0 .. starts - 1"""
    reason: str
    """why the clip is dropped; empty if it is used"""


@dataclass(frozen=True)
class Preflight:
    """Every clip with its windows, or the reason it is dropped."""

    settings: Data
    rows: tuple[Checked, ...]

    @property
    def used(self) -> list[Checked]:
        return [row for row in self.rows if not row.reason]

    @property
    def dropped(self) -> list[Checked]:
        return [row for row in self.rows if row.reason]

    def summary(self) -> str:
        """One line: clips, windows, drops, enlargements."""
        windows = sum(row.starts for row in self.used)
        text = f"{len(self.rows)} clips: {len(self.used)} used with {windows} windows, {len(self.dropped)} dropped"
        small = sum(_is_enlarged(row, self.settings) for row in self.used)
        return text + (f", {small} enlarged to {self.settings.width}x{self.settings.height}" if small else "")

    def table(self, rows: Sequence[Checked] | None = None) -> str:
        """One aligned line per clip, then the summary."""
        head = ("clip", "frames", "fps", "size", "windows", "")
        cells = [head, *(_cells(row, self.settings) for row in (self.rows if rows is None else rows))]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)] + [0]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        return "\n".join([*lines, self.summary()])

    def refuse(self) -> None:
        """Raise DataError, listing the dropped clips, if they are more than `max_dropped` of all, or all."""
        share = len(self.dropped) / max(1, len(self.rows))
        if self.used and share <= self.settings.max_dropped:
            return
        shown = self.table(self.dropped[:20])
        raise DataError(
            f"{self.settings.path}: {len(self.dropped)} of {len(self.rows)} clips are unusable, data.max_dropped "
            f"allows {self.settings.max_dropped:.0%}\n{shown}\nmend or remove them, or raise data.max_dropped"
        )


def preflight(clips: Sequence[Clip], settings: Data, progress: Progress | None = None) -> tuple[Preflight, _Cache]:
    """Decode every clip once: the table of what is used, and the decoded clips that fit in memory."""
    cache = _Cache(settings.cache_megabytes * 2**20)
    rows: list[Checked] = []
    with ThreadPoolExecutor(min(_IN_FLIGHT, os.cpu_count() or 1)) as pool:
        for first in range(0, len(clips), _IN_FLIGHT):
            together = clips[first : first + _IN_FLIGHT]
            for row, frames in pool.map(lambda clip: _check(clip, settings, cache.left), together):
                rows.append(row)
                if frames is not None and not row.reason:
                    cache.add(row.clip.name, frames)
                if progress is not None:
                    progress(len(rows), len(clips))
    return Preflight(settings, tuple(rows)), cache


class ClipDataset:
    """Samples by number, for a torch DataLoader with `collate`.

    `dataset[n]` depends on the settings, the seed and n alone: each epoch of `len(dataset)` numbers visits every
    usable clip once, in an order drawn from (seed, epoch), and a random window is drawn from (seed, n). So a run that
    resumes at sample n, on any number of processes, sees what it would have seen.
    """

    def __init__(self, settings: Data, seed: int = 0, shuffle: bool = True, progress: Progress | None = None) -> None:
        """Find and check the clips; raises DataError if they cannot be used (see `Preflight.refuse`)."""
        self.settings, self.seed, self.shuffle = settings, seed % 2**63, shuffle
        self.preflight, self._cache = preflight(find_clips(settings), settings, progress)
        log.info("%s", self.preflight.summary())
        self.preflight.refuse()
        self.rows = self.preflight.used
        self._order: tuple[int, npt.NDArray[np.int64]] = (-1, np.arange(len(self.rows)))
        self._scores: dict[tuple[int, int], float] = {}

    def __len__(self) -> int:
        """Usable clips: the samples of one epoch."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Item]:
        """One epoch, from sample 0."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Item:
        """Sample `number` (0 or more, without end); raises DataError naming a clip that no longer reads."""
        import torch

        index = self._clip_at(int(number))
        row = self.rows[index]
        start = self._start(int(number), row)
        frames = self._window(index, start)  # (F, H, W, 3)
        # In numpy: torch would start threads for so little work, and those get in the way of the model's.
        pixels = np.ascontiguousarray(frames.transpose(0, 3, 1, 2), np.float32) / np.float32(127.5)  # (F, 3, H, W)
        return {
            "pixels": torch.from_numpy(pixels - 1),
            "fps": torch.tensor(row.fps, dtype=torch.float32),
            "motion": torch.tensor(self._score(index, start, frames), dtype=torch.float32),
            "caption": row.clip.caption,
            "number": torch.tensor(int(number), dtype=torch.int64),
            "name": row.clip.name,
        }

    def motion_scores(self) -> npt.NDArray[np.float64]:
        """The motion score of each usable clip's centre window (N,), for fitting motion buckets."""
        scores = np.empty(len(self))
        for index, row in enumerate(self.rows):
            start = (row.starts - 1) // 2
            known = self._scores.get((index, start))
            scores[index] = self._score(index, start, self._window(index, start)) if known is None else known
        return scores

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded clips: a worker that is started afresh decodes its own."""
        return self.__dict__ | {"_cache": _Cache(0)}

    def _clip_at(self, number: int) -> int:
        if number < 0:
            raise DataError(f"sample numbers start at 0, not {number}")
        epoch, place = divmod(number, len(self.rows))
        if not self.shuffle:
            return place
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, _ORDER, epoch])
            self._order = (epoch, generator.permutation(len(self.rows)))
        return int(self._order[1][place])

    def _start(self, number: int, row: Checked) -> int:
        if self.settings.window == "centre":
            return (row.starts - 1) // 2
        return int(np.random.default_rng([self.seed, _START, number]).integers(row.starts))

    def _window(self, index: int, start: int) -> Pixels:
        row, settings = self.rows[index], self.settings
        if row.probe is None:
            raise DataError(f"{row.clip.name}: was not decoded")
        indices = _indices(row.probe, settings, start)
        cached = self._cache.frames.get(row.clip.name)
        if cached is not None:
            return np.asarray(cached[indices])
        return video.read(row.clip.media, indices, row.probe, (settings.height, settings.width))

    def _score(self, index: int, start: int, frames: Pixels) -> float:
        if (index, start) not in self._scores:
            self._scores[index, start] = motion_score(frames, self.rows[index].fps)
        return self._scores[index, start]


def collate(items: Sequence[Item]) -> Batch:
    """Stack items to a batch: pixels (B, F, 3, H, W); fps, motion, number (B,); captions and names as lists."""
    import torch

    return {
        "pixels": torch.stack([item["pixels"] for item in items]),  # (B, F, 3, H, W)
        "fps": torch.stack([item["fps"] for item in items]),  # (B,)
        "motion": torch.stack([item["motion"] for item in items]),  # (B,)
        "caption": [item["caption"] for item in items],
        "number": torch.stack([item["number"] for item in items]),  # (B,)
        "name": [item["name"] for item in items],
    }


class _Cache:
    """Decoded clips by name, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.frames: dict[str, Pixels] = {}

    def add(self, name: str, frames: Pixels) -> None:
        if frames.nbytes <= self.left:
            self.frames[name] = frames
            self.left -= frames.nbytes


def _check(clip: Clip, settings: Data, room: int) -> tuple[Checked, Pixels | None]:
    try:
        found, frames = video.scan(clip.media, (settings.height, settings.width), room)
    except DataError as error:
        reason = str(error).removeprefix(f"{clip.media}: ")
        return Checked(clip, None, 0.0, 0, reason), None
    reason, starts = _fit(found, settings)
    return Checked(clip, found, 0.0 if reason else _rate(found, settings) / settings.stride, starts, reason), frames


def _fit(found: video.Probe, settings: Data) -> tuple[str, int]:
    """(why no window fits, or empty; number of first frames from which one does)."""
    rate = _rate(found, settings)
    if rate > 1.02 * found.typical_fps:
        return f"{found.typical_fps:.4g} frames per second, data.fps asks for {rate:.4g}: frames would repeat", 0
    span = (settings.frames - 1) * settings.stride / rate
    last = found.times[-1] + 0.5 / found.typical_fps
    starts = int(np.searchsorted(np.asarray(found.times) + span, last, side="right"))
    if starts:
        return "", starts
    return f"too short: {found.duration:.4g} s, a window of {settings.frames} frames takes {span + 1 / rate:.4g} s", 0


def _rate(found: video.Probe, settings: Data) -> float:
    return found.fps if settings.fps is None else settings.fps


def _indices(found: video.Probe, settings: Data, start: int) -> list[int]:
    """The window's frame numbers; a steady clip at its own rate is counted, all others go by time stamps."""
    steps = np.arange(settings.frames) * settings.stride
    if settings.fps is None and not found.variable:
        return [int(i) for i in np.minimum(start + steps, found.frames - 1)]
    return found.shown_at(found.times[start] + steps / _rate(found, settings))


def _is_enlarged(row: Checked, settings: Data) -> bool:
    return row.probe is not None and (row.probe.height < settings.height or row.probe.width < settings.width)


def _cells(row: Checked, settings: Data) -> tuple[str, ...]:
    probe = row.probe
    if probe is None:
        return row.clip.name, "-", "-", "-", "0", f"dropped: {row.reason}"
    rate = f"{probe.fps:.4g}{' variable' if probe.variable else ''}"
    size = f"{probe.width}x{probe.height}{f' rotated {probe.rotation}' if probe.rotation else ''}"
    if row.reason:
        return row.clip.name, str(probe.frames), rate, size, "0", f"dropped: {row.reason}"
    start = 0 if settings.window == "random" else (row.starts - 1) // 2
    shown = _indices(probe, settings, start)
    place = f"frames {shown[0]}-{shown[-1]}"
    if settings.window == "random" and row.starts > 1:
        place += f" to {row.starts - 1}-{_indices(probe, settings, row.starts - 1)[-1]}"
    count = str(row.starts) if settings.window == "random" else "1"
    return row.clip.name, str(probe.frames), rate, size, count, f"used: {place} at {row.fps:.4g} fps"
