"""Whether clips move more, and still begin with their image, once models cannot lean on it at high noise levels.

    python benchmarks/leakage.py OUT

Two image-to-video models learn from the same newborn one, on the same clips, draws and number of steps: plain, and with
noise on the conditioning latent (`image_to_video.condition_noise`). Each then animates the first frames of held-out
clips from the highest noise level and from lower ones (--starts), there from plain noise as well as by the measured
mean and variance of latents. Told are each clip's frame rate and motion bucket. Measured: the loss on fixed noise at
high levels, condition without noise as in sampling; the speed of the moving thing and of the scene by
`inflate.metrics.flow`, against those of the true clips and of the plain model from the highest level; how much the last
frame differs from the first; frame 0 (PSNR).
Writes OUT/leakage.json and contact sheets.

What is done is kept: the same command goes on. To train both at once: first --only none, which makes and encodes the
clips, then --only plain beside --only noise, and --only none again for the report.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from inflate.data import demo, video
from inflate.data.clips import ClipDataset, collate
from inflate.data.demo_clips import build
from inflate.data.motion import Pixels
from inflate.data.pixels import to_uint8, unit
from inflate.data.settings import Data
from inflate.families.svd import SVD, MotionBuckets
from inflate.metrics import flow
from inflate.metrics.video import psnr
from inflate.sampling.svd import Sampling, decoded, sample
from inflate.training.caching import Caching, Model, cache_clips
from inflate.training.encoding import clip_encoder
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.leakage import ConditionNoise
from inflate.training.loop import Batch, fit
from inflate.training.noise import seed_of
from inflate.training.settings import Training
from record import command, record, write

ARMS = ("plain", "noise")
LEVELS = (1.0, 5.0, 25.0, 125.0)
"""Noise levels of the loss."""
SHOWN = 4
"""Clips in each contact sheet."""
PARTS = (slice(0, 1), slice(1, None))
"""The frame that should be the image, and the later ones."""
Array = npt.NDArray[np.float64]


def data_of(arguments: argparse.Namespace) -> Data:
    return Data(
        str(arguments.output / "clips"), split="train", held_out="held_out", frames=8, height=64, width=64,
        cache=str(arguments.output / "cache"), cache_draws=4,
    )  # fmt: skip


def settings_of(arm: str, arguments: argparse.Namespace) -> ImageToVideo:
    maximum = arguments.maximum if arm == "noise" else 0.0
    return ImageToVideo(
        trainable="temporal", P_mean=0.0, P_std=1.6, condition_noise=ConditionNoise(maximum, arguments.exponent),
        held_out_clips=arguments.images,
    )  # fmt: skip


def held_out_of(arguments: argparse.Namespace) -> list[Batch]:
    clips = ClipDataset(data_of(arguments).evaluation(), shuffle=False)
    return [dict(collate([clips[number]])) for number in range(arguments.images)]


def task_of(family: SVD, arm: str, arguments: argparse.Namespace) -> tuple[ImageToVideoTask, ClipDataset]:
    """The task of an arm, and the cached clips that it trains on."""
    settings, dataset = settings_of(arm, arguments), ClipDataset(data_of(arguments))
    dataset.read_encoded(clip_encoder(family, data_of(arguments), settings), "none")
    family.fps, family.motion = demo.FPS, MotionBuckets.fit(dataset.motion_scores())
    known = [dict(collate([dataset[number]])) for number in range(min(settings.train_clips, len(dataset)))]
    task = ImageToVideoTask(
        family, settings, held_out_of(arguments), Preview(), arguments.lr, 0, known, "none", together=arguments.batch
    )
    return task, dataset


def train(arm: str, arguments: argparse.Namespace) -> None:
    """Train an arm, or go on with it, and keep the losses of its averaged weights."""
    run = arguments.output / arm
    if not (run / "export").is_dir():
        torch.manual_seed(seed_of(0, "model"))  # inflation draws the new layers' weights
        task, dataset = task_of(SVD.load(arguments.model, frames=8), arm, arguments)
        training = Training(
            output=run, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, schedule="cosine", workers=0,
            warmup=min(100, arguments.steps // 10), ema=0.998, precision="bf16", log_every=50, tracker="none",
            resume="latest", checkpoint_every=250, preview_every=0, evaluate_every=max(1, arguments.steps // 8),
        )  # fmt: skip
        result = fit(task, dataset, training, collate)
        if result.export is None:
            raise SystemExit(f"stopped by {result.stopped} at step {result.step}; the same command goes on")
    if not (run / "losses.json").is_file():
        task, _ = task_of(SVD.from_pretrained(run / "export"), arm, arguments)
        with torch.no_grad():
            losses = task.fixed_losses(task.measured[0], list(LEVELS)).mean(0)
        write(run / "losses.json", {f"sigma {level:g}": float(one) for level, one in zip(LEVELS, losses, strict=True)})


def starts_of(starts: Sequence[float]) -> Iterator[tuple[str, float | None, bool]]:
    """Name, noise level and whether the latents' moments are used, of each start of sampling."""
    yield "highest", None, False
    for level in starts:
        yield f"{level:g}", level, False
        yield f"{level:g}, moments", level, True


