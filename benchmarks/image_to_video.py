"""What inflation is worth: an inflated image model and the same network from random weights learn to animate an image.

    python benchmarks/image_to_video.py OUT --steps 6000

Both see the same clips, noise and settings, and both have the pocket model's trained autoencoder and image encoder;
the inflated one's pretraining as an image model is not counted. "Random" is PyTorch's initialisation in every layer,
also in those that inflation makes zero. Measured on held-out clips: the loss on fixed noise over the steps (and with
the temporal layers bypassed), the steps after which the inflated one is below the other's last loss, and of 32 samples
of the inflated one, told each clip's motion bucket: PSNR of frame 0 against the autoencoder's own, PSNR of frames 1-3
against a static copy, and how often the motion's direction is the one that the caption names. Writes
OUT/image_to_video.json and .png, and contact sheets.

To train both at once: first --only none, which makes the clips, then --only inflated beside --only scratch, and
--only none again for the report.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
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


def reset(network: nn.Module, seed: int = 0) -> None:
    """Give every layer of the network PyTorch's random weights, also those that inflation makes zero."""
    torch.manual_seed(seed)
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def make(start: str, clips: Path, arguments: argparse.Namespace) -> tuple[ImageToVideoTask, ClipDataset, ClipDataset]:
    """The task, its training clips and its held-out clips."""
    data = Data(str(clips), split="train", held_out="held_out", frames=8, height=64, width=64)
    dataset, held_out = ClipDataset(data, seed=0), ClipDataset(data.evaluation(), shuffle=False)
    family = SVD.load(arguments.model, frames=data.frames)
    family.fps, family.motion = demo.FPS, MotionBuckets.fit(dataset.motion_scores())
    if start == "scratch":
        reset(family.unet)
    settings = ImageToVideo(P_mean=arguments.P_mean, P_std=arguments.P_std, preview_clips=8)
    sampling = Preview(steps=25, guidance_max=arguments.guidance)
    batches = [collate([item]) for item in held_out]
    return ImageToVideoTask(family, settings, batches, sampling, arguments.lr, seed=0), dataset, held_out


def train(start: str, clips: Path, arguments: argparse.Namespace) -> tuple[ImageToVideoTask, ClipDataset]:
    """Train from a start; the run resumes where it was cut off."""
    task, dataset, held_out = make(start, clips, arguments)
    training = Training(
        output=arguments.output / start, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, warmup=100,
        schedule="cosine", ema=0.998, precision="bf16", workers=0, log_every=50, tracker="none", resume="latest",
        evaluate_every=arguments.steps // 12, preview_every=arguments.steps // 3, checkpoint_every=250,
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
        scene = demo.Scene(**{name: row[name] for name in demo.Scene.__dataclass_fields__})
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


def first_below(rows: Sequence[dict[str, float]], level: float) -> float | None:
    """The first measured step at which the held-out loss is at or below a level; None if it never is."""
    return next((row["step"] for row in rows if row["held-out loss"] <= level), None)


def report(output: Path, steps: int, result: dict[str, Any]) -> None:
    """Write the numbers and the curves."""
    curves = {
        start: json.loads((output / start / "metrics.json").read_text())["held_out"]
        for start in STARTS if (output / start / "metrics.json").is_file()
    }  # fmt: skip
    result["curves"] = curves
    if len(curves) == 2 and all(rows[-1]["step"] == steps for rows in curves.values()):
        reached = first_below(curves["inflated"], curves["scratch"][-1]["held-out loss"])
        result["inflated is below scratch's last loss after steps"] = reached
        result["ratio of steps to equal loss, at least"] = steps / reached if reached else None
    write(output / "image_to_video.json", record(command("OUT"), result))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for start, rows in curves.items():
        for name, style in (("held-out loss", "-"), ("held-out loss, temporal layers bypassed", ":")):
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], style, marker=".", label=f"{start}: {name}")
    axes.set(xlabel="step", ylabel="held-out loss", yscale="log")
    axes.legend()
    figure.savefig(output / "image_to_video.png", dpi=90)
    print(json.dumps({name: value for name, value in result.items() if name != "curves"}, indent=1))


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
    parser.add_argument("--only", choices=[*STARTS, "none"], help="train only this one, or none")
    arguments = parser.parse_args()
    clips = build(arguments.output / "clips", clips=arguments.clips, held_out=32)
    examined = arguments.output / "examined.json"
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"}}
    for start in STARTS:
        if arguments.only in (None, start):
            task, held_out = train(start, clips, arguments)
            if start == "inflated":
                examined.write_text(json.dumps(examine(task, held_out, arguments.output)) + "\n")
    if examined.is_file():
        result |= json.loads(examined.read_text())
    report(arguments.output, arguments.steps, result)


if __name__ == "__main__":
    main()
