"""What the shipped weights measure, and whether weights that are made again by their commands measure the same.

    python benchmarks/shipped.py CLIPS OUT.json
    python benchmarks/shipped.py CLIPS OUT.json --pocket-svd RUN/export --against benchmarks/results/shipped.json

CLIPS is what datasets/build_demo.py built. Of pocket: PSNR of its autoencoder on the held-out clips' first frames, and
how many darts it draws with the heading that their captions name. Of pocket-t2v: its held-out losses, and how many
clips move as their captions say. Of pocket-svd: its held-out losses, PSNR of its samples, and how many move as they
should. The commands that made the weights stand in benchmarks/results/pocket/README.md. With --against, every number is
set beside the recorded one, and one that differs by more than --tolerance of it is a failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from image_to_video import directions
from text_to_video import drawn

from inflate.data.clips import ClipDataset, collate
from inflate.data.pixels import unit
from inflate.data.settings import Data
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.metrics.video import psnr
from inflate.sampling.text_to_video import Sampling, sample
from inflate.training.denoising import Given
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask
from inflate.training.image_to_video import Preview as ImagePreview
from inflate.training.text_to_video import Preview, TextToVideo, TextToVideoTask
from record import command, record, write
from scenes import agreement, object_of, read, right_headings

Numbers = dict[str, float]
GUIDANCE = 5.0


def image_model(path: str, clips: Path, count: int) -> Numbers:
    """The autoencoder's PSNR, and the share of darts drawn as named."""
    family = VideoLDM.load(path)
    truth, scenes = read(clips, count, 1)
    back = family.decode(family.encode(truth)).clamp(-1, 1)
    settings, numbers = Sampling(steps=20, guidance=GUIDANCE, frames=1), range(len(scenes))
    parts = [numbers[first : first + 16] for first in range(0, len(scenes), 16)]
    images = torch.cat([sample(family, [scenes[n].caption for n in part], part, settings) for part in parts])
    masks = [object_of(unit(image[0]), scene, "vivid") for image, scene in zip(images, scenes, strict=True)]
    right = right_headings(masks, scenes)
    return {"autoencoder psnr": float(psnr(unit(back), unit(truth)).mean()), "darts as named": sum(right) / len(right)}


def text_to_video(path: str, clips: Path, count: int) -> Numbers:
    """The held-out losses, and the share of clips that move as their captions say."""
    family = VideoLDM.load(path)
    truth, scenes = read(clips, count, family.clips.frames)
    settings = TextToVideo(held_out_clips=len(scenes), train_clips=0)
    task = TextToVideoTask(family, "temporal", settings, Preview(), Given(held_out(clips, count), lr=1.0, seed=0))
    share = agreement(drawn(family, scenes, GUIDANCE, 15), scenes)["share"]
    return {**losses(task), "moves as named": share, "real clips move as named": agreement(truth, scenes)["share"]}


def image_to_video(path: str, clips: Path, count: int) -> Numbers:
    """The held-out losses, the samples' scores, and the share of samples that move as their captions say."""
    settings = ImageToVideo(P_mean=0.0, P_std=1.6, held_out_clips=count, train_clips=0, preview_clips=count)
    sampling = ImagePreview(steps=25, guidance_max=1.5)
    task = ImageToVideoTask(SVD.load(path), settings, held_out(clips, count), sampling, lr=1.0, seed=0)
    truth, generated = task.animate(task.held_out)
    dataset = ClipDataset(data(clips), shuffle=False)
    pairs = directions(dataset, generated)
    agrees = sum(named == found for named, found in pairs) / len(pairs)
    return {**losses(task), **task.score(truth, generated), "moves as named": agrees}


def data(clips: Path) -> Data:
    """The held-out clips as training sees them."""
    return Data(str(clips), split="held_out", held_out="held_out", frames=8, height=64, width=64).evaluation()


def held_out(clips: Path, count: int) -> list[dict[str, Any]]:
    """Batches of one held-out clip each."""
    dataset = ClipDataset(data(clips), shuffle=False)
    return [collate([dataset[number]]) for number in range(min(count, len(dataset)))]


@torch.no_grad()
def losses(task: TextToVideoTask | ImageToVideoTask) -> Numbers:
    """The held-out losses of a task."""
    return {name: value for name, value in task.evaluate().items() if name.startswith("held-out loss")}


MEASURES = {"pocket": image_model, "pocket-t2v": text_to_video, "pocket-svd": image_to_video}


def differing(found: dict[str, Numbers], recorded: dict[str, Numbers], tolerance: float) -> list[str]:
    """A line for each number that is not the recorded one, nor within the share `tolerance` of it."""
    lines = [
        f"{name}: {', '.join(sorted(numbers.keys() ^ recorded.get(name, {}).keys()))} is only here or only recorded"
        for name, numbers in found.items() if numbers.keys() != recorded.get(name, {}).keys()
    ]  # fmt: skip
    for name, numbers in found.items():
        for key in numbers.keys() & recorded.get(name, {}).keys():
            value, before = numbers[key], recorded[name][key]
            print(f"{name:11} {key:48} {value:.6g} (recorded: {before:.6g})")
            if abs(value - before) > tolerance * abs(before):
                lines.append(f"{name}: {key} is {value:.6g}, recorded is {before:.6g}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    for name in MEASURES:
        parser.add_argument(f"--{name}", default=name, dest=name, help="weights to measure in their place")
    parser.add_argument("--only", choices=MEASURES, nargs="+", default=[*MEASURES])
    parser.add_argument("--count", type=int, default=64, help="held-out clips")
    parser.add_argument("--against", type=Path, help="a record to compare with")
    parser.add_argument("--tolerance", type=float, default=0.02, help="largest difference, as a share")
    arguments = parser.parse_args()
    recorded = json.loads(arguments.against.read_text())["measured"] if arguments.against else {}
    places = vars(arguments)
    found = {name: MEASURES[name](places[name], arguments.clips, arguments.count) for name in arguments.only}
    write(arguments.output, record(command("CLIPS", "OUT.json"), {"measured": found}))
    if not recorded:
        print(json.dumps(found, indent=1))
        return
    wrong = differing(found, recorded, arguments.tolerance)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