def draw(arm: str, clips: Sequence[Batch], arguments: argparse.Namespace) -> None:
    """Animate the clips' first frames from each start that has not been drawn yet."""
    known = SVD.from_pretrained(arguments.output / arm / "export")
    for name, level, moments in starts_of(arguments.starts):
        file = arguments.output / arm / f"{name}.npy"
        if file.is_file():
            continue
        family = known if moments else replace(known, moments=None)
        drawn = []
        for number, clip in enumerate(clips):
            settings = Sampling(
                steps=arguments.sampling_steps, guidance_max=arguments.guidance, fps=float(clip["fps"][0]),
                motion_bucket=int(family.motion.bucket(clip["motion"])[0]), sigma_max=level, seed=number,
            )  # fmt: skip
            drawn.append(to_uint8(unit(sample(family, clip["pixels"][:, 0], settings)[0])))
        np.save(file, np.stack(drawn))


def reconstructed(clips: Sequence[Batch], arm: str, arguments: argparse.Namespace) -> list[Pixels]:
    """The clips as the autoencoder gives them back: no sample can be closer."""
    family = SVD.from_pretrained(arguments.output / arm / "export")
    return [to_uint8(unit(decoded(family, family.encode(clip["pixels"]))[0])) for clip in clips]


@dataclass(frozen=True)
class Moving:
    """Clips, how they move, and how fast in sides per second."""

    clips: Sequence[Pixels]

    @cached_property
    def motions(self) -> list[flow.Motions]:
        return [flow.motions(clip, demo.FPS) for clip in self.clips]

    @cached_property
    def speeds(self) -> Array:
        """Of the moving thing, or of the scene where nothing moves in it: (N,)."""
        return np.array([_speed(each.object or each.scene) for each in self.motions])

    @property
    def scene_speeds(self) -> Array:
        return np.array([_speed(each.scene) for each in self.motions])

    @property
    def change(self) -> float:
        """How much the last frames differ from the first."""
        return fmean(float(np.abs(clip[-1].astype(np.float64) - clip[0]).mean()) for clip in self.clips)


def compare(made: Moving, truth: Moving) -> dict[str, float]:
    """How samples move beside the true clips, in sides per second, and how well they begin with the image."""
    pairs = list(zip(made.motions, truth.motions, strict=True))
    moving = [mine for mine, real in pairs if real.name != "still"]
    near = [[_psnr(one[part], real[part]) for one, real in zip(made.clips, truth.clips, strict=True)] for part in PARTS]
    return {
        "speed": float(made.speeds.mean()), "of the true speed": float(made.speeds.mean() / truth.speeds.mean()),
        "speed off by": float(np.abs(made.speeds - truth.speeds).mean()),
        "scene's speed": float(made.scene_speeds.mean()),
        "of the scene's true speed": float(made.scene_speeds.mean() / truth.scene_speeds.mean()),
        "still, of those that should move": sum(each.name == "still" for each in moving) / len(moving),
        "named as the true motion": sum(mine.name == real.name for mine, real in pairs) / len(pairs),
        "last frame's change, of the true one": made.change / truth.change,
        "frame 0, PSNR": fmean(near[0]), "later frames, PSNR": fmean(near[1]),
    }  # fmt: skip


