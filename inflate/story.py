"""Stories: shots that follow one another in one video, each from an image or from the last frame of the one before.

A file of them is a YAML or JSON list:

    - {image: harbour.png, prompt: a boat leaves the harbour}
    - {previous: true, prompt: a storm comes up, frames: 24}
    - {image: island.png, end_image: beach.png, prompt: the boat lands, seed: 7}
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from inflate import config, pages
from inflate.errors import ConfigError
from inflate.options import MOST_SEED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Pixels = npt.NDArray[np.uint8]

LABEL = 40
"""Characters of a prompt beside a contact sheet."""
FEWEST, MOST = 8, 32
"""Frames of a shot in a contact sheet: those of a single clip, and what a picture has room for."""


@dataclass(frozen=True)
class Shot:
    """A part of a story."""

    image: Path | None = None
    """its first frame, named from the story's own folder"""
    previous: bool = False
    """whether it starts from the last frame of the shot before, in place of an image"""
    prompt: str = ""
    """what happens in it"""
    frames: int | None = None
    """its length; null for that of all"""
    seed: int | None = None
    """of its noise; null for that of the story and one more for each shot before"""
    end_image: Path | None = None
    """its last frame"""

    def __post_init__(self) -> None:
        if (self.image is not None) == self.previous:
            raise ConfigError("give it either an image, or previous: true for the last frame of the shot before")
        if self.frames is not None and self.frames < 2:
            raise ConfigError(f"frames: must be 2 or more, not {self.frames}")
        if self.seed is not None and not 0 <= self.seed <= MOST_SEED:
            raise ConfigError(f"seed: must be 0 to {MOST_SEED}, not {self.seed}")

    @property
    def label(self) -> str:
        """The start of its prompt, or its image's name."""
        return textwrap.shorten(self.prompt, LABEL, placeholder=" ...") or (self.image or Path("previous")).name


def read(file: Path, seed: int = 0) -> list[Shot]:
    """Return the shots of a file, each with a seed: its own, or the story's `seed` and one more for each shot before.

    Raises ConfigError naming the file, the shot by its number, and the setting.
    """
    shots = config.load_each(Shot, file, "shot")
    if shots[0].previous:
        raise ConfigError(f"{where(file, 1)}: previous: there is no shot before the first: give it an image")
    return [_complete(shot, file, seed + number) for number, shot in enumerate(shots)]


def where(file: Path, number: int) -> str:
    """Name a shot in an error's message."""
    return f"shot {number} of {file}"


def continues(shots: Sequence[Shot], number: int) -> bool:
    """Whether the first frame of `shots[number]` is the last of the shot before, which a video shows once."""
    shot = shots[number]
    return shot.previous or (number > 0 and shot.image == shots[number - 1].end_image)


def shown(shots: Sequence[Shot], clips: Sequence[Pixels]) -> list[Pixels]:
    """What a video shows of each shot's clip (F, H, W, 3): all but a first frame that the shot before has ended on."""
    return [clip[1:] if continues(shots, number) else clip for number, clip in enumerate(clips)]


def columns(parts: Sequence[Pixels]) -> int:
    """How many frames of the longest shot a contact sheet shows: one of each few, as it would of a clip of 16."""
    return min(max(FEWEST, max(map(len, parts)) // 2), MOST)


def page(video: str, shots: Sequence[Shot], parts: Sequence[Pixels], fps: float) -> str:
    """The page that plays a video and lists its shots: when each is seen, and what it was drawn from.

    Of an interrupted story, the first shots alone have their parts.
    """
    head = ["", "seconds", "frames", "from", "to", "prompt", "seed"]
    rows = [
        [f"{number}", *_times(start, len(part), fps), *_ends(shot), html.escape(shot.prompt), f"{shot.seed}"]
        for number, (start, part, shot) in enumerate(zip(_starts(parts), parts, shots[: len(parts)], strict=True), 1)
    ]
    return pages.page(video, pages.playing(video) + pages.table(head, rows))


def _complete(shot: Shot, file: Path, seed: int) -> Shot:
    image, end_image = _beside(file, shot.image), _beside(file, shot.end_image)
    return replace(shot, image=image, end_image=end_image, seed=seed if shot.seed is None else shot.seed)


def _beside(file: Path, image: Path | None) -> Path | None:
    return None if image is None else file.parent / image.expanduser()


def _starts(parts: Sequence[Pixels]) -> Iterator[int]:
    start = 0
    for part in parts:
        yield start
        start += len(part)


def _times(start: int, count: int, fps: float) -> list[str]:
    return [f"{start / fps:.2f} to {(start + count) / fps:.2f}", f"{start} to {start + count - 1}"]


def _ends(shot: Shot) -> list[str]:
    first = "the shot before" if shot.image is None else shot.image.name
    return [html.escape(first), html.escape(shot.end_image.name if shot.end_image else "")]
