"""What each part of I2VGen-XL's hierarchy does, and what its refinement makes of clips beside plain enlarging.

    python benchmarks/i2vgen_xl.py BASE CLIPS OUT --guidance 3 --steps 15
    python benchmarks/i2vgen_xl.py BASE CLIPS OUT --only refinement --refiner REFINER --strengths 0.17 0.33 1

BASE is an I2VGen-XL folder and REFINER one of its refinement stage, such as runs' exports, CLIPS what
datasets/build_demo.py built, whose held-out clips are measured; a sample's seed is its place among them, after those
that are left out by --skip.

`hierarchy`: clips drawn of first frames with everything and without one part, each with the caption and without: the
detail encoder's channels beside the noisy latents, the global encoder's tokens, CLIP's tokens, all three, and each part
without the other two. PSNR and SSIM of frame 0 to the image; what frame 0 shows, by a judge that is told nothing of it
(`scenes.seen`), beside what the image does; the mean cosine of all frames to the image by the image encoder; whether
the clip moves as its caption says, and how much. The same of real clips, of what the autoencoder makes of them (the
ceiling) and of other clips (the floor).

`refinement`: clips of the refiner's size against their truth: PSNR, SSIM, sharpness (power in the upper half of
frequencies over the true one, 1 is as sharp), the distance of both spectra there (decades), change from frame to frame
that is not in the truth (flicker error), all change (flicker), change where the truth stands still (shimmer), and the
perceptual distance. What is enlarged and refined is the true clip at BASE's size, what the autoencoder makes of it
there (the best that BASE can draw), and what BASE draws of the first frame and the caption; each is enlarged
bicubically and bilinearly, as before a refinement, and refined with every one of --starts, --strengths and
--keep-colours. Beside them stand what BASE draws at the refiner's size at once, and the true clips through the
refiner's autoencoder, the ceiling of what is not kept.

Writes OUT/NAME.json and contact sheets OUT/NAME-*.png; with --runs, the held-out losses of each stage's run in
OUT/stages.json and OUT/STAGE.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self, get_args

import torch
import torch.nn.functional as F
from animations import keeping, reconstructed, tell
from text_to_video import curve
from torch import Tensor, nn

from inflate.data import demo
from inflate.data.pixels import unit
from inflate.families.i2vgen_xl import Condition, I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.layers.hierarchy import Part
from inflate.metrics.perceptual import EncoderFeatures
from inflate.metrics.video import (
    flicker,
    flicker_error,
    power_spectrum,
    psnr,
    sharpness,
    spectrum_distance,
    ssim,
)
from inflate.sampling.colours import recoloured
from inflate.sampling.i2vgen_xl import Sampling, sample
from inflate.sampling.refinement import Refinement, Start, fitted, refine
from inflate.training.refinement import shrunk
from scenes import read, sheets

Scenes = list[demo.Scene]
Result = dict[str, Any]

PLACES = "BASE", "CLIPS", "OUT"
SHOWN = 6
"""Clips of which contact sheets show all samples."""
EVERY = 4
"""Frames of which one is compared by the perceptual distance, which is slow."""
STILL = 2 / 255
"""Change of any colour up to which a pixel of a real clip stands still."""
INPUTS = "true", "autoencoder", "drawn"
"""What may be enlarged and refined."""
ALL: tuple[Part, ...] = ("detail", "global", "clip")
WITHOUT: dict[str, tuple[Part, ...]] = {
    "everything": (),
    "detail off": ("detail",),
    "global off": ("global",),
    "CLIP off": ("clip",),
    "detail alone": ("global", "clip"),
    "global alone": ("detail", "clip"),
    "CLIP alone": ("detail", "global"),
    "no image": ALL,
}
"""Parts of the first frame that a model is not told."""


@dataclass
class Ablated(I2VGenXL):
    """A model that is not told parts of the first frame."""

    without: tuple[Part, ...] = field(kw_only=True)

    @classmethod
    def of(cls, family: I2VGenXL, without: tuple[Part, ...]) -> Self:
        """The model; its networks are shared."""
        return cls(**vars(family), without=without)

    def condition(self, *arguments: Any, **named: Any) -> Condition:
        """The model's condition without those parts."""
        told = super().condition(*arguments, **named)
        return Condition(told.text, told.latents, told.embedding, told.fps, self.without)