def gain(made: Moving, base: Moving, truth: Moving) -> dict[str, float]:
    """How much faster samples are than others of the same images, of the true speed, and how sure that is."""
    faster = (made.speeds - base.speeds) / truth.speeds.mean()
    error = faster.std(ddof=1) / len(faster) ** 0.5 if len(faster) > 1 else math.nan
    return {"more of it than plain from the highest": float(faster.mean()), "its standard error": float(error)}


def _speed(motion: flow.Motion | None) -> float:
    return motion.speed if motion else 0.0


def _psnr(made: Pixels, real: Pixels) -> float:
    one, other = (torch.from_numpy(each).movedim(-1, 1)[None] / 255.0 for each in (made, real))  # (1, F, 3, H, W)
    return float(psnr(one, other).mean())


def report(clips: Sequence[Batch], arguments: argparse.Namespace) -> None:
    """Compare what there is with the true clips; write the numbers and a contact sheet per arm."""
    truth = Moving([to_uint8(unit(clip["pixels"][0])) for clip in clips])
    result: dict[str, Any] = {"settings": {k: str(v) for k, v in vars(arguments).items() if k != "output"}}
    base = None
    for arm in ARMS:
        if not (arguments.output / arm / "losses.json").is_file():
            continue
        if "autoencoder" not in result:
            result["autoencoder"] = compare(Moving(reconstructed(clips, arm, arguments)), truth)
        drawn = drawn_of(arm, arguments)
        base = base or drawn.get("highest")
        result[arm] = {
            "held-out loss": json.loads((arguments.output / arm / "losses.json").read_text()),
            "from": {name: compare(made, truth) | gain(made, base or made, truth) for name, made in drawn.items()},
        }
        show(arguments.output / f"{arm}.png", {"truth": truth, **drawn})
    write(arguments.output / "leakage.json", record(command("OUT"), result))
    print(json.dumps(result, indent=1))


def drawn_of(arm: str, arguments: argparse.Namespace) -> dict[str, Moving]:
    """What an arm has drawn, by its starts."""
    files = {name: arguments.output / arm / f"{name}.npy" for name, _, _ in starts_of(arguments.starts)}
    return {name: Moving(list(np.load(file))) for name, file in files.items() if file.is_file()}


def show(path: Path, rows: dict[str, Moving]) -> None:
    """A contact sheet of the first clips, those of each kind one under the other."""
    places = range(min(SHOWN, len(rows["truth"].clips)))
    shown = [(made.clips[place], f"{place} {name}") for place in places for name, made in rows.items()]
    video.contact_sheet(path, [clip for clip, _ in shown], [label for _, label in shown])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--maximum", type=float, default=2.7, help="of the noise on the conditioning latent")
    parser.add_argument("--exponent", type=float, default=5.0, help="how late in diffusion time it rises")
    parser.add_argument("--starts", type=float, nargs="*", default=[50.0, 10.0], help="lower noise levels of sampling")
    parser.add_argument("--sampling-steps", type=int, default=15, dest="sampling_steps")
    parser.add_argument("--guidance", type=float, default=1.5)
    parser.add_argument("--clips", type=int, default=1000, help="of training")
    parser.add_argument("--images", type=int, default=32, help="held-out clips")
    parser.add_argument("--only", choices=[*ARMS, "none"], help="train and draw only this one, or none")
    arguments = parser.parse_args()
    build(arguments.output / "clips", clips=arguments.clips, held_out=arguments.images)
    caching = Caching(
        data=data_of(arguments), model=Model(arguments.model), image_to_video=settings_of("plain", arguments)
    )
    cache_clips(caching, verify=False, prune=False, progress=lambda _: lambda *_: None, say=print)
    clips = held_out_of(arguments)
    for arm in ARMS:
        if arguments.only in (None, arm):
            train(arm, arguments)
            draw(arm, clips, arguments)
    report(clips, arguments)


if __name__ == "__main__":
    main()
