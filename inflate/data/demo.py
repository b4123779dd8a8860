"""The demo world: small rendered scenes whose motion is known exactly.

A scene is one textured shape over a textured background, seen by a camera. Its first frame determines its motion, as
in the real world a bird flies the way it faces, so an image-to-video model can be scored on it:

- a dart flies the way it points (left, right, up, down); over checks the camera follows it at part of its speed,
  so that the background drifts the other way;
- at a disc the camera zooms in, at a box it zooms out;
- only the speed (slow, medium, fast) is not in the first frame: the motion bucket carries it, and the caption names it.

A model that is told in words how a scene moves can be scored where the first frame does not say it: a disc or a box
that flies, whose caption alone names its heading.

Everything is rendered from continuous coordinates with anti-aliased edges, so motion is exact below one pixel.
Coordinates: x to the right, y downwards, both in units of the frame's side; time in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.90, 0.20),
    "green": (0.15, 0.60, 0.20),
    "cyan": (0.25, 0.80, 0.85),
    "blue": (0.15, 0.25, 0.80),
    "purple": (0.55, 0.20, 0.70),
    "grey": (0.50, 0.50, 0.50),
}
TEXTURES = ("plain", "stripes", "checks", "dots")
HEADINGS: dict[str, tuple[float, float]] = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}
SPEEDS: dict[str, float] = {"slow": 0.08, "medium": 0.14, "fast": 0.20}
"""Frame sides per second for a dart; a zoom changes log-scale by 1.2 times this per second."""
FOLLOW = 0.4
"""Share of a followed dart's velocity that the camera takes."""
FPS = 8
Look = Literal["vivid", "swapped", "opposite"]
"""How a scene is painted: in the colours that its caption names, with red for blue and blue for red, or each in the
colour opposite to it, which keeps to the same eight."""
OPPOSITE = dict(zip(COLOURS, [*COLOURS][4:] + [*COLOURS][:4], strict=True))
PALETTES: dict[Look, dict[str, tuple[float, float, float]]] = {
    "vivid": COLOURS,
    "swapped": {name: (blue, green, red) for name, (red, green, blue) in COLOURS.items()},
    "opposite": {name: COLOURS[other] for name, other in OPPOSITE.items()},
}


@dataclass(frozen=True)
class Scene:
    """One demo scene; `render` draws it at any time and size."""

    shape: str
    """dart, disc or box"""
    colour: str
    texture: str
    """background texture, one of `TEXTURES`"""
    ground: str
    """background colour"""
    heading: str
    """left, right, up, down; a disc or box that does not fly ignores it"""
    speed: str
    radius: float
    """of the shape, in frame sides"""
    x: float
    """shape centre at time 0"""
    y: float
    period: float
    """of the background texture, in frame sides"""
    phase_x: float
    phase_y: float
    told: bool = False
    """whether a disc or box flies as its caption alone tells, instead of being zoomed at"""

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The scene of a row of `metadata.jsonl`."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__ if name in row})

    @property
    def flies(self) -> bool:
        """Whether the shape moves, and not the camera's focal length."""
        return self.shape == "dart" or self.told

    @property
    def velocity(self) -> tuple[float, float]:
        """The shape's velocity in the world, frame sides per second."""
        if not self.flies:
            return 0.0, 0.0
        dx, dy = HEADINGS[self.heading]
        return dx * SPEEDS[self.speed], dy * SPEEDS[self.speed]

    @property
    def pan(self) -> tuple[float, float]:
        """The camera's velocity in the world, frame sides per second."""
        share = FOLLOW if self.texture == "checks" else 0.0
        return self.velocity[0] * share, self.velocity[1] * share

    @property
    def zoom(self) -> float:
        """Rate of change of the log of the magnification, per second."""
        return 0.0 if self.flies else {"disc": 1.2, "box": -1.2}[self.shape] * SPEEDS[self.speed]

    @property
    def motion(self) -> str:
        """The motion's name: left, right, up, down, in or out."""
        return self.heading if self.flies else {"disc": "in", "box": "out"}[self.shape]

    @property
    def view(self) -> str:
        """What a still of it shows, in words."""
        return f"{self._subject} over {self._ground}"

    @property
    def caption(self) -> str:
        if self.flies:
            follows = ", the camera follows" if self.texture == "checks" else ""
            return f"{self._subject} flying {self.heading} {self.speed} over {self._ground}{follows}"
        return f"{self.view}, the camera zooms {self.motion} {self.speed}"

    @property
    def _subject(self) -> str:
        return f"a {'large' if self.radius >= 0.245 else 'small'} {self.colour} {self.shape}"

    @property
    def _ground(self) -> str:
        return f"{self.ground} {self.texture}" if self.texture != "plain" else f"plain {self.ground}"

    def truth(self) -> dict[str, Any]:
        """Everything that determines the scene and its motion, for `metadata.jsonl`."""
        scene = {name: value for name, value in asdict(self).items() if value is not False}
        return scene | {"motion": self.motion, "velocity": self.velocity, "pan": self.pan, "zoom": self.zoom}


