"""How often clips drawn of held-out captions move the way the caption says.

    python benchmarks/text_to_video.py MODEL CLIPS OUT --guidance 3 5 7

MODEL is what `inflate generate` takes, such as pocket-t2v or a run's export, CLIPS what datasets/build_demo.py built.
One clip is drawn of each held-out caption. The shape is found in the first frame by the two colours that the caption
names, its motion by `inflate.metrics.motion.direction`, and the heading that a dart is drawn with by its outline; the
same is done on the real clips, which says how far the measures can be trusted. `chance` is how often the motions found
agree with captions drawn at random from the same ones. With --image-model the temporal layers go over another image
model, which paints in --look; `painted so` is the share of pixels that are nearer to that look's colours than to those
that the caption names (of the look vivid: than to the swapped ones). With --by-ground a shape is what stands out from
the colours of the frame's margin, whatever its own. Writes OUT/text_to_video.json and contact sheets, and with --run
RUN that run's learning curve.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inflate.data import demo
from inflate.families.video_ldm import VideoLDM
from inflate.sampling.text_to_video import Sampling, sample
from record import command, record, write
from scenes import agreement, read, sheets


def drawn(family: VideoLDM, scenes: list[demo.Scene], guidance: float, steps: int) -> Tensor:
    """A clip of each scene's caption (N, F, 3, H, W); its number is the seed."""
    settings = Sampling(steps=steps, guidance=guidance)
    numbers = range(len(scenes))
    parts = [numbers[first : first + 8] for first in range(0, len(scenes), 8)]
    return torch.cat([sample(family, [scenes[n].caption for n in part], part, settings) for part in parts])


def curve(run: Path, target: Path) -> list[dict[str, float]]:
    """Draw the held-out losses of a run; return them."""
    rows: list[dict[str, float]] = json.loads((run / "metrics.json").read_text())["held_out"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(name for row in rows for name in row if name.startswith("held-out loss")):
        known = [row for row in rows if name in row]  # a run that went on with another version may measure others
        axes.plot([row["step"] for row in known], [row[name] for row in known], marker=".", label=name)
    axes.set(xlabel="step", ylabel="squared error of v", yscale="log")
    axes.legend(fontsize=7)
    figure.savefig(target, dpi=90)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--guidance", type=float, nargs="+", default=[3.0, 5.0, 7.0])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--run", type=Path, help="whose learning curve is drawn")
    parser.add_argument("--image-model", dest="image_model", help="for the temporal layers to go over")
    parser.add_argument("--look", choices=get_args(demo.Look), default="vivid", help="how that image model paints")
    parser.add_argument("--by-ground", dest="by_ground", action="store_true", help="find shapes in any colour")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    family = VideoLDM.load(arguments.model, arguments.image_model)
    truth, scenes = read(arguments.clips, arguments.prompts, family.clips.frames)
    measured = {"real clips": agreement(truth, scenes, by_ground=arguments.by_ground)}
    for guidance in arguments.guidance:
        clips = drawn(family, scenes, guidance, arguments.steps)
        measured[f"guidance {guidance:g}"] = agreement(clips, scenes, arguments.look, arguments.by_ground)
        labels = [f"{number:02d} {scene.colour} {scene.shape} {scene.motion}" for number, scene in enumerate(scenes)]
        sheets(arguments.output, f"guidance-{guidance:g}", clips, labels)
    for name, one in measured.items():
        print(name, {key: value for key, value in one.items() if key != "named, found"})
    settings = {"steps": arguments.steps, "prompts": len(scenes), "look": arguments.look}
    result: dict[str, Any] = {"settings": settings, "direction": measured}
    if arguments.run:
        result["curve"] = curve(arguments.run, arguments.output / "text_to_video.png")
    write(arguments.output / "text_to_video.json", record(command("MODEL", "CLIPS", "OUT"), result))


if __name__ == "__main__":
    main()