@dataclass(frozen=True)
class Bench:
    """What is measured, and how its samples are drawn."""

    family: I2VGenXL
    refiner: Refiner | None
    folder: Path
    """of clips"""
    settings: Sampling
    refinements: Sequence[Refinement]
    keep_colours: Sequence[int]
    """wavelet levels that each of them is corrected at"""
    inputs: Sequence[str]
    """what is refined, of `INPUTS`"""
    output: Path
    skip: int
    """held-out clips before those that are drawn of"""
    count: int
    """clips that are drawn of"""
    device: torch.device

    def read(self, size: tuple[int, int]) -> tuple[Tensor, Scenes]:
        """Real clips (N, F, 3, H, W) in [-1, 1] and their scenes."""
        frames = self.settings.frames or self.family.clips.frames
        clips, scenes = read(self.folder, self.skip + self.count, frames, size=size)
        return clips[self.skip :], scenes[self.skip :]

    def draw(self, images: Tensor, prompts: Sequence[str], family: I2VGenXL | None = None) -> Tensor:
        """A clip of each image (N, 3, H, W) and prompt: (N, F, 3, H, W) in [-1, 1]."""
        drawn = sample(family or self.family, images, prompts, range(len(images)), self.settings, device=self.device)
        return drawn.clamp(-1, 1).cpu()

    def refine(self, clips: Tensor, prompts: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Clips (N, F, 3, h, w) refined by prompts, by name of the settings: (N, F, 3, H, W) in [-1, 1].

        What differs in the colours that are kept is drawn once, and corrected as `refine` does.
        """
        assert self.refiner is not None
        before = torch.stack([fitted(clip, self.refiner.size) for clip in clips])  # (N, F, 3, H, W)
        for settings in self.refinements:
            drawn = refine(self.refiner, clips, prompts, range(len(clips)), settings=settings, device=self.device).cpu()
            for levels in self.keep_colours:
                kept = f", colours kept {levels}" if levels else ""
                parts = zip(drawn, before, strict=True)
                refined = [next(recoloured([own], frames, levels)) for own, frames in parts]
                yield f"{settings.start}, strength {settings.strength:g}{kept}", torch.stack(refined).clamp(-1, 1)

    def show(self, name: str, clips: dict[str, Tensor]) -> None:
        """Contact sheets of the first clips, those of each kind one under the other."""
        numbers = range(min(SHOWN, *(len(each) for each in clips.values())))
        labels = [f"{number:02d} {kind}" for number in numbers for kind in clips]
        rows = [each[number] for number in numbers for each in clips.values()]
        sheets(self.output, name, rows, labels, max(1, 16 // len(clips)) * len(clips))


def hierarchy(bench: Bench) -> Result:
    """What samples keep of their image without each part, with and without the caption."""
    family, device = bench.family, bench.device
    truth, scenes = bench.read(family.size)
    captions = [scene.caption for scene in scenes]
    clips = {"real clips": truth, "autoencoder": reconstructed(family, truth.to(device)).cpu()}
    for name, without in WITHOUT.items():
        if not set(without) <= set(family.hierarchy.parts) and without != ALL:
            continue  # of a model that lacks the part
        model = Ablated.of(family, without)
        clips[name] = bench.draw(truth[:, 0], captions, model)
        clips[f"{name}, no caption"] = bench.draw(truth[:, 0], [""] * len(scenes), model)
        print(name, flush=True)
    bench.show("hierarchy", clips)
    clips["other clips"] = truth.roll(1, 0)

    def embed(frames: Tensor) -> Tensor:
        return family.embed_image(frames.to(device))[:, 0].cpu()

    return {name: keeping(embed, each, truth, scenes) for name, each in clips.items()}


def enlarged(clips: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Clips (N, F, 3, h, w) in [-1, 1] of another size."""
    frames = F.interpolate(clips.flatten(0, 1), size, mode=mode)
    return frames.unflatten(0, clips.shape[:2]).clamp(-1, 1)


def shimmer(clips: Tensor, truth: Tensor) -> Tensor:
    """The mean change from frame to frame of clips (N, F, 3, H, W) in [0, 1] where the real ones stand still.

    Nothing moves there, so that sharper edges, which change more where they move, count for nothing.
    """
    still = truth.diff(dim=1).abs().amax(2, keepdim=True) < STILL  # (N, F - 1, 1, H, W)
    change = clips.diff(dim=1).abs().mean(2, keepdim=True)  # (N, F - 1, 1, H, W)
    return change[still].mean()


@torch.no_grad()
def close(clips: Tensor, truth: Tensor, distance: nn.Module) -> dict[str, float]:
    """How close clips (N, F, 3, H, W) in [-1, 1] come to the real ones, how sharp and how steady they are."""
    far = distance(clips[:, ::EVERY].flatten(0, 1), truth[:, ::EVERY].flatten(0, 1)).mean()
    clips, truth = unit(clips), unit(truth)
    own, true = power_spectrum(clips).sum(0), power_spectrum(truth).sum(0)
    found = {
        "psnr": psnr(clips, truth).mean(),
        "ssim": ssim(clips, truth).mean(),
        "sharpness": sharpness(own, true),
        "spectrum distance": spectrum_distance(own, true),
        "flicker error": flicker_error(clips, truth).mean(),
        "flicker": flicker(clips).mean(),
        "shimmer": shimmer(clips, truth),
        "perceptual distance": far,
    }
    return {name: float(value) for name, value in found.items()}


def check_sizes(base: tuple[int, int], refined: tuple[int, int]) -> None:
    """End the script where clips of the refiner's size (height, width) do not shrink to the base's evenly."""
    factor = refined[1] // base[1]
    if factor < 2 or refined != (base[0] * factor, base[1] * factor):
        sizes = " and ".join(f"{height}x{width}" for height, width in (base, refined))
        sys.exit(f"error: BASE and REFINER draw {sizes}: the second must be 2, 3, ... times the first")


def smaller(bench: Bench, truth: Tensor, captions: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """Clips of the base's size, by what they are."""
    true = shrunk(truth, truth.shape[-1] // bench.family.size[1])
    if "true" in bench.inputs:
        yield "true", true
    if "autoencoder" in bench.inputs:
        yield "autoencoder", reconstructed(bench.family, true.to(bench.device)).cpu()
    if "drawn" in bench.inputs:
        yield "drawn", bench.draw(true[:, 0], captions)


def refinement(bench: Bench) -> Result:
    """Refined clips beside enlarged ones."""
    assert bench.refiner is not None
    check_sizes(bench.family.size, bench.refiner.size)
    truth, scenes = bench.read(bench.refiner.size)
    captions, size = [scene.caption for scene in scenes], bench.refiner.size
    ceiling = reconstructed(bench.refiner, truth.to(bench.device)).cpu()
    found = {"truth": truth, "truth, refiner's autoencoder": ceiling}
    if "drawn" in bench.inputs:
        found["drawn at this size"] = bench.draw(truth[:, 0], captions)
    for kind, small in smaller(bench, truth, captions):
        own = {f"{kind}, {mode}": enlarged(small, size, mode) for mode in ("bicubic", "bilinear")}
        for name, clips in bench.refine(small, captions):
            own[f"{kind}, {name}"] = clips
            print(kind, name, flush=True)
        bench.show(f"refinement-{kind}", {"truth": truth, **own})
        found |= own
    distance = EncoderFeatures(bench.refiner.vae.cpu())
    return {name: close(each, truth, distance) for name, each in found.items() if name != "truth"}


MEASURES: dict[str, Callable[[Bench], Result]] = {"hierarchy": hierarchy, "refinement": refinement}


def parsed(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="BASE")
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--only", choices=MEASURES, nargs="*", help="both by default, if there is a --refiner; without a name, neither"
    )
    parser.add_argument("--refiner")
    parser.add_argument("--skip", type=int, default=0, help="so many of the first held-out clips")
    parser.add_argument("--count", type=int, default=32, help="held-out clips")
    parser.add_argument("--guidance", type=float, default=Sampling.guidance)
    parser.add_argument("--steps", type=int, default=Sampling.steps)
    parser.add_argument("--spacing", choices=("leading", "trailing"), default="trailing")
    parser.add_argument("--inputs", choices=INPUTS, nargs="+", default=INPUTS, help="what is refined")
    parser.add_argument("--starts", choices=get_args(Start), nargs="+", default=["noise"])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0], help="shares of the refiner's levels")
    parser.add_argument("--keep-colours", type=int, nargs="+", default=[0], help="wavelet levels; 0: as drawn")
    parser.add_argument("--refine-steps", type=int, default=Refinement.steps)
    parser.add_argument("--refine-guidance", type=float, default=Refinement.guidance)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", nargs="+", default=[], metavar="STAGE=RUN", help="whose held-out losses are told")
    return parser.parse_args(words)


