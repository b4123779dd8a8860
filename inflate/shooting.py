"""From shots to clips: their images are read and cut to one size, and an animator draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from inflate import story
from inflate.animation import CUT, Animator, Pixels, Size, Take, cut
from inflate.data.video import read_image
from inflate.errors import ConfigError, DataError
from inflate.story import Shot


def sizes_of(shots: Sequence[Shot], file: Path | None = None) -> dict[Path, Size]:
    """The height and width of every image of shots, which are a story's where there is a file of it.

    DataError, naming the shot of a story, for one that cannot be read.
    """
    found: dict[Path, Size] = {}
    for number, shot in enumerate(shots, 1):
        for key, image in (("image", shot.image), ("end_image", shot.end_image)):
            if image is not None and image not in found:
                found[image] = _size_of(image, f"{story.where(file, number)}: {key}: " if file else "")
    return found


def refuse_keys(shots: Sequence[Shot], file: Path, kind: type[Animator], path: str) -> None:
    """Raise ConfigError for what a story's shot says and a kind of model, that of `path`, cannot be told."""
    for number, shot in enumerate(shots, 1):
        for key in ("prompt", "end_image"):
            if getattr(shot, key) and key not in kind.OPTIONS:
                raise ConfigError(f"{story.where(file, number)}: {key}: {path} takes none: leave it out")


@dataclass(frozen=True)
class Shooting:
    """Shots with their images, all of one size."""

    shots: Sequence[Shot]
    images: dict[Path, Pixels]
    """(H, W, 3) each, by their files"""

    @classmethod
    def at(cls, size: Size, shots: Sequence[Shot], sizes: dict[Path, Size], note: Callable[[str], None]) -> Shooting:
        """Scale every image to cover a size and crop it about its centre; `note` is told of what that cuts off."""
        for image, (height, width) in sizes.items():
            share = cut(height, width, size)
            if share > CUT:
                shown = f"{size[1]}x{size[0]} about its centre are shown, {share:.0%} of it are cut off"
                note(f"{image} is {width}x{height}: {shown}; --height and --width set another size")
        return cls(shots, {image: read_image(image, size) for image in sizes})

    def together(self, animator: Animator) -> list[Pixels]:
        """The clips of shots that do not depend on one another."""
        return animator.draw([self._take(shot) for shot in self.shots])

    def in_turn(self, animator: Animator, say: Callable[[str], None]) -> Iterator[Pixels]:
        """One clip after the other, each of which may start from the last frame of the one before.

        `say` is told which shot is about to be drawn.
        """
        last: Pixels | None = None
        for number, shot in enumerate(self.shots, 1):
            say(f"shot {number} of {len(self.shots)}: {shot.label}")
            (clip,) = animator.draw([self._take(shot, last)])
            yield clip
            last = clip[-1]

    def _take(self, shot: Shot, last: Pixels | None = None) -> Take:
        first = last if shot.image is None else self.images[shot.image]
        assert first is not None  # a story begins with an image
        end = None if shot.end_image is None else self.images[shot.end_image]
        return Take(first, shot.seed or 0, shot.prompt, end, shot.frames)


def _size_of(image: Path, prefix: str) -> Size:
    try:
        height, width, _ = read_image(image).shape
    except DataError as error:
        raise DataError(f"{prefix}{error}") from None
    return height, width
