"""Build the demo dataset: clips of the demo world as H.264 files, with captions and exact motion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from inflate.data import demo, video
from inflate.errors import DataError
from inflate.files import new_folder

MANIFEST = "demo.json"
QUALITY = 12
"""x264's constant rate factor: at 64 x 64 a coarser one blurs the textures that show the motion."""


def build(
    folder: Path | str,
    clips: int = 600,
    held_out: int = 64,
    seed: int = 0,
    size: int = 64,
    frames: int = 16,
    told: float = 0.0,
) -> Path:
    """Render `clips` training and `held_out` held-out clips into FOLDER/train and FOLDER/held_out.

    Each split has its mp4 files (8 frames per second) and a metadata.jsonl: file name, caption and the scene's exact
    motion. Of a share `told` of the clips the caption alone says how they move. A folder that already holds these clips
    is left as it is; a build that is interrupted leaves nothing.
    Raises DataError when the folder holds anything else.
    """
    folder = Path(folder)
    settings: dict[str, float] = {
        "clips": clips,
        "held_out": held_out,
        "seed": seed,
        "size": size,
        "frames": frames,
        "fps": demo.FPS,
    }
    if told:
        settings["told"] = told
    if clips < 1 or held_out < 0 or frames < 2 or size < 16 or seed < 0 or not 0 <= told <= 1:
        raise DataError(f"the demo clips cannot be built from {settings}")
    if _is_built(folder, settings):
        return folder
    try:
        with new_folder(folder) as draft:
            for number, (split, count) in enumerate((("train", clips), ("held_out", held_out))):
                _build_split(draft / split, count, [seed, number], size, frames, told)
            (draft / MANIFEST).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{folder}: the demo clips cannot be written ({error.strerror or error})") from error
    return folder


def _is_built(folder: Path, settings: dict[str, float]) -> bool:
    """Whether the folder holds exactly these clips; raises DataError when it holds anything else."""
    if folder.is_file():
        raise DataError(f"{folder}: is a file; name a folder for the demo clips")
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    manifest = folder / MANIFEST
    try:
        found = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else None
    except ValueError:
        found = None
    if found == settings:
        return True
    held = "other files" if found is None else f"demo clips of other settings {found}"
    raise DataError(f"{folder}: holds {held}; move it away or name another folder")


def _build_split(folder: Path, count: int, seed: list[int], size: int, frames: int, told: float) -> None:
    folder.mkdir(parents=True)
    times = np.arange(frames) / demo.FPS
    lines = []
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        scene = demo.draw_scene(rng, frames / demo.FPS, told > 0 and bool(rng.random() < told))
        name = f"{number:04d}.mp4"
        video.write(folder / name, demo.render(scene, times, size), demo.FPS, quality=QUALITY)
        lines.append(json.dumps({"file_name": name, "caption": scene.caption} | scene.truth()) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
