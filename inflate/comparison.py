"""The same inputs and seeds drawn by a model under several adapters, the base first, side by side."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from inflate import pages
from inflate.adapters import merge
from inflate.adapters.settings import Weighted
from inflate.data import video
from inflate.errors import CheckpointError, ConfigError
from inflate.files import new_folder
from inflate.models.unet import VideoUNet

Pixels = npt.NDArray[np.uint8]
BASE = "base"
GRID, SHEET, PAGE, CLIPS = "grid.mp4", "grid.png", "index.html", "clips"
"""What a comparison's folder holds: the grid as a video, as a sheet of frames, and as a page of its single clips."""


def columns(texts: Sequence[str]) -> dict[str, list[Weighted]]:
    """The adapters of each column by its label; several with + between them act together. ConfigError."""
    found: dict[str, list[Weighted]] = {}
    for text in texts:
        wanted = Weighted.parse_sum(text)
        label = " + ".join(one.label for one in wanted)
        if label in found:
            raise ConfigError(f"--adapter {text}: {label} is in the comparison already; leave one out, or rename it")
        found[label] = wanted
    return found


def draw(
    unet: VideoUNet, wanted: Mapping[str, Sequence[Weighted]], clips: Callable[[], list[Pixels]], any_base: bool = False
) -> dict[str, list[Pixels]]:
    """What `clips` draws with the UNet alone, and with each column's adapters; the UNet is left as it was, to the bit.

    CheckpointError, before anything is drawn, for an adapter that cannot be read, does not fit, or has another base.
    """
    for each in wanted.values():
        merge.changes(unet, each, any_base)
    drawn = {BASE: clips()}
    for label, each in wanted.items():
        with merge.merged(unet, each, any_base):
            drawn[label] = clips()
    return drawn


def write(folder: Path, drawn: Mapping[str, Sequence[Pixels]], rows: Sequence[str], fps: float, title: str) -> None:
    """Write the grid of clips, which are listed by column in the order of `rows`, into a new folder.

    DataError for sizes that differ, CheckpointError for a folder that cannot be written.
    """
    labels = list(drawn)
    by_row = list(zip(*drawn.values(), strict=True))
    try:
        with new_folder(folder) as aside:
            video.write(aside / GRID, video.captioned_grid(by_row, labels), fps)
            named = [f"{row}, {label}" if len(rows) > 1 else label for row in rows for label in labels]
            video.contact_sheet(aside / SHEET, [clip for row in by_row for clip in row], named)
            for number, row in enumerate(by_row):
                for column, clip in enumerate(row):
                    video.write(aside / _clip(number, column), clip, fps)
            (aside / PAGE).write_text(_page(title, labels, rows), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder}: the comparison cannot be written ({error.strerror or error})") from error


def _clip(row: int, column: int) -> str:
    return f"{CLIPS}/{row:02d}-{column:02d}.mp4"


def _page(title: str, labels: Sequence[str], rows: Sequence[str]) -> str:
    """A page that plays the clips in a table."""
    head = [html.escape(label) for label in ["", *labels]]
    lines = [
        [html.escape(row), *(pages.playing(_clip(number, column)) for column in range(len(labels)))]
        for number, row in enumerate(rows)
    ]
    return pages.page(title, pages.table(head, lines))
