"""How often clips drawn of held-out captions move the way the caption says.

    python benchmarks/text_to_video.py RUN CLIPS OUT --guidance 3 5 7

RUN is a run of recipes/video_ldm_finetune.py, CLIPS what datasets/build_demo.py built. One clip is drawn of each
held-out caption with the exported weights. The shape is found in the first frame by the two colours that the caption
names, and its motion by `inflate.metrics.motion.direction`; the same is done on the real clips, which says how far the
measure can be trusted. `chance` is how often the motions found agree with captions drawn at random from the same ones.
Writes OUT/text_to_video.json, the learning curve as OUT/text_to_video.png, and contact sheets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inflate.data import demo, video
from inflate.data.clips import ClipDataset
from inflate.data.pixels import to_uint8, unit
from inflate.data.settings import Data
from inflate.families.video_ldm import VideoLDM
from inflate.metrics.motion import direction
from inflate.sampling.text_to_video import Sampling, sample
from record import command, record, write

SHADES = (0.6, 0.8, 1.0)
"""Tones of a shape's colour; the background's dark parts have 0.45 of its light."""
LEAST = 0.01
"""Share of the frame that a shape covers at least, to count as drawn."""


def object_of(frame: Tensor, scene: demo.Scene) -> Tensor:
    """Where a frame (3, H, W) in [0, 1] is nearer to the shape's colour than to the background's: bool (H, W)."""
    own = torch.tensor([[shade * value for value in demo.COLOURS[scene.colour]] for shade in SHADES])
    ground = torch.tensor([[shade * value for value in demo.COLOURS[scene.ground]] for shade in (0.45, 0.725, 1.0)])
    distance = [(frame[None] - tones[:, :, None, None]).square().sum(1).amin(0) for tones in (own, ground)]  # (H, W)
    return distance[0] < distance[1]


def motion_of(clip: Tensor, scene: demo.Scene) -> str:
    """The motion's name in a clip (F, 3, H, W) in [0, 1], or `no shape`."""
    mask = object_of(clip[0], scene)
    return direction(clip, mask).name if float(mask.float().mean()) >= LEAST else "no shape"


def agreement(clips: Tensor, scenes: list[demo.Scene]) -> dict[str, Any]:
    """The share of clips (N, F, 3, H, W) in [-1, 1] that move as their scenes do, in all and by shape."""
    found = [motion_of(unit(clip), scene) for clip, scene in zip(clips, scenes, strict=True)]
    agrees = [name == scene.motion for name, scene in zip(found, scenes, strict=True)]
    chance = sum(name == scene.motion for name in found for scene in scenes) / len(found) ** 2
    by_shape = {
        shape: f"{sum(one for one, scene in kind)} of {len(kind)}"
        for shape in ("dart", "disc", "box")
        if (kind := [pair for pair in zip(agrees, scenes, strict=True) if pair[1].shape == shape])
    }
    pairs = [(scene.motion, name) for scene, name in zip(scenes, found, strict=True)]
    counts = {"agree": sum(agrees), "of": len(agrees), "share": sum(agrees) / len(agrees), "chance": chance}
    return {**counts, **by_shape, "named, found": pairs}


def read(clips: Path, count: int, frames: int) -> tuple[Tensor, list[demo.Scene]]:
    """The first held-out clips, and their scenes."""
    data = Data(str(clips), split="held_out", frames=frames, height=64, width=64, window="centre")
    dataset = ClipDataset(data, shuffle=False)
    rows = [dataset.rows[number].clip.extra for number in range(min(count, len(dataset)))]
    scenes = [demo.Scene(**{name: row[name] for name in demo.Scene.__dataclass_fields__}) for row in rows]
    return torch.stack([dataset[number]["pixels"] for number in range(len(rows))]), scenes


def drawn(family: VideoLDM, scenes: list[demo.Scene], guidance: float, steps: int) -> Tensor:
    """A clip of each scene's caption (N, F, 3, H, W); its number is the seed."""
    settings = Sampling(steps=steps, guidance=guidance)
    numbers = range(len(scenes))
    parts = [numbers[first : first + 8] for first in range(0, len(scenes), 8)]
    return torch.cat([sample(family, [scenes[n].caption for n in part], part, settings) for part in parts])


def show(folder: Path, name: str, clips: Tensor, scenes: list[demo.Scene]) -> None:
    """Contact sheets of 16 clips each, labelled with their number and the motion that the caption names."""
    rows = [to_uint8(unit(clip)) for clip in clips]
    labels = [f"{number:02d} {scene.colour} {scene.shape} {scene.motion}" for number, scene in enumerate(scenes)]
    for part in range(0, len(rows), 16):
        video.contact_sheet(folder / f"{name}-{part // 16}.png", rows[part : part + 16], labels[part : part + 16])


def curve(run: Path, target: Path) -> list[dict[str, float]]:
    """Draw the held-out losses of a run; return them."""
    rows: list[dict[str, float]] = json.loads((run / "metrics.json").read_text())["held_out"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in rows[0]:
        if name.startswith("held-out loss"):
            axes.plot([row["step"] for row in rows], [row[name] for row in rows], marker=".", label=name)
    axes.set(xlabel="step", ylabel="squared error of v", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=90)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 5.0, 7.0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=64)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    family = VideoLDM.load(arguments.run / "export")
    truth, scenes = read(arguments.clips, arguments.prompts, family.clips.frames)
    measured = {"real clips": agreement(truth, scenes)}
    for guidance in arguments.guidance:
        clips = drawn(family, scenes, guidance, arguments.steps)
        measured[f"guidance {guidance:g}"] = agreement(clips, scenes)
        show(arguments.output, f"guidance-{guidance:g}", clips, scenes)
    for name, one in measured.items():
        print(name, {key: value for key, value in one.items() if key != "named, found"})
    rows = curve(arguments.run, arguments.output / "text_to_video.png")
    result = {"settings": {"steps": arguments.steps, "prompts": len(scenes)}, "direction": measured, "curve": rows}
    write(arguments.output / "text_to_video.json", record(command("RUN", "CLIPS", "OUT"), result))


if __name__ == "__main__":
    main()