def begun(arguments: argparse.Namespace) -> Bench:
    """The models, on the device, and how they are used."""
    device = torch.device(arguments.device)
    refiner = Refiner.load(arguments.refiner) if arguments.refiner else None
    family = I2VGenXL.load(arguments.model)
    for each in (family, refiner) if refiner else (family,):
        each.to(device)
    settings = Sampling(steps=arguments.steps, guidance=arguments.guidance, spacing=arguments.spacing)
    refinements = [
        Refinement(start, strength, steps=arguments.refine_steps, guidance=arguments.refine_guidance)
        for start in arguments.starts
        for strength in arguments.strengths
    ]
    return Bench(
        family, refiner, arguments.clips, settings, refinements, arguments.keep_colours, arguments.inputs,
        arguments.output, arguments.skip, arguments.count, device,
    )  # fmt: skip


def main(words: Sequence[str] | None = None) -> None:
    arguments = parsed(words)
    names = list(MEASURES)[: 2 if arguments.refiner else 1] if arguments.only is None else arguments.only
    if "refinement" in names and not arguments.refiner:
        sys.exit("error: a refinement needs its model: --refiner REFINER")
    bench = begun(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    told = partial(tell, places=PLACES, runs=arguments.runs, refiners=[arguments.refiner] if arguments.refiner else [])
    how = {"sampling": asdict(bench.settings), "refinements": [asdict(each) for each in bench.refinements]}
    for name in names:
        found = MEASURES[name](bench)
        print(name, json.dumps(found, indent=1))
        told(arguments.output / f"{name}.json", how | {name: found})
    if arguments.runs:
        runs = dict(text.split("=", 1) for text in arguments.runs)
        stages = {stage: curve(Path(run), arguments.output / f"{stage}.png") for stage, run in runs.items()}
        told(arguments.output / "stages.json", {"held-out losses": stages})


if __name__ == "__main__":
    main()
