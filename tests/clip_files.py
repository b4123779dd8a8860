"""Frames and damage for small video files; the fixtures that encode them are in data/conftest.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]


def numbered(count: int, height: int = 32, width: int = 48) -> Pixels:
    """Flat frames whose brightness says their number: 16 + 8 n."""
    levels = np.arange(count, dtype=np.uint8) * 8 + 16
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def busy(count: int, height: int = 64, width: int = 64) -> Pixels:
    """Noise that compresses badly, so that any cut or damage hits picture data."""
    return np.random.default_rng(0).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def cut(path: Path, share: float) -> Path:
    """Keep only the file's first part."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def damage(path: Path, at: float = 0.6, count: int = 8000) -> Path:
    """Overwrite picture data: enough to hit where one packet ends and the next begins."""
    data = bytearray(path.read_bytes())
    start = int(len(data) * at)
    data[start : start + count] = np.random.default_rng(1).bytes(count)
    path.write_bytes(data)
    return path
