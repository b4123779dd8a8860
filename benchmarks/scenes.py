"""What clips of the demo world show and how they move, as judges of samples see it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inflate.data import demo, video
from inflate.data.clips import ClipDataset
from inflate.data.pixels import to_uint8, unit
from inflate.data.settings import Data
from inflate.metrics.motion import direction, object_mask

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


def masks_of(
    clips: Tensor, scenes: list[demo.Scene], look: demo.Look = "vivid", by_ground: bool = False
) -> list[Tensor]:
    """Where the shapes are (H, W) in the first frames of clips (N, F, 3, H, W) in [-1, 1], as `agreement` sees them."""
    return [
        standing_out(unit(clip[0])) if by_ground else object_of(unit(clip[0]), scene, look)
        for clip, scene in zip(clips, scenes, strict=True)
    ]


def motions_of(clips: Tensor, masks: list[Tensor]) -> list[str]:
    """The motions of the shapes at masks (H, W) of the first frames of clips (N, F, 3, H, W) in [-1, 1]."""
    return [motion_of(unit(clip), mask) for clip, mask in zip(clips, masks, strict=True)]


def agreement(
    clips: Tensor, scenes: list[demo.Scene], look: demo.Look = "vivid", by_ground: bool = False
) -> dict[str, Any]:
    """The share of clips (N, F, 3, H, W) in [-1, 1] that move as their scenes do, in all and by shape.

    The shape is what has the colour of its caption or, `by_ground`, what stands out from the frame's margin.
    """
    masks = masks_of(clips, scenes, look, by_ground)
    found = motions_of(clips, masks)
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


def read(
    clips: Path, count: int | None, frames: int, stride: int = 1, size: tuple[int, int] = (64, 64)
) -> tuple[Tensor, list[demo.Scene]]:
    """So many held-out clips (N, F, 3, H, W) in [-1, 1], or all, of a height and width, and their scenes."""
    height, width = size
    data = Data(str(clips), split="held_out", frames=frames, height=height, width=width, window="centre", stride=stride)
    dataset = ClipDataset(data, shuffle=False)
    numbers = range(len(dataset))[:count]
    scenes = [demo.Scene.of(dataset.rows[number].clip.extra) for number in numbers]
    return torch.stack([dataset[number]["pixels"] for number in numbers]), scenes


OUTLINES = [("dart", heading) for heading in demo.HEADINGS] + [("disc", ""), ("box", "")]
"""What the demo world's shapes look like, a dart by the way it points."""
SIDE = 24
"""Points a side that outlines are compared at."""


def seen(frame: Tensor) -> tuple[str, str, str, str]:
    """What a frame (3, H, W) in [0, 1] shows, whatever it should: the shape's colour, the ground's, the shape, its way.

    The way is where a dart points, nothing of a disc or a box; a frame from which nothing stands out shows `no shape`.
    """
    mask = standing_out(frame)
    ground = nearest(frame, ~mask, (0.45, 0.725, 1.0))
    if float(mask.float().mean()) < LEAST:
        return "", ground, "no shape", ""
    return nearest(frame, mask, SHADES), ground, *outline_of(mask)


def nearest(frame: Tensor, mask: Tensor, shades: tuple[float, ...]) -> str:
    """The colour that the pixels of a frame (3, H, W) in [0, 1] under a mask (H, W) are nearest to, on average."""
    return min(demo.COLOURS, key=lambda name: float(distance(frame, name, shades, "vivid").sqrt()[mask].mean()))


def outline_of(mask: Tensor) -> tuple[str, str]:
    """The shape, and where a dart points, whose outline overlaps most with that of a mask (H, W)."""
    own = centred(mask)

    def overlap(name: tuple[str, str]) -> float:
        other = outlines()[name]
        return float((own & other).sum() / (own | other).sum())

    return max(OUTLINES, key=overlap)


@functools.cache
def outlines() -> dict[tuple[str, str], Tensor]:
    """The demo world's shapes, each (SIDE, SIDE)."""
    place = (0.25, 0.5, 0.5, 0.5, 0.0, 0.0)
    scenes = {
        (shape, way): demo.Scene(shape, "red", "plain", "grey", way or "up", "slow", *place) for shape, way in OUTLINES
    }
    return {name: centred(object_mask(scene, 96)) for name, scene in scenes.items()}


def centred(mask: Tensor) -> Tensor:
    """A mask (H, W) about its middle, magnified until a disc of its area has half the width: (SIDE, SIDE)."""
    height, width = mask.shape
    rows, columns = torch.nonzero(mask, as_tuple=True)
    radius = 2 * math.sqrt(len(rows) / math.pi)  # pixels
    places = torch.linspace(-1, 1, SIDE) * radius
    y, x = places + rows.float().mean() + 0.5, places + columns.float().mean() + 0.5
    grid = torch.stack(torch.broadcast_tensors(2 * x[None] / width - 1, 2 * y[:, None] / height - 1), dim=-1)
    return F.grid_sample(mask.float()[None, None], grid[None], align_corners=False)[0, 0] > 0.5


def likeness(clips: Tensor, scenes: list[demo.Scene]) -> dict[str, float]:
    """The shares of clips (N, F, 3, H, W) in [-1, 1] whose first frame shows what their scenes do, by `seen`."""
    found = [seen(unit(clip[0])) for clip in clips]
    ways = [scene.heading if scene.shape == "dart" else "" for scene in scenes]
    wanted = [(scene.colour, scene.ground, scene.shape, way) for scene, way in zip(scenes, ways, strict=True)]
    right = torch.tensor([[a == b for a, b in zip(*each, strict=True)] for each in zip(found, wanted, strict=True)])
    shape = right[:, 2] & right[:, 3]
    parts = {"colour": right[:, 0], "ground": right[:, 1], "shape and way": shape, "all three": right.all(1)}
    return {name: float(part.float().mean()) for name, part in parts.items()}


def sheets(folder: Path, name: str, clips: Sequence[Tensor] | Tensor, labels: Sequence[str], most: int = 16) -> None:
    """Contact sheets of clips (F, 3, H, W) in [-1, 1], at most so many on each."""
    rows = [to_uint8(unit(clip)) for clip in clips]
    for number, first in enumerate(range(0, len(rows), most)):
        part = slice(first, first + most)
        video.contact_sheet(folder / f"{name}-{number}.png", rows[part], labels[part])
