"""Whether camera LoRAs move the camera as asked, more at a larger weight, and two of them at once.

    python benchmarks/camera.py MODEL CLIPS OUT pan_left=RUN zoom_in=RUN ...

MODEL is the adapters' base, CLIPS a folder whose held-out clips' first frames are animated, each adapter a name of
inflate.data.camera's moves and what --adapter takes. Each is drawn at weight 0.5 and 1, each pan with each zoom at 0.8,
and the base alone. The motion of the scene is fitted by `inflate.metrics.flow`; it agrees where the asked component has
the asked sign and moves more than a still camera's limit, and, of a single adapter, is the largest ("named"). Writes
OUT/camera.json and, of the first two images, a contact sheet.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from inflate import comparison
from inflate.data import camera, video
from inflate.data.clips import ClipDataset
from inflate.data.pixels import to_uint8, unit
from inflate.data.settings import Data
from inflate.families.svd import SVD
from inflate.metrics import flow
from inflate.sampling.svd import Sampling, sample
from record import command, record, write

COMPONENTS = ("right", "down", "zoom", "turn")
TOGETHER = 0.8
"""Weight of each of two adapters at once."""


def asked(move: camera.Move) -> tuple[str, float]:
    """The component of the scene's motion that a move is about, and its sign."""
    motion = camera.motion_of(move, 1.0)
    name = max(COMPONENTS, key=lambda each: abs(getattr(motion, each)))
    return name, 1.0 if getattr(motion, name) > 0 else -1.0


def columns(adapters: dict[camera.Move, str]) -> dict[str, tuple[list[camera.Move], str]]:
    """What is drawn beside the base: the moves asked for, and the adapters, by label."""
    found: dict[str, tuple[list[camera.Move], str]] = {}
    for move, path in adapters.items():
        for weight in (0.5, 1.0):
            found[f"{move} {weight:g}"] = ([move], f"{path}:{weight:g}")
    for pan in (move for move in adapters if move.startswith("pan")):
        for zoom in (move for move in adapters if move.startswith("zoom")):
            both = f"{adapters[pan]}:{TOGETHER}+{adapters[zoom]}:{TOGETHER}"
            found[f"{pan} and {zoom}, {TOGETHER}"] = ([pan, zoom], both)
    return found


def draw(family: SVD, images: Tensor, steps: int) -> list[camera.Pixels]:
    """A clip of each image (N, 3, H, W), eight at a time."""
    settings = Sampling(steps=steps, guidance_max=1.5, fps=family.fps, frames=family.frames)
    clips = torch.cat([sample(family, part, settings) for part in images.split(8)])
    return [to_uint8(unit(clip)) for clip in clips]


def measured(clips: list[camera.Pixels], fps: float, moves: list[camera.Move]) -> dict[str, Any]:
    """How the scenes move: the mean of each asked component in its direction, and how many move so."""
    scenes = [flow.motions(clip, fps).scene for clip in clips]
    result: dict[str, Any] = {}
    agrees = [scene is not None for scene in scenes]
    for move in moves:
        name, sign = asked(move)
        along = [sign * getattr(scene, name) if scene else 0.0 for scene in scenes]
        result[f"{name} as asked, per second"] = fmean(along)
        agrees = [before and value > flow.STILL for before, value in zip(agrees, along, strict=True)]
    result |= {"agree": sum(agrees), "of": len(agrees)}
    if len(moves) == 1:
        wanted = camera.motion_of(moves[0], 1.0).name
        result["named"] = sum(scene is not None and scene.name == wanted for scene in scenes)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("adapters", nargs="+", metavar="MOVE=ADAPTER")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25, help="of the sampler")
    arguments = parser.parse_args()
    adapters: dict[camera.Move, str] = {}
    for text in arguments.adapters:
        move, _, path = text.partition("=")
        if move not in camera.MOVES or not path:
            parser.error(f"{text}: write MOVE=ADAPTER, with a move of {', '.join(camera.MOVES)}")
        adapters[move] = path
    family = SVD.load(arguments.model)
    data = Data(str(arguments.clips), split="held_out", frames=8, height=64, width=64)
    held_out = ClipDataset(data, shuffle=False)
    images = torch.stack([held_out[n]["pixels"][0] for n in range(min(arguments.images, len(held_out)))])
    wanted = columns(adapters)
    parsed = {label: comparison.columns([text]) for label, (_, text) in wanted.items()}
    drawn = comparison.draw(
        family.unet,
        {label: next(iter(each.values())) for label, each in parsed.items()},
        lambda: draw(family, images, arguments.steps),
    )
    result = {label: measured(drawn[label], family.fps, moves) for label, (moves, _) in wanted.items()}
    result["base"] = {move: measured(drawn[comparison.BASE], family.fps, [move]) for move in adapters}
    print(json.dumps(result, indent=1))
    told = command("MODEL", "CLIPS", "OUT")
    for text in arguments.adapters:
        told = told.replace(text, text.partition("=")[0] + "=ADAPTER")
    write(arguments.output / "camera.json", record(told, {"measured": result}))
    shown = range(min(2, len(images)))
    rows = [clips[number] for number in shown for clips in drawn.values()]
    labels = [f"{number} {label}" for number in shown for label in drawn]
    video.contact_sheet(arguments.output / "camera.png", rows, labels)


if __name__ == "__main__":
    main()
