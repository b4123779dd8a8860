"""Videos that show two previews of a run against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from inflate.data import video

Pixels = npt.NDArray[np.uint8]
SHOWN = 4
"""Videos side by side."""
LEAST_HEIGHT = 192
"""Smaller videos are enlarged by a whole factor, so that a person sees their pixels."""


def compare_previews(before: Path, after: Path, target: Path) -> None:
    """Write TARGET.mp4 and TARGET.png: the first videos of `before` above those of the same names in `after`.

    Only videos as large as the first are shown: they stand side by side.
    """
    found = sorted(path.name for path in after.glob("*.mp4") if (before / path.name).is_file())
    if not found:
        return
    probes = {name: video.probe(after / name) for name in found}
    first = probes[found[0]]
    shape = (first.frames, first.height, first.width)
    names = [name for name, one in probes.items() if (one.frames, one.height, one.width) == shape][:SHOWN]
    fps = first.fps
    clips = {folder: [_read(folder / name) for name in names] for folder in (before, after)}
    rows = [_side_by_side(clips[folder]) for folder in (before, after)]
    video.write(target.with_suffix(".mp4"), np.concatenate(rows, axis=1), fps)
    pairs = [clip for pair in zip(clips[before], clips[after], strict=True) for clip in pair]
    labels = [f"{Path(name).stem} {which}" for name in names for which in ("before", "after")]
    video.contact_sheet(target.with_suffix(".png"), pairs, labels)


def _read(path: Path) -> Pixels:
    return video.read(path, range(video.probe(path).frames))


def _side_by_side(clips: list[Pixels]) -> Pixels:
    """The clips' common frames next to each other, (F, H, W, 3)."""
    length = min(len(clip) for clip in clips)
    joined = np.concatenate([clip[:length] for clip in clips], axis=2)
    factor = max(1, -(-LEAST_HEIGHT // joined.shape[1]))
    return joined.repeat(factor, axis=1).repeat(factor, axis=2)
