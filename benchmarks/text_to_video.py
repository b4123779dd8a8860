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
import math
from pathlib import Path
from typing import Any, get_args

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


def distance(frame: Tensor, colour: str, shades: tuple[float, ...], look: demo.Look) -> Tensor:
    """Squared distance of each pixel of a frame (3, H, W) in [0, 1] to the nearest shade of a colour (H, W)."""
    tones = torch.tensor([[shade * value for value in demo.PALETTES[look][colour]] for shade in shades])
    return (frame[None] - tones[:, :, None, None]).square().sum(1).amin(0)  # (H, W)


def distances(frame: Tensor, scene: demo.Scene, look: demo.Look) -> tuple[Tensor, Tensor]:
    """The distances to the shape's colour and to the background's."""
    return distance(frame, scene.colour, SHADES, look), distance(frame, scene.ground, (0.45, 0.725, 1.0), look)


def object_of(frame: Tensor, scene: demo.Scene, look: demo.Look) -> Tensor:
    """Where a frame (3, H, W) in [0, 1] is nearer to the shape's colour than to the background's: bool (H, W)."""
    own, ground = distances(frame, scene, look)
    return own < ground


def standing_out(frame: Tensor) -> Tensor:
    """Where a frame (3, H, W) in [0, 1] has other colours than its margin's two, and mixtures of these: bool (H, W)."""
    pixels, edge = frame.permute(1, 2, 0), frame.shape[-1] // 20  # (H, W, 3)
    inside = torch.ones(frame.shape[1:], dtype=torch.bool)
    inside[:edge] = inside[-edge:] = inside[:, :edge] = inside[:, -edge:] = False
    one, other = two_colours(pixels[~inside])
    along = other - one
    share = ((pixels - one) @ along / along.square().sum().clamp(min=1e-6)).clamp(0, 1)  # (H, W)
    apart = (pixels - one - share[..., None] * along).norm(dim=-1)
    away = torch.zeros_like(inside)
    away[len(away) // 12 : -(len(away) // 12)] = True  # the upper and lower margins, where autoencoders are unsure
    return (apart > max(0.12, 0.4 * float(apart.max()))) & away


def two_colours(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The two colours (3,) about which pixels (N, 3) lie: medians of two clusters, at first the light and the dark."""
    light = pixels.sum(1)
    bright = light >= light.median()
    for _ in range(5):
        one, other = (pixels[part].median(0).values if part.any() else pixels.mean(0) for part in (bright, ~bright))
        bright = (pixels - one).square().sum(1) < (pixels - other).square().sum(1)
    return one, other


def motion_of(clip: Tensor, mask: Tensor) -> str:
    """The motion's name in a clip (F, 3, H, W) in [0, 1], or `no shape`."""
    return direction(clip, mask).name if float(mask.float().mean()) >= LEAST else "no shape"


def heading_of(mask: Tensor) -> str:
    """Where a dart points, by the axis along which its outline (H, W) is most one-sided: its tip is its long end."""
    rows, columns = torch.nonzero(mask, as_tuple=True)
    skews = []
    for place in (columns.double(), rows.double()):
        centred = place - place.mean()
        skews.append(float(centred.pow(3).mean() / centred.square().mean().clamp(min=1e-6).pow(1.5)))
    axis = int(abs(skews[1]) > abs(skews[0]))
    return (("left", "right"), ("up", "down"))[axis][skews[axis] > 0]


def right_headings(masks: list[Tensor], scenes: list[demo.Scene]) -> list[bool]:
    """Of each dart, whether its outline points where its caption says."""
    return [
        bool(mask.any()) and heading_of(mask) == scene.heading
        for mask, scene in zip(masks, scenes, strict=True) if scene.shape == "dart"
    ]  # fmt: skip


def look_share(clips: Tensor, scenes: list[demo.Scene], look: demo.Look) -> float:
    """The share of the first frames' pixels that are nearer to a look's colours than to those of another look.

    Scenes that both paint in the same two colours, the one for the other, tell nothing and are left out.
    """
    other: demo.Look = "swapped" if look == "vivid" else "vivid"
    shares = []
    for clip, scene in zip(clips, scenes, strict=True):
        paints = [{demo.PALETTES[one][scene.colour], demo.PALETTES[one][scene.ground]} for one in (look, other)]
        if paints[0] == paints[1]:
            continue
        own, theirs = (torch.stack(distances(unit(clip[0]), scene, one)).amin(0) for one in (look, other))
        shares.append(float((own < theirs).float().mean()))
    return sum(shares) / len(shares) if shares else math.nan


def agreement(
    clips: Tensor, scenes: list[demo.Scene], look: demo.Look = "vivid", by_ground: bool = False
) -> dict[str, Any]:
    """The share of clips (N, F, 3, H, W) in [-1, 1] that move as their scenes do, in all and by shape.

    The shape is what has the colour of its caption or, `by_ground`, what stands out from the frame's margin.
    """
    masks = [
        standing_out(unit(clip[0])) if by_ground else object_of(unit(clip[0]), scene, look)
        for clip, scene in zip(clips, scenes, strict=True)
    ]
    found = [motion_of(unit(clip), mask) for clip, mask in zip(clips, masks, strict=True)]
    agrees = [name == scene.motion for name, scene in zip(found, scenes, strict=True)]
    chance = sum(name == scene.motion for name in found for scene in scenes) / len(found) ** 2
    by_shape = {
        shape: f"{sum(one for one, scene in kind)} of {len(kind)}"
        for shape in ("dart", "disc", "box")
        if (kind := [pair for pair in zip(agrees, scenes, strict=True) if pair[1].shape == shape])
    }
    pairs = [(scene.motion, name) for scene, name in zip(scenes, found, strict=True)]
    darts = [agree for agree, scene in zip(agrees, scenes, strict=True) if scene.shape == "dart"]
    pointing = [agree for agree, points in zip(darts, right_headings(masks, scenes), strict=True) if points]
    return {
        "agree": sum(agrees), "of": len(agrees), "share": sum(agrees) / len(agrees), "chance": chance, **by_shape,
        "darts drawn as named": f"{len(pointing)} of {len(darts)}", "of these, agree": sum(pointing),
        "painted so": look_share(clips, scenes, look), "named, found": pairs,
    }  # fmt: skip


def read(clips: Path, count: int, frames: int) -> tuple[Tensor, list[demo.Scene]]:
    """The first held-out clips, and their scenes."""
    data = Data(str(clips), split="held_out", frames=frames, height=64, width=64, window="centre")
    dataset = ClipDataset(data, shuffle=False)
    rows = [dataset.rows[number].clip.extra for number in range(min(count, len(dataset)))]
    scenes = [demo.Scene.of(row) for row in rows]
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
        show(arguments.output, f"guidance-{guidance:g}", clips, scenes)
    for name, one in measured.items():
        print(name, {key: value for key, value in one.items() if key != "named, found"})
    settings = {"steps": arguments.steps, "prompts": len(scenes), "look": arguments.look}
    result: dict[str, Any] = {"settings": settings, "direction": measured}
    if arguments.run:
        result["curve"] = curve(arguments.run, arguments.output / "text_to_video.png")
    write(arguments.output / "text_to_video.json", record(command("MODEL", "CLIPS", "OUT"), result))


if __name__ == "__main__":
    main()
