"""What inflation is worth: an inflated image model and the same network from random weights learn to animate an image.

    python benchmarks/image_to_video.py OUT --steps 6000 --seeds 0 1 2

Both see the same clips, noise and settings, and both have the pocket model's trained autoencoder and image encoder;
the inflated one's pretraining as an image model is not counted. "Random" is PyTorch's initialisation in every layer,
also in those that inflation makes zero. A seed draws the new weights, the noise, and the order of the clips; the
held-out clips and their noise stay. Measured on held-out clips: the loss on fixed noise over the steps (and with
the temporal layers bypassed), the step at which the inflated one has come to the other's last loss (between two
measurements by the straight line through their logarithms), and of 32 samples of the first seed's inflated one, told
each clip's motion bucket: PSNR of frame 0 against the autoencoder's own, PSNR of frames 1-3 against a static copy, and
how often the motion's direction is the one that the caption names. Writes OUT/image_to_video.json and .png, and contact
sheets.

To train both at once: first --only none, which makes the clips, then --only inflated beside --only scratch, and
--only none again for the report.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from inflate.data import demo, video
from inflate.data.clips import ClipDataset, collate
from inflate.data.demo_clips import build
from inflate.data.pixels import to_uint8, unit
from inflate.data.settings import Data
from inflate.families.svd import SVD, MotionBuckets
from inflate.metrics.motion import direction, object_mask
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.loop import fit
from inflate.training.settings import Training
from record import command, record, write

STARTS = ("inflated", "scratch")


def reset(network: nn.Module, seed: int) -> None:
    """Give every layer of the network PyTorch's random weights, also those that inflation makes zero."""
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def make(
    start: str, seed: int, clips: Path, arguments: argparse.Namespace
) -> tuple[ImageToVideoTask, ClipDataset, ClipDataset]:
    """The task, its training clips and its held-out clips."""
    data = Data(str(clips), split="train", held_out="held_out", frames=8, height=64, width=64)
    dataset, held_out = ClipDataset(data, seed=seed), ClipDataset(data.evaluation(), shuffle=False)
    torch.manual_seed(seed)  # inflation draws the new layers' weights
    family = SVD.load(arguments.model, frames=data.frames)
    family.fps, family.motion = demo.FPS, MotionBuckets.fit(dataset.motion_scores())
    if start == "scratch":
        reset(family.unet, seed)
    settings = ImageToVideo(P_mean=arguments.P_mean, P_std=arguments.P_std, preview_clips=8)
    sampling = Preview(steps=25, guidance_max=arguments.guidance)
    batches = [collate([item]) for item in held_out]
    return ImageToVideoTask(family, settings, batches, sampling, arguments.lr, seed=0), dataset, held_out


def train(start: str, seed: int, clips: Path, arguments: argparse.Namespace) -> tuple[ImageToVideoTask, ClipDataset]:
    """Train from a start; the run resumes where it was cut off."""
    task, dataset, held_out = make(start, seed, clips, arguments)
    training = Training(
        output=run_of(arguments.output, start, seed), seed=seed, steps=arguments.steps, batch=arguments.batch,
        lr=arguments.lr, warmup=100, schedule="cosine", ema=0.998, precision="bf16", workers=0, log_every=50,
        tracker="none", resume="latest", checkpoint_every=250, preview_every=0,
        evaluate_every=arguments.evaluate_every or arguments.steps // 12,
    )  # fmt: skip
    result = fit(task, dataset, training, collate)
    if result.export is None:
        raise SystemExit(f"stopped by {result.stopped} at step {result.step}; the same command goes on")
    task.family = SVD.from_pretrained(result.export)  # the averaged weights, which the curves are of too
    task.players[0].network = task.family.unet
    return task, held_out


def directions(truth: ClipDataset, generated: torch.Tensor) -> list[tuple[str, str]]:
    """(named by the caption, found in the sample) per clip."""
    pairs = []
    for number, clip in enumerate(generated):
        row = truth.rows[number].clip.extra
        scene = demo.Scene.of(row)
        start = truth.windows[number][1].middle / demo.FPS
        mask = object_mask(scene, clip.shape[-1], start)
        pairs.append((scene.motion, direction(unit(clip), mask).name))
    return pairs


def examine(task: ImageToVideoTask, held_out: ClipDataset, output: Path) -> dict[str, Any]:
    """Sample every held-out clip and score the samples."""
    truth, generated = task.animate(task.held_out)
    pairs = directions(held_out, generated)
    agree = sum(a == b for a, b in pairs)
    real = directions(held_out, truth)
    rows = [to_uint8(unit(clip)) for pair in zip(truth, generated, strict=True) for clip in pair]
    labels = [f"{n:02d} {kind}" for n in range(len(truth)) for kind in ("truth", "sample")]
    for part in range(0, len(rows), 16):
        video.contact_sheet(output / f"samples-{part // 16}.png", rows[part : part + 16], labels[part : part + 16])
    return {
        **task.score(truth, generated),
        "clips": len(pairs), "direction agrees": agree, "share": agree / len(pairs), "named, found": pairs,
        "direction agrees on real clips": sum(a == b for a, b in real),
    }  # fmt: skip


