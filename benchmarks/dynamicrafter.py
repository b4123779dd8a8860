"""What the two image streams of a DynamiCrafter model do, whether it goes from image to image, and what steers it.

    python benchmarks/dynamicrafter.py MODEL CLIPS OUT --guidance 3
    python benchmarks/dynamicrafter.py MODEL CLIPS OUT --only steering --ways left right up down

MODEL is a DynamiCrafter folder, such as a run's export, CLIPS what datasets/build_demo.py built, whose held-out clips
are measured, as long as the model draws them; a sample's seed is its place among those that are drawn.

`streams`: clips drawn of first frames and captions with both streams of the image, with its tokens in cross-attention
alone (beside the noisy latents are zeros), with its latents alone (the tokens are those of no image) and with neither,
each with the caption and without. PSNR and SSIM of frame 0 to the image; what frame 0 shows, by a judge that is told
nothing of it (`scenes.seen`), beside what the image does; the mean cosine of all frames to the image by the image
encoder; whether the clip moves as its caption says, and how much. The same of real clips, of what the autoencoder makes
of them (the ceiling), and of other clips (the floor).

`interpolation`, of a model that was trained for it: clips drawn between first and last frames. PSNR of both ends; of
the frames between, PSNR and perceptual distance to the real ones, and how far the motion is from theirs, as a share of
it (a still clip has 1, the same motion 0; which way a shape goes would say nothing, since in a linear cross-fade it
fades there). The same of that cross-fade of both ends' pixels, as it is and as the autoencoder draws it.

`steering`: the same first frame with captions that differ in the direction alone, one of each of --ways: of --count
scenes whose motion is `told` by the caption alone (datasets/build_demo.py --told), and of as many where the image has
`shown` it. How many samples move as asked, by shape and, of the latter, by whether the image shows the same. `chance`
is how often the motions found agree with what is asked of any sample, `as the real clip` how often a sample moves so,
despite what is asked. A clip that stands still, or without a shape of its caption's colour in frame 0, agrees with
nothing.

Writes OUT/NAME.json and contact sheets OUT/NAME-*.png; with --runs, the held-out losses of each stage's run in
OUT/stages.json and OUT/STAGE.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from animations import amount, keeping, reconstructed, tell
from text_to_video import curve
from torch import Tensor, nn

from inflate.data import demo
from inflate.data.motion import flow, reduced
from inflate.data.pixels import to_uint8, unit
from inflate.families.dynamicrafter import Condition, DynamiCrafter
from inflate.metrics.perceptual import EncoderFeatures
from inflate.metrics.video import psnr
from inflate.models.image_encoders import shown
from inflate.sampling.dynamicrafter import Sampling, sample
from scenes import agreement, masks_of, motions_of, read, sheets

Scenes = list[demo.Scene]
Result = dict[str, Any]

PLACES = "MODEL", "CLIPS", "OUT"
SHOWN = 6
"""Clips of which contact sheets show all samples."""
STREAMS = {
    "both streams": (True, True),
    "tokens alone": (True, False),
    "latents alone": (False, True),
    "neither": (False, False),
}
"""Whether cross-attention sees the image, and whether its latents lie beside the noisy ones."""


@dataclass
class Ablated(DynamiCrafter):
    """A model that lacks a stream of the image."""

    tokens: bool = True
    """whether cross-attention sees the image, or no image"""
    latents: bool = True
    """whether the image's latents lie beside the noisy ones, or zeros"""

    @classmethod
    def of(cls, family: DynamiCrafter, tokens: bool, latents: bool) -> Self:
        """The model; its networks are shared."""
        parts = {part.name: getattr(family, part.name) for part in fields(family)}
        return cls(**parts, tokens=tokens, latents=latents)

    def embed_image(self, images: Tensor) -> Tensor:
        """What CLIP tells of the images (B, 3, H, W), or of none: (B, P, E)."""
        return super().embed_image(images if self.tokens else torch.zeros_like(images))

    def condition(self, *arguments: Any, **named: Any) -> Condition:
        """The model's condition, or one with zeros for the image's latents."""
        condition = super().condition(*arguments, **named)
        if condition.detail is None or self.latents:
            return condition
        return replace(condition, detail=torch.zeros_like(condition.detail))


