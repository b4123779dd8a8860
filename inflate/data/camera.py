"""Clips by rule: a camera that moves exactly over a still, as crops that move over it.

A still is any picture, a frame of a clip, or a wide view of the demo world. On screen it moves by a similarity that is
constant over the clip: a point q of the first frame, in sides from the frame's centre, lies after t seconds at

    exp(zoom t) R(turn t) q + (right, down) t

A camera that pans to the left moves what it sees to the right. Each pixel is the mean of the still over the pixel's
square, from points not further apart than the still's own pixels, so that motion is exact far below one pixel. The
whole path lies inside the still, with a margin for the interpolation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from inflate.data import demo, video
from inflate.data.demo_clips import QUALITY
from inflate.data.settings import Data
from inflate.data.sources import Clip, find_clips
from inflate.errors import DataError
from inflate.files import new_folder
from inflate.metrics.flow import Motion

if TYPE_CHECKING:  # torch takes seconds to import
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]
Move = Literal[
    "pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "roll_clockwise", "roll_anticlockwise"
]
MOVES: tuple[Move, ...] = get_args(Move)
VERBS = {"pan": "pans", "tilt": "tilts", "zoom": "zooms", "roll": "rolls"}
ANGULAR = 1.2
"""Growth of the log-size, and radians, per second, of a movement whose speed is one side per second."""
MARGIN = 3.0
"""Pixels of the first frame that a path stays away from the still's border: two for the interpolation, and one."""
DETAIL = 2
"""Pixels of a still of the demo world along one of the first frame."""


@dataclass(frozen=True)
class Shot:
    """What is filmed of a still, and how."""

    move: Move
    frames: int = 16
    height: int = 64
    width: int = 64
    fps: float = demo.FPS
    slowest: float = 0.12
    """sides (the shorter one) per second; a zoom or a roll changes log-size or angle by 1.2 times this per second"""
    fastest: float = 0.24

    def __post_init__(self) -> None:
        if self.frames < 2 or min(self.height, self.width) < 16 or not self.fps > 0:
            raise DataError(f"camera clips need 2 frames, 16 pixels a side and a positive rate or more, not {self}")
        if not 0 < self.slowest <= self.fastest:
            raise DataError(f"camera speeds must be positive and rise, not {self.slowest} to {self.fastest}")

    @property
    def times(self) -> Array:
        """Seconds of each frame."""
        return np.arange(self.frames) / self.fps

    @property
    def corners(self) -> Array:
        """Of a frame (4, 2), in sides from its centre."""
        half = np.array([self.width, self.height]) / (2 * min(self.height, self.width))
        return half * [(-1, -1), (1, -1), (-1, 1), (1, 1)]


@dataclass(frozen=True)
class View:
    """Where the first frame lies in a still: its centre and its shorter side, in the still's pixels."""

    x: float
    y: float
    side: float


@dataclass(frozen=True)
class Still:
    """What a camera moves over."""

    picture: Pixels
    """(H, W, 3)"""
    caption: str
    name: str
    view: View | None = None
    """where to begin; None: anywhere, as large as the path allows"""


Take = Callable[[np.random.Generator], Still]
"""Takes a still of a source: of a clip any of its frames."""


def motion_of(move: Move, speed: float) -> Motion:
    """What a movement of the camera does on screen to the whole of a square frame, per second."""
    kind, way = move.split("_")
    sign = 1.0 if way in ("left", "up", "in", "anticlockwise") else -1.0
    shift, rate = sign * speed, sign * speed * ANGULAR
    radius = 6**-0.5
    return Motion(
        right=shift if kind == "pan" else 0.0,
        down=shift if kind == "tilt" else 0.0,
        zoom=rate if kind == "zoom" else 0.0,
        turn=rate if kind == "roll" else 0.0,
        radius=radius,
    )


def words(move: Move) -> str:
    """A movement in words, for captions."""
    kind, way = move.split("_")
    return f"the camera {VERBS[kind]} {way}"


# --- filming ----------------------------------------------------------------------------------------------------------


def places(motion: Motion, times: Array, points: Array) -> Array:
    """Where in the first frame that lies which is seen at points (N, 2) of later frames: (F, N, 2), in its sides."""
    cos, sin = np.cos(motion.turn * times), np.sin(motion.turn * times)
    back = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)  # (F, 2, 2)
    shift = np.array([motion.right, motion.down]) * times[:, None, None]  # (F, 1, 2)
    return np.asarray(np.exp(-motion.zoom * times)[:, None, None] * (points - shift) @ back.mT)