def draw_scene(rng: np.random.Generator, seconds: float = 2.0, told: bool = False) -> Scene:
    """A random scene whose shape stays inside the frame for `seconds`.

    `told` draws one whose caption alone says how it moves.
    """
    shape = str(rng.choice(["disc", "box"] if told else ["dart", "dart", "dart", "disc", "box"]))
    colour, ground = (str(c) for c in rng.choice(list(COLOURS), size=2, replace=False))
    texture = str(rng.choice(TEXTURES))
    heading = str(rng.choice(list(HEADINGS)))
    speed = str(rng.choice(list(SPEEDS)))
    radius = float(rng.uniform(0.20, 0.29))
    share = 1 - FOLLOW if texture == "checks" else 1.0
    flies = shape == "dart" or told
    travel = SPEEDS[speed] * share * seconds if flies else 0.0
    margin = radius + 0.02
    centre = rng.uniform(margin, 1 - margin, size=2) if flies else rng.uniform(0.35, 0.65, size=2)
    for axis, step in enumerate(HEADINGS[heading]):
        if flies and step:
            start = float(rng.uniform(margin, max(margin + 1e-3, 1 - margin - travel)))
            centre[axis] = start if step > 0 else 1 - start
    period = float(rng.uniform(0.36, 0.5))
    phases = rng.uniform(0, 1, size=2)
    return Scene(
        shape, colour, texture, ground, heading, speed, radius, float(centre[0]), float(centre[1]),
        period, float(phases[0]), float(phases[1]), told,
    )  # fmt: skip


def render(scene: Scene, times: npt.ArrayLike, size: int = 64, look: Look = "vivid") -> Pixels:
    """Draw the scene at `times` (seconds): uint8 (frames, size, size, 3)."""
    palette = PALETTES[look]
    t = np.asarray(times, dtype=np.float32)[:, None, None]
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    scale = np.exp(scene.zoom * t)  # magnification about the shape
    vx, vy = scene.velocity
    px, py = scene.pan
    focus_x, focus_y = (scene.x, scene.y) if scene.zoom else (0.5, 0.5)
    world_x = (grid[None, None, :] - focus_x) / scale + focus_x + px * t  # (F, 1, W)
    world_y = (grid[None, :, None] - focus_y) / scale + focus_y + py * t  # (F, H, 1)
    pixel = 1 / (size * scale)  # a pixel's side in the world

    image = _background(scene, palette[scene.ground], world_x, world_y, pixel)
    local_x, local_y = world_x - scene.x - vx * t, world_y - scene.y - vy * t
    alpha, tone = _shape(scene, local_x, local_y, pixel)
    paint = np.asarray(palette[scene.colour], dtype=np.float32) * tone[..., None]
    image = image + alpha[..., None] * (paint - image)
    return np.asarray(np.rint(np.clip(image, 0, 1) * 255), dtype=np.uint8)


def _background(scene: Scene, colour: tuple[float, float, float], x: Floats, y: Floats, pixel: Floats) -> Floats:
    light = np.asarray(colour, dtype=np.float32)
    dark = light * 0.45
    u, v = x / scene.period + scene.phase_x, y / scene.period + scene.phase_y
    edge = pixel / scene.period
    if scene.texture == "plain":
        mix = np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    elif scene.texture == "stripes":
        mix = _square_wave(u + v, edge)
    elif scene.texture == "checks":
        a, b = _square_wave(u, edge), _square_wave(v, edge)
        mix = a * (1 - b) + b * (1 - a)
    else:
        distance = np.hypot(u - np.floor(u) - 0.5, v - np.floor(v) - 0.5) - 0.28
        mix = np.clip(0.5 - distance / edge, 0, 1)
    mix = np.broadcast_to(mix, np.broadcast_shapes(x.shape, y.shape)).astype(np.float32)
    return np.asarray(light + mix[..., None] * (dark - light), dtype=np.float32)


def _square_wave(u: Floats, edge: Floats) -> Floats:
    """A 0/1 wave of period 1 whose edges are one pixel wide."""
    distance = 0.25 - np.abs(u - np.floor(u) - 0.5)
    return np.asarray(np.clip(0.5 + distance / edge, 0, 1), dtype=np.float32)


def _shape(scene: Scene, x: Floats, y: Floats, pixel: Floats) -> tuple[Floats, Floats]:
    """Coverage and tone of the shape at local coordinates (frame sides from its centre)."""
    x, y = x / scene.radius, y / scene.radius
    if scene.shape == "dart":
        dx, dy = HEADINGS[scene.heading]
        along, across = x * dx + y * dy, np.abs(-x * dy + y * dx)
        front = (0.95 * (along - 1) + 1.85 * across) / math.hypot(0.95, 1.85)
        back = -(0.95 * (along + 0.55) + 0.3 * across) / math.hypot(0.95, 0.3)
        distance = np.maximum(front, back)
        tone = 0.8 + 0.2 * np.tanh(4 * along)  # the tip is the bright end
    elif scene.shape == "disc":
        distance = np.hypot(x, y) - 0.9
        tone = 0.8 + 0.2 * np.tanh(8 * (np.hypot(x, y) - 0.45))
    else:
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.8
        tone = 0.8 + 0.2 * np.tanh(8 * (np.maximum(np.abs(x), np.abs(y)) - 0.4))
    alpha = np.clip(0.5 - distance * scene.radius / pixel, 0, 1)
    return np.asarray(alpha, np.float32), np.asarray(np.broadcast_to(tone, alpha.shape), np.float32)