@dataclass(frozen=True)
class Bench:
    """What is measured, and how its samples are drawn and told."""

    family: DynamiCrafter
    clips: Tensor
    """real ones (N, F, 3, H, W) in [-1, 1]"""
    scenes: Scenes
    """theirs"""
    settings: Sampling
    output: Path
    ways: Sequence[str]
    """directions that are asked for"""
    count: int
    """most clips that are drawn of"""

    @property
    def captions(self) -> list[str]:
        """Those of the clips."""
        return [scene.caption for scene in self.scenes]

    def first(self, places: Sequence[int] | None = None) -> Bench:
        """The same of the first of all clips, or of those at places."""
        chosen = list(range(len(self.scenes)) if places is None else places)[: self.count]
        return replace(self, clips=self.clips[chosen], scenes=[self.scenes[place] for place in chosen])

    def draw(self, prompts: Sequence[str], to_ends: bool = False, family: DynamiCrafter | None = None) -> Tensor:
        """A clip of each first frame and prompt (N, F, 3, H, W) in [-1, 1], by choice to the last frame."""
        images, lasts = self.clips[:, 0], self.clips[:, -1]
        parts = []
        for first in range(0, len(images), 8):
            part = slice(first, first + 8)
            seeds = range(len(images))[part]
            ends = lasts[part] if to_ends else None
            parts.append(sample(family or self.family, images[part], prompts[part], seeds, self.settings, ends))
        return torch.cat(parts).clamp(-1, 1)

    def show(self, name: str, clips: dict[str, Tensor]) -> None:
        """Contact sheets of the first clips, those of each kind one under the other."""
        numbers = range(min(SHOWN, len(self.scenes)))
        labels = [f"{number:02d} {kind}" for number in numbers for kind in clips]
        rows = [each[number] for number in numbers for each in clips.values()]
        sheets(self.output, name, rows, labels, max(1, 16 // len(clips)) * len(clips))


def motion_error(clips: Tensor, truth: Tensor) -> Tensor:
    """The mean distance of the flow in clips (N, F, 3, H, W) in [-1, 1] to the real one, over its length: (N,)."""

    def flows(clip: Tensor) -> npt.NDArray[np.float32]:
        grey = reduced(to_uint8(unit(clip)))
        return np.stack(flow(grey[:-1], grey[1:]))  # (2, F - 1, h, w)

    pairs = [(flows(clip), flows(real)) for clip, real in zip(clips, truth, strict=True)]
    return torch.tensor([np.hypot(*(own - real)).mean() / np.hypot(*real).mean() for own, real in pairs])


def keeping_of(bench: Bench, clips: Tensor) -> dict[str, float]:
    """What clips (N, F, 3, H, W) in [-1, 1] keep of the real ones' first frames, and how they move."""
    family = bench.family

    def embed(frames: Tensor) -> Tensor:
        pixels = shown(family.image_encoder, frames, family.image_mean, family.image_std)
        vectors: Tensor = family.image_encoder(pixels).image_embeds
        return vectors

    return keeping(embed, clips, bench.clips, bench.scenes)


def streams(bench: Bench) -> Result:
    """What samples keep of their image with and without each stream, with and without the caption."""
    bench = bench.first()
    clips = {"real clips": bench.clips, "autoencoder": reconstructed(bench.family, bench.clips)}
    for name, (tokens, latents) in STREAMS.items():
        if latents and not bench.family.takes_detail:
            continue  # a model of the first two stages
        model = Ablated.of(bench.family, tokens, latents)
        clips[name] = bench.draw(bench.captions, family=model)
        clips[f"{name}, no caption"] = bench.draw([""] * len(bench.scenes), family=model)
    bench.show("streams", clips)
    clips["other clips"] = bench.clips.roll(1, 0)
    return {name: keeping_of(bench, each) for name, each in clips.items()}


def cross_fade(clips: Tensor) -> Tensor:
    """Clips (N, F, 3, H, W) that fade from the first frames of clips to the last, linearly."""
    share = torch.linspace(0, 1, clips.shape[1])[:, None, None, None]
    return clips[:, :1] * (1 - share) + clips[:, -1:] * share


@torch.no_grad()
def between(clips: Tensor, truth: Tensor, distance: nn.Module) -> dict[str, Tensor]:
    """How close clips (N, F >= 3, 3, H, W) in [-1, 1] come to the real ones, at both ends and between: each (N,)."""
    middle = slice(1, -1)
    far = distance(clips[:, middle].flatten(0, 1), truth[:, middle].flatten(0, 1)).unflatten(0, (len(clips), -1))
    places = {"first frame": slice(0, 1), "last frame": slice(-1, None), "frames between": middle}
    near = {f"psnr, {name}": psnr(unit(clips[:, place]), unit(truth[:, place])) for name, place in places.items()}
    return {**near, "perceptual distance, frames between": far.mean(1), "motion error": motion_error(clips, truth)}


def interpolation(bench: Bench) -> Result:
    """Samples between first and last frames, beside a cross-fade."""
    bench = bench.first()
    truth, faded = bench.clips, cross_fade(bench.clips)
    clips = {"samples": bench.draw(bench.captions, to_ends=True), "cross-fade": faded}
    bench.show("interpolation", {"real clips": truth, **clips})
    clips["autoencoder"] = reconstructed(bench.family, truth)
    clips["cross-fade, autoencoder"] = reconstructed(bench.family, faded)
    distance = EncoderFeatures(bench.family.vae)
    found = {name: between(each, truth, distance) for name, each in clips.items()}
    ends = torch.minimum(found["samples"]["psnr, first frame"], found["samples"]["psnr, last frame"])
    better = {
        f"both ends closer than the {name} is between": int((ends > each["psnr, frames between"]).sum())
        for name, each in found.items() if name.startswith("cross-fade")
    }  # fmt: skip
    amounts = {name: {"motion per frame": amount(each)} for name, each in {"real clips": truth, **clips}.items()}
    means = {name: {key: float(value.mean()) for key, value in each.items()} for name, each in found.items()}
    return {"clips": len(truth), **better, **{name: means.get(name, {}) | each for name, each in amounts.items()}}


def asked(scene: demo.Scene, way: str) -> str:
    """The scene's caption, but that the shape flies this way."""
    return replace(scene, heading=way, told=scene.shape != "dart").caption


def counted(right: Sequence[bool]) -> Result:
    """How many of how many."""
    return {"as asked": sum(right), "of": len(right), "share": sum(right) / len(right)}


def steered(found: dict[str, list[str]], scenes: Scenes) -> Result:
    """What the motions of samples, by the way that was asked and one of each scene, say of who steers."""
    samples = [(way, name, scene) for way, names in found.items() for name, scene in zip(names, scenes, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for way, name, scene in samples:
        kinds.setdefault(scene.shape, []).append(name == way)
        if not scene.told:
            kinds.setdefault(f"image shows {'the same' if scene.motion == way else 'another'}", []).append(name == way)
    always = [all(names[place] == way for way, names in found.items()) for place in range(len(scenes))]
    return {
        **counted([name == way for way, name, _ in samples]),
        "chance": fmean(name == way for way in found for _, name, _ in samples),
        "as the real clip": fmean(name == scene.motion for _, name, scene in samples),
        "images that follow every caption": f"{sum(always)} of {len(scenes)}",
        **{kind: counted(right) for kind, right in kinds.items()},
        "found": found,
    }


def steer(bench: Bench, name: str) -> Result:
    """Samples of the same first frames by captions that differ in the direction alone, and by the clips' own."""
    clips = {"real clips": bench.clips, "own caption": bench.draw(bench.captions)}
    for way in bench.ways:
        clips[way] = bench.draw([asked(scene, way) for scene in bench.scenes])
    bench.show(f"steering-{name}", clips)
    found = {way: motions_of(clips[way], masks_of(clips[way], bench.scenes)) for way in bench.ways}
    return {
        **steered(found, bench.scenes),
        "real clips": agreement(bench.clips, bench.scenes),
        "own caption": agreement(clips["own caption"], bench.scenes),
        "motion per frame": {kind: amount(each) for kind, each in clips.items()},
    }


def steering(bench: Bench) -> Result:
    """What steers, of clips whose motion the caption alone tells and of those where the image shows it."""
    groups = {"told": True, "shown": False}
    chosen = {name: [n for n, scene in enumerate(bench.scenes) if scene.told is told] for name, told in groups.items()}
    return {name: steer(bench.first(places), name) for name, places in chosen.items() if places}


def sampling(family: DynamiCrafter, arguments: argparse.Namespace) -> Sampling:
    """How clips are drawn that are like real ones of the stride."""
    given = {name: getattr(arguments, name) for name in ("guidance", "image_guidance", "steps", "eta", "frames")}
    stride = torch.tensor([float(arguments.stride)])
    return Sampling(**given, number=float(family.clips.numbers(demo.FPS / stride, stride)))


MEASURES = {"streams": streams, "interpolation": interpolation, "steering": steering}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="all that fit the model by default")
    parser.add_argument("--count", type=int, default=32, help="held-out clips")
    parser.add_argument("--ways", nargs="+", choices=demo.HEADINGS, default=["left", "right"])
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--image-guidance", type=float, dest="image_guidance", help="another scale for the image")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--eta", type=float, default=Sampling.eta)
    parser.add_argument("--frames", type=int, help="the model's own by default")
    parser.add_argument("--stride", type=int, default=1, help="a clip's every so manyth frame, as the model is told")
    parser.add_argument("--runs", nargs="+", default=[], metavar="STAGE=RUN", help="whose held-out losses are told")
    return parser.parse_args(words)


def fitting(family: DynamiCrafter, asked: Sequence[str] | None) -> Sequence[str]:
    """The measures asked for, or all that fit; the script ends where one does not fit the model."""
    all_fitting = ["interpolation"] if family.clips.interpolation else ["streams", "steering"]
    if not set(asked or []) <= set(all_fitting):
        sys.exit(f"error: this model was trained for {' and '.join(all_fitting)}: leave out the rest of --only")
    return asked or all_fitting


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    family = DynamiCrafter.load(arguments.model)
    names, settings = fitting(family, arguments.only), sampling(family, arguments)
    clips, scenes = read(arguments.clips, None, settings.frames or family.clips.frames, arguments.stride)
    bench = Bench(family, clips, scenes, settings, arguments.output, arguments.ways, arguments.count)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in names:
        found = MEASURES[name](bench)
        print(name, json.dumps(found, indent=1))
        tell(arguments.output / f"{name}.json", {"sampling": asdict(settings), name: found}, PLACES, arguments.runs)
    if arguments.runs:
        runs = dict(text.split("=", 1) for text in arguments.runs)
        stages = {stage: curve(Path(run), arguments.output / f"{stage}.png") for stage, run in runs.items()}
        tell(arguments.output / "stages.json", {"held-out losses": stages}, PLACES, arguments.runs)


if __name__ == "__main__":
    main()
