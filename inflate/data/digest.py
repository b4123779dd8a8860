"""A hash that tells two selections of clips apart, without reading a video again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inflate.data.preflight import Checked
from inflate.data.settings import Data
from inflate.data.video import Media
from inflate.errors import DataError

WHERE = (
    "path", "source", "split", "held_out", "revision", "video_column", "caption_column", "captions", "max_dropped",
    "seconds_per_clip", "memory_megabytes", "cache",
)  # fmt: skip
"""Settings that say where clips lie and which are refused; all others shape the windows."""


def digest(used: Sequence[Checked], settings: Data) -> str:
    """Return `sha256:...` of the used clips, in their order, and of the settings that cut windows out of them.

    It covers each clip's name below the folder, caption, upright size, rotation and the time stamp of every frame as
    the check decoded them; of a file also its size in bytes (a table's row has none that is known without reading it).
    It does not cover the pixels: a file changed in place at the same length and with the same times goes unnoticed.
    Raises DataError for a file that is gone.
    """
    windows = {name: value for name, value in asdict(settings).items() if name not in WHERE}
    text = json.dumps([windows, *map(_facts, used)], sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _facts(row: Checked) -> list[Any]:
    return [row.clip.name, row.clip.caption, _bytes(row.clip.media), asdict(row.probe) if row.probe else None]


def _bytes(media: Media) -> int | None:
    if not isinstance(media, Path | str):
        return None
    try:
        return Path(media).stat().st_size
    except OSError as error:
        raise DataError(f"{media}: cannot be read ({error.strerror}); did it move since it was checked?") from error