def begin(still: Still, shot: Shot, motion: Motion, rng: np.random.Generator) -> View:
    """The largest first frame whose whole path lies in a still, anywhere in it; DataError for a still too small."""
    size, side = still.picture.shape[1::-1], min(shot.height, shot.width)
    path = places(motion, shot.times, shot.corners).reshape(-1, 2)
    low, high = path.min(0) - MARGIN / side, path.max(0) + MARGIN / side
    length = float((size / (high - low)).min())
    finest = length / side * _nearest(motion, shot)
    if finest < 1:
        needed = np.ceil((high - low) * side / _nearest(motion, shot)).astype(int)
        raise DataError(
            f"{still.name} is {size[0]}x{size[1]}, too small for {shot.width}x{shot.height} clips of {shot.move}: it "
            f"needs {needed[0]}x{needed[1]} pixels; make the clips smaller, shorter or slower, or leave it out"
        )
    corner = (size - length * (high - low)) * rng.uniform(size=2)
    x, y = corner - length * low
    return View(float(x), float(y), length)


def film(still: Still, view: View, shot: Shot, motion: Motion) -> Pixels:
    """The frames (F, height, width, 3) of a camera that starts at `view` and moves so that `motion` is seen."""
    import torch

    from inflate.data.pixels import to_uint8

    step = view.side / min(shot.height, shot.width)
    whole = max(1, int(step * _nearest(motion, shot)))  # the still's pixels in one of the nearest frame
    picture = _reduced(still.picture, whole)
    steps = step * np.exp(-motion.zoom * shot.times) / whole
    frames = []
    for time, each in zip(shot.times, steps, strict=True):
        fine = int(np.ceil(each - 1e-9))
        grid = _grid(shot, fine)  # (N, 2)
        at = places(motion, time[None], grid)[0] * view.side + [view.x, view.y]
        at = 2 * at / (np.array(picture.shape[:1:-1]) * whole) - 1
        shaped = torch.from_numpy(at).float().reshape(1, shot.height * fine, shot.width * fine, 2)
        frames.append(_seen(picture, shaped, fine))
    return to_uint8(torch.cat(frames).clamp(0, 1))


def _nearest(motion: Motion, shot: Shot) -> float:
    """The side of the smallest view on the path, in those of the first."""
    return float(np.exp(-motion.zoom * shot.times).min())


def _reduced(picture: Pixels, factor: int) -> Tensor:
    """A picture averaged over whole blocks: (1, 3, h, w) in [0, 1]."""
    import torch
    import torch.nn.functional as F

    kept = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255  # (1, 3, H, W)
    return F.avg_pool2d(kept, factor)


def _grid(shot: Shot, fine: int) -> Array:
    """Points (N, 2) of a frame, in sides from its centre: the centres of fine x fine parts of each pixel."""
    side = min(shot.height, shot.width)
    y, x = ((np.arange(n * fine) + 0.5) / fine - n / 2 for n in (shot.height, shot.width))
    return np.stack(np.meshgrid(x, y), -1).reshape(-1, 2) / side


def _seen(picture: Tensor, at: Tensor, fine: int) -> Tensor:
    """A picture at places (1, h, w, 2) in [-1, 1], averaged over fine x fine of them: (1, 3, h / fine, w / fine)."""
    import torch.nn.functional as F

    return F.avg_pool2d(F.grid_sample(picture, at, mode="bicubic", align_corners=False), fine)


# --- what is filmed ---------------------------------------------------------------------------------------------------


def from_files(path: Path | str) -> list[Take]:
    """The stills and clips of a folder or metadata table; DataError as `find_clips`."""
    return [partial(_frame, clip) for clip in find_clips(Data(str(path), captions="optional"))]


def _frame(clip: Clip, rng: np.random.Generator) -> Still:
    if video.is_image(clip.media):
        return Still(video.read_image(str(clip.media)), clip.caption, clip.name)
    probe = video.probe(clip.media)
    number = int(rng.integers(probe.frames))
    return Still(video.read(clip.media, [number], probe)[0], clip.caption, clip.name)


