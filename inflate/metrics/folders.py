"""Folders of videos to evaluate: every clip is checked first, then they are read one at a time, all alike."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from inflate.data import video
from inflate.data.settings import Data
from inflate.data.sources import Clip, find_clips
from inflate.data.windows import Window, frames_of, windows
from inflate.errors import ConfigError, DataError
from inflate.files import sha256

Pixels = npt.NDArray[np.uint8]
Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""
T = TypeVar("T", int, float, video.Size)
SHOWN = 10
"""Names that an error lists."""


@dataclass(frozen=True)
class Cut:
    """How clips are cut before they are measured; None: as they are, which must then be the same for all."""

    frames: int | None = None
    """first frames of each clip"""
    size: video.Size | None = None
    """(height, width), pixels: frames are scaled to cover it, then cropped about the centre"""
    fps: float | None = None
    """frames per second that clips are resampled to"""
    stride: int = 1
    """every n-th frame"""

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 2:
            raise ConfigError(f"--frames {self.frames}: motion and flicker need 2 or more")


@dataclass(frozen=True)
class Found:
    """The videos of a folder by name, what decoding them showed, and the stills beside them, which are not measured."""

    folder: Path
    clips: Mapping[str, Clip]
    probes: Mapping[str, video.Probe]
    stills: tuple[str, ...]

    def codecs(self) -> str:
        """Codecs and pixel formats of the files."""
        return ",".join(sorted({video.codec(clip.media) for clip in self.clips.values()}))

    def digest(self) -> str:
        """A hash of the files in the order of their names."""
        hashes = [sha256(Path(str(clip.media))) for clip in self.clips.values()]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()


@dataclass(frozen=True)
class Reader:
    """Reads clips as all are measured: as many frames of one size at one rate."""

    settings: Data
    rate: float
    """frames per second of what is read"""

    def read(self, found: Found, name: str) -> Pixels:
        """The frames (F, H, W, 3) of a clip; DataError naming it."""
        probe, settings = found.probes[name], self.settings
        window = self._window(found, name)
        indices = frames_of(window, window.middle, probe, settings)
        return video.read(found.clips[name].media, indices, probe, (settings.height, settings.width))

    def check(self, sets: Iterable[Found]) -> None:
        """Raise DataError listing the clips that are too short or slow to be read so."""
        problems = []
        for found in sets:
            for name in found.clips:
                try:
                    self._window(found, name)
                except DataError as error:
                    problems.append(f"{found.clips[name].media}: {error}")
        refuse(problems, "take fewer frames (--frames), or remove these clips")

    def _window(self, found: Found, name: str) -> Window:
        return windows(found.probes[name], self.settings)[0]


def parse_size(text: str) -> video.Size:
    """(height, width) of a size written as WIDTHxHEIGHT; ConfigError."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ConfigError(f"--size {text}: write WIDTHxHEIGHT in pixels, such as 256x256")
    return int(parts[1]), int(parts[0])


def find(folder: Path, progress: Progress) -> Found:
    """The videos in a folder or metadata table, each decoded once; DataError listing all that cannot be."""
    every = listed(folder)
    clips = {key(clip.name): clip for clip in every if not video.is_image(clip.media)}
    stills = tuple(clip.name for clip in every if video.is_image(clip.media))
    if not clips:
        raise DataError(f"{folder}: holds no video, only {len(stills)} stills")
    if len(clips) + len(stills) < len(every):
        raise DataError(f"{folder}: two of its videos have one name but for the extension; rename one")
    return Found(folder, clips, _probed(clips, progress), stills)


def listed(path: Path) -> list[Clip]:
    """What a folder or metadata table lists, captions included where it has any; DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such folder or metadata file")
    return find_clips(Data(str(path), captions="optional"))


def key(name: str) -> str:
    """What a clip is paired by: its path below the folder, without the extension."""
    return PurePosixPath(name).with_suffix("").as_posix()


def refuse_unpaired(generated: Found, real: Found) -> None:
    """Raise DataError listing the clips without a partner of the same name."""
    alone = [f"{found.folder}: {name}" for found, other in ((generated, real), (real, generated))
             for name in found.clips if name not in other.clips]  # fmt: skip
    refuse(alone, "these have no partner of that name in the other folder; mend that, or add --unpaired")


def reader(sets: Sequence[Found], cut: Cut) -> Reader:
    """What reads all clips alike; DataError naming two that differ in what `cut` leaves open, and the remedy."""
    probes = {str(clip.media): found.probes[name] for found in sets for name, clip in found.clips.items()}
    height, width = cut.size or _size(probes)
    rate = cut.fps or _rate(probes)
    settings = Data(
        frames=cut.frames or _frames(probes, cut),
        height=height,
        width=width,
        fps=cut.fps,
        stride=cut.stride,
        window="head",
    )
    made = Reader(settings, rate / cut.stride)
    made.check(sets)
    return made


def _size(probes: Mapping[str, video.Probe]) -> video.Size:
    sizes = {name: (probe.height, probe.width) for name, probe in probes.items()}
    (small, least), (large, most) = _extremes(sizes)
    if least != most:
        stated = [f"{width}x{height}" for height, width in (least, most)]
        raise DataError(
            f"{small} is {stated[0]} and {large} {stated[1]}; name one size for all with --size {stated[0]}"
        )
    return least


def _rate(probes: Mapping[str, video.Probe]) -> float:
    (slow, least), (fast, most) = _extremes({name: probe.typical_fps for name, probe in probes.items()})
    if most > 1.02 * least:
        raise DataError(
            f"{slow} has {least:.4g} frames per second and {fast} {most:.4g}; resample with --fps {least:.4g}"
        )
    return least


def _frames(probes: Mapping[str, video.Probe], cut: Cut) -> int:
    (short, least), (long, most) = _extremes({name: probe.frames for name, probe in probes.items()})
    if cut.fps is not None or cut.stride != 1:
        raise DataError("where --fps or --stride is given, say with --frames N how many of the frames to measure")
    if least != most:
        raise DataError(f"{short} has {least} frames and {long} {most}; measure as many of each with --frames {least}")
    return least


def _extremes(values: Mapping[str, T]) -> tuple[tuple[str, T], tuple[str, T]]:
    """The clip with the least value and that with the greatest."""
    ordered = sorted(values.items(), key=lambda item: item[1])
    return ordered[0], ordered[-1]


def _probed(clips: Mapping[str, Clip], progress: Progress) -> dict[str, video.Probe]:
    probes, problems = {}, []
    for number, (name, clip) in enumerate(clips.items(), 1):
        try:
            probes[name] = video.probe(clip.media)
        except DataError as error:
            problems.append(str(error))
        progress(number, len(clips))
    refuse(problems, "mend or remove these files")
    return probes


def refuse(problems: Sequence[str], remedy: str) -> None:
    """Raise DataError listing the problems, where there are any, and the remedy."""
    if problems:
        more = f"\n... and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise DataError("\n".join(problems[:SHOWN]) + more + f"\n{remedy}")