def run_of(output: Path, start: str, seed: int) -> Path:
    """The folder of a run."""
    return output / f"{start}-{seed}"


def reached(rows: Sequence[dict[str, float]], level: float) -> float | None:
    """The step at which the held-out loss comes to a level, log-linear between measurements; None if it never does.

    0 where it is born there.
    """
    if rows[0]["held-out loss"] <= level:
        return 0.0
    for before, after in pairwise(rows):
        if after["held-out loss"] <= level:
            high, low = (math.log(row["held-out loss"] / level) for row in (before, after))
            return before["step"] + (after["step"] - before["step"]) * high / (high - low)
    return None


def compare(
    output: Path, seeds: Sequence[int], steps: int
) -> tuple[dict[str, Any], dict[str, dict[str, float | None]]]:
    """The held-out curves of all runs that there are, by name; of each pair of runs what it says of the seed.

    The one from scratch must have come to `steps`, or further; the inflated one may have been stopped once it was below
    the other's last loss.
    """
    curves = {
        f"{start}, seed {seed}": json.loads(file.read_text())["held_out"]
        for start in STARTS for seed in seeds if (file := run_of(output, start, seed) / "metrics.json").is_file()
    }  # fmt: skip
    found: dict[str, Any] = {}
    for seed in seeds:
        inflated, scratch = (curves.get(f"{start}, seed {seed}", []) for start in STARTS)
        if not scratch or scratch[-1]["step"] < steps or not inflated:
            continue
        step = reached(inflated, scratch[-1]["held-out loss"])
        if step is None and inflated[-1]["step"] < steps:
            continue
        found[f"seed {seed}"] = {
            "first loss, inflated": inflated[0]["held-out loss"],
            f"loss after {inflated[-1]['step']} steps, inflated": inflated[-1]["held-out loss"],
            "last loss, from scratch": scratch[-1]["held-out loss"],
            "inflated comes to the latter after steps": step,
            "ratio of steps to equal loss": scratch[-1]["step"] / step if step else None,
        }
    return curves, found


def report(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write the numbers and the curves."""
    seeds = arguments.seeds
    curves, found = compare(arguments.output, seeds, arguments.steps)
    result |= {"seeds": found, "curves": curves}
    ratios = [ratio for one in found.values() if (ratio := one["ratio of steps to equal loss"])]
    if len(ratios) == len(seeds):
        result["ratio of steps to equal loss"] = {"mean": fmean(ratios), "least": min(ratios), "most": max(ratios)}
    write(arguments.output / "image_to_video.json", record(command("OUT"), result))
    draw(curves, found, arguments.output / "image_to_video.png")
    print(json.dumps({name: value for name, value in result.items() if name != "curves"}, indent=1))


def draw(curves: dict[str, Any], found: dict[str, Any], target: Path) -> None:
    """The curves, a colour per start, a line per seed; dotted with the temporal layers bypassed."""
    ratios = [ratio for one in found.values() if (ratio := one["ratio of steps to equal loss"])]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    named = set()
    for name, rows in curves.items():
        start = name.split(",")[0]
        colour = {"inflated": "tab:blue", "scratch": "tab:orange"}[start]
        for key, style in (("held-out loss", "-"), ("held-out loss, temporal layers bypassed", ":")):
            if style == ":" and start == "scratch":
                continue  # bypassing layers that the others were never trained without says nothing
            label = {"inflated": "inflated", "scratch": "from scratch"}[start] + key.removeprefix("held-out loss")
            axes.plot(
                [row["step"] for row in rows], [row[key] for row in rows], style, color=colour, marker=".",
                markersize=3, linewidth=1, label=None if label in named else label,
            )  # fmt: skip
            named.add(label)
    born = [one["inflated comes to the latter after steps"] for one in found.values()]
    if born and all(step == 0 for step in born):
        axes.set_title(f"no run from scratch comes to the newborn inflated model ({len(born)} seeds)", fontsize=10)
    if ratios:
        spread = f"{min(ratios):.1f}" if len(ratios) == 1 else f"{min(ratios):.1f} to {max(ratios):.1f}"
        axes.set_title(f"equal loss in {spread} times fewer steps ({len(ratios)} seeds)", fontsize=10)
    axes.set(xlabel="step", ylabel="held-out loss", yscale="log")
    axes.legend()
    figure.savefig(target, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=7e-4)
    parser.add_argument("--P-mean", type=float, default=0.0, dest="P_mean")
    parser.add_argument("--P-std", type=float, default=1.6, dest="P_std")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate-every", type=int, dest="evaluate_every", help="steps; a twelfth of all by default")
    parser.add_argument("--only", choices=[*STARTS, "none"], help="train only this one, or none")
    arguments = parser.parse_args()
    clips = build(arguments.output / "clips", clips=arguments.clips, held_out=32)
    examined = arguments.output / "examined.json"
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"}}
    for seed in arguments.seeds:
        for start in STARTS:
            if arguments.only in (None, start):
                task, held_out = train(start, seed, clips, arguments)
                if start == "inflated" and seed == arguments.seeds[0]:
                    examined.write_text(json.dumps(examine(task, held_out, arguments.output)) + "\n")
    if examined.is_file():
        result |= json.loads(examined.read_text())
    report(arguments, result)


if __name__ == "__main__":
    main()