def from_demo(count: int, shot: Shot, seed: int = 0) -> list[Take]:
    """So many wide views of the demo world, of which each first frame is a scene as the demo clips begin."""
    textured = (scene for scene in _scenes(seed) if scene.texture != "plain")  # a plain ground does not show motion
    return [partial(_view, scene, number, shot) for number, scene in zip(range(count), textured, strict=False)]


def _scenes(seed: int) -> Iterator[demo.Scene]:
    rng = np.random.default_rng([seed, 2])
    while True:
        yield demo.draw_scene(rng)


def _view(scene: demo.Scene, number: int, shot: Shot, rng: np.random.Generator) -> Still:
    """A scene with as much around it as the fastest camera sees."""
    pixels = DETAIL * min(shot.height, shot.width)  # of a side
    path = places(motion_of(shot.move, shot.fastest), shot.times, shot.corners)
    size = 2 * int(np.ceil(np.abs(path).max() * pixels + DETAIL * MARGIN))
    picture = demo.render(_widened(scene, size / pixels), [0.0], size)[0]
    return Still(picture, scene.view, f"demo scene {number}", View(size / 2, size / 2, pixels))


def _widened(scene: demo.Scene, worlds: float) -> demo.Scene:
    """A scene that shows, in its frame, what so many frames' sides about the centre of the given one's would show."""
    period = scene.period / worlds
    away = 0.5 / scene.period - 0.5 / period
    return replace(
        scene, radius=scene.radius / worlds, period=period, phase_x=scene.phase_x + away, phase_y=scene.phase_y + away,
        x=0.5 + (scene.x - 0.5) / worlds, y=0.5 + (scene.y - 0.5) / worlds,
    )  # fmt: skip


# --- the dataset ------------------------------------------------------------------------------------------------------


def build(folder: Path | str, takes: Sequence[Take], shot: Shot, clips: int, held_out: int = 0, seed: int = 0) -> Path:
    """Film `clips` training and `held_out` held-out clips into FOLDER/train and FOLDER/held_out.

    Sources are taken in turn, in an order drawn from the seed; none is in both. Each split has its mp4 files and a
    metadata.jsonl: file name, caption, the camera's movement, and the exact motion on screen per second. DataError, and
    no folder, where it exists already, a still is too small, or there are too few sources.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; choose another name")
    if clips < 1 or held_out < 0 or seed < 0:
        raise DataError(f"camera clips cannot be built: clips={clips}, held_out={held_out}, seed={seed}")
    train, kept = _split(takes, clips, held_out, seed)
    try:
        with new_folder(folder) as draft:
            _build_split(draft / "train", train, shot, clips, [seed, 0])
            if held_out:
                _build_split(draft / "held_out", kept, shot, held_out, [seed, 1])
    except OSError as error:
        raise DataError(f"{folder}: the camera clips cannot be written ({error.strerror or error})") from error
    return folder


def _split(takes: Sequence[Take], clips: int, held_out: int, seed: int) -> tuple[list[Take], list[Take]]:
    """The sources of training and of held-out clips, in their shares."""
    order = [takes[n] for n in np.random.default_rng([seed, 3]).permutation(len(takes))]
    if not held_out:
        return order, []
    if len(order) < 2:
        raise DataError("held-out clips need a source of their own: name two pictures or more")
    kept = min(len(order) - 1, max(1, round(len(order) * held_out / (clips + held_out))))
    return order[kept:], order[:kept]


def _build_split(folder: Path, takes: Sequence[Take], shot: Shot, count: int, seed: list[int]) -> None:
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        rng = np.random.default_rng([*seed, number])
        name = f"{number:04d}.mp4"
        frames, told = _shoot(takes[number % len(takes)](rng), shot, rng)
        video.write(folder / name, frames, shot.fps, quality=QUALITY)
        lines.append(json.dumps({"file_name": name} | told) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def _shoot(still: Still, shot: Shot, rng: np.random.Generator) -> tuple[Pixels, dict[str, Any]]:
    """Film a still at a speed drawn by `rng`: the frames, and what the metadata tell of them."""
    motion = motion_of(shot.move, float(rng.uniform(shot.slowest, shot.fastest)))
    view = still.view or begin(still, shot, motion, rng)
    caption = ", ".join(part for part in (still.caption, words(shot.move)) if part)
    exact = {name: value for name, value in asdict(motion).items() if name != "radius"}
    told = {"caption": caption, "camera": shot.move, "motion": motion.name} | exact
    return film(still, view, shot, motion), told | {"source": still.name, "view": asdict(view)}
