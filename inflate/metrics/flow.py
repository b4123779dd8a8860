"""What a clip's motion is made of: the scene's and one object's, each a shift, a zoom and a turn.

A dense flow is explained by two similarity motions that are constant over the clip. A place weighs by its texture,
along the directions in which it has any: flat places and the length of an edge say nothing that they do not know. The
first motion is fitted robustly (Geman-McClure, from several starts) to all places; the second to places where the
frames still differ once they are moved by the first, and it counts if it explains that difference. Of the two, what is
spread over the frame is the scene, moved by the camera: under a camera that pans to the left it moves to the right.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from inflate.data.motion import Floats, Pixels, difference, flow, reduced, texture, window_mean
from inflate.errors import DataError

Array = npt.NDArray[np.float64]
Name = Literal["left", "right", "up", "down", "in", "out", "clockwise", "anticlockwise", "still"]

SIDE = 64
"""Frames are reduced by whole numbers until their short side is just above this many pixels."""
PAIRS, PAIRS_PER_SECOND = 16, 8
"""Pairs of frames compared, at most, and how far apart they are: slow motion is invisible between the frames of a fast
camera."""
FLAT = 2e-3
"""Squared brightness gradient, per pixel of the reduced frames, below which a place has no texture."""
TOLERANCE = 0.15
"""Pixels of the reduced frames that a flow may be off and still be explained."""
RIDGE = np.diag([1e-4, 1e-4, 2e-3, 2e-3])
"""Keeps at 0 what the places do not tell, such as the zoom of a small patch."""
DIFFERENT = 0.02
"""Brightness by which frames must differ for a place to count as unexplained."""
LEAST, GAIN = 0.008, 0.33
"""Share of the places that must be unexplained for a second motion, and of their difference that it must explain."""
STEPS, BRIGHTNESS = 12, 0.05
"""Steps that sharpen an object's motion, and the difference of brightness that they still take for its own."""
SPREAD = 0.32
"""Distance from their centre, root mean square in sides, of the places of a scene; those of a whole frame have 0.41."""
STILL = 0.01
"""Sides per second below which a motion is called still."""


@dataclass(frozen=True)
class Motion:
    """A motion on screen, about the frame's centre where it is a scene's, else about its own; a side is the shorter."""

    right: float
    """sides per second"""
    down: float
    """sides per second"""
    zoom: float
    """growth of the log-size per second"""
    turn: float
    """radians per second, clockwise"""
    radius: float
    """root mean square distance from its centre of what moves so, in sides"""

    @property
    def speed(self) -> float:
        """Root mean square speed of what moves so, in sides per second."""
        return float(np.hypot(np.hypot(self.right, self.down), self.radius * np.hypot(self.zoom, self.turn)))

    @property
    def name(self) -> Name:
        """What moves its places most: the shift along one axis, the zoom or the turn."""
        moves: dict[tuple[Name, Name], float] = {
            ("right", "left"): self.right,
            ("down", "up"): self.down,
            ("in", "out"): self.zoom * self.radius,
            ("clockwise", "anticlockwise"): self.turn * self.radius,
        }
        (positive, negative), most = max(moves.items(), key=lambda item: abs(item[1]))
        if abs(most) < STILL:
            return "still"
        return positive if most > 0 else negative


@dataclass(frozen=True)
class Motions:
    """The scene's motion, None where it has no texture; and the object's, None where none moves otherwise."""

    scene: Motion | None
    object: Motion | None

    @property
    def name(self) -> Name:
        """The motion of the object or, where there is none, of the scene."""
        seen = self.object or self.scene
        return seen.name if seen else "still"


def motions(frames: Pixels, fps: float) -> Motions:
    """The motions in frames (F >= 2, H, W, 3) uint8 at `fps` frames per second; DataError for a single frame."""
    if len(frames) < 2:
        raise DataError("motion needs two frames or more")
    step = max(1, min(round(fps / PAIRS_PER_SECOND), len(frames) - 1))
    firsts = np.unique(np.linspace(0, len(frames) - 1 - step, PAIRS).round().astype(int))
    light = _light(frames[np.concatenate([firsts, firsts + step])])
    places = _Places(light[: len(firsts)], light[len(firsts) :], fps / step)
    if not len(places.at):
        return Motions(None, None)
    first, follows = places.fit(np.ones(len(places.at)))
    found = [one for one in (places.motion(first, follows), places.second(first, follows)) if one]
    scenes, objects = ([one for one in found if (one.radius >= SPREAD) is spread] for spread in (True, False))
    return Motions(scenes[0] if scenes else None, objects[0] if objects else None)


def _light(frames: Pixels) -> Floats:
    """Frames (N, H, W, 3) reduced to (N, h, w): along the colour that varies most, since two may be equally bright."""
    channels = np.stack([reduced(frames[..., n : n + 1], SIDE) for n in range(3)], -1)  # (N, h, w, 3)
    colours = channels.reshape(-1, 3)
    _, axes = np.linalg.eigh(np.cov(colours, rowvar=False))
    return np.asarray(channels @ axes[:, -1].astype(np.float32), np.float32)


class _Places:
    """The textured places of pairs of frames (N, h, w) that stay inside the frame, and how they flow."""

    def __init__(self, before: Floats, after: Floats, rate: float) -> None:
        """rate: pairs that would follow each other in a second."""
        self.before, self.after, self.pixel = before, after, rate / min(before.shape[1:])
        rows, columns = ((np.arange(n) - (n - 1) / 2) / min(before.shape[1:]) for n in before.shape[1:])
        grid = np.stack(np.broadcast_arrays(columns, rows[:, None]), -1)  # (h, w, 2) x, y from the centre, in sides
        self.everywhere = np.broadcast_to(grid, (*before.shape, 2)).reshape(-1, 2)  # (P, 2)
        moved = self.pixel * np.stack(flow(before, after), -1).reshape(-1, 2).astype(np.float64)  # sides per second
        landed = self.everywhere + moved / rate
        known, strength = _known(before)
        self.kept = (strength > FLAT) & (np.abs(landed) <= np.abs(grid).max((0, 1))).all(1)
        self.at, known = self.everywhere[self.kept], known[self.kept]
        self.weight = np.square(known).sum((1, 2))  # (P,)
        self.design = known @ _design(self.at)  # (P, 2, 4)
        self.target = (known @ moved[self.kept][:, :, None])[..., 0]  # (P, 2)

    def fit(self, prior: Array) -> tuple[Array, Array]:
        """The motion (right, down, zoom, turn; about the frame's centre) of most of what `prior` (P,) weighs.

        Returns it with the weights of the places that follow it.
        """
        sample = slice(None, None, max(1, len(self.at) // 4000))
        tried = [self._refined(start, prior, sample, 6) for start in self._starts(prior, sample)]
        motion = min(tried, key=lambda one: self._cost(one, prior, sample))
        motion = self._refined(motion, prior, slice(None), 4)
        agreed = self._agreement(motion, slice(None))
        return motion, prior * agreed * (agreed > 0.25)

    def second(self, first: Array, follows: Array) -> Motion | None:
        """The motion of what the first leaves unexplained, if that explains it."""
        error = self._error(first)
        surplus = (error - 3 * np.median(error)).clip(0)
        unexplained = surplus / (surplus + DIFFERENT**2) * (follows == 0)
        if unexplained.sum() <= LEAST * len(self.at):
            return None
        rough, moved = self.fit(unexplained)
        motion = min((rough, self._sharpened(rough, moved)), key=lambda one: self._left(one, error, unexplained))
        if self._left(motion, error, unexplained) > 1 - GAIN:
            return None
        gained = (error - self._error(motion)) * unexplained
        return self.motion(motion, gained * (gained > 0.75 * error * unexplained))

    def _left(self, motion: Array, error: Array, unexplained: Array) -> float:
        """Share of the unexplained difference that a motion of some of the places leaves."""
        return float((unexplained * np.minimum(error, self._error(motion))).sum() / (unexplained * error).sum())

    def motion(self, motion: Array, follows: Array) -> Motion | None:
        """The same about the centre of the places that follow it, or the frame's where they are a scene."""
        weight = self.weight * follows
        if not weight.any():
            return None
        centre = np.average(self.at, axis=0, weights=weight)  # (2,)
        radius = np.sqrt(np.average(np.square(self.at - centre).sum(1), weights=weight))
        right, down = _design(centre[None])[0] @ motion if radius < SPREAD else motion[:2]
        return Motion(float(right), float(down), float(motion[2]), float(motion[3]), float(radius))

    def _starts(self, prior: Array, sample: slice) -> list[Array]:
        """No motion, the least squares of all, and those of each ninth of the frame."""
        every = prior[sample]
        ninth = np.minimum(np.floor((self.at[sample] / self._reach + 1) * 1.5), 2) @ [1, 3]
        masks = [every, *(every * (ninth == n) for n in range(9))]
        return [np.zeros(4), *(self._solved(mask, sample) for mask in masks if mask.sum() > 20)]

    @cached_property
    def _whole_design(self) -> Array:
        return _design(self.everywhere)  # (P, 2, 4)

    @cached_property
    def _reach(self) -> Array:
        return np.abs(self.everywhere).max(0)  # (2,)

    def _refined(self, motion: Array, prior: Array, sample: slice, rounds: int) -> Array:
        for _ in range(rounds):
            motion = self._solved(prior[sample] * np.square(self._agreement(motion, sample)), sample)
        return motion

    def _solved(self, weight: Array, sample: slice) -> Array:
        design, target = self.design[sample], self.target[sample]
        weighted = design * weight[:, None, None]
        matrix = np.tensordot(weighted, design, ([0, 1], [0, 1])) + (weight.sum() + 1e-9) * RIDGE
        return np.linalg.solve(matrix, np.tensordot(weighted, target, ([0, 1], [0, 1])))

    def _agreement(self, motion: Array, sample: slice) -> Array:
        """How well places follow a motion (P,): 1 for exactly, a half where they are off by the tolerance."""
        error = np.square(self.design[sample] @ motion - self.target[sample]).sum(1)
        return np.asarray(1 / (1 + error / (TOLERANCE * self.pixel) ** 2))

    def _sharpened(self, motion: Array, prior: Array) -> Array:
        """Gauss-Newton steps on the brightness of the places that `prior` (P,) weighs.

        The flow of a small thing is off, since each of its windows has some of the ground in it.
        """
        gradient = np.stack([np.gradient(self.before, axis=axis) for axis in (2, 1)], -1).reshape(-1, 1, 2)[self.kept]
        slope = (gradient @ _design(self.at))[:, 0] / self.pixel  # (P, 4)
        for _ in range(STEPS):
            left = self._difference(motion).reshape(-1)[self.kept]
            weighted = slope * (prior / np.square(1 + np.square(left / BRIGHTNESS)))[:, None]
            matrix = weighted.T @ slope
            motion = motion + np.linalg.solve(
                matrix + RIDGE * matrix.diagonal().max() + 1e-12 * np.eye(4), weighted.T @ left
            )
        return motion

    def _cost(self, motion: Array, prior: Array, sample: slice) -> float:
        return float((prior[sample] * self.weight[sample] * (1 - self._agreement(motion, sample))).sum())

    def _error(self, motion: Array) -> Array:
        """Squared difference of brightness about each place (P,) once it is moved."""
        return window_mean(np.square(self._difference(motion))).reshape(-1)[self.kept].astype(np.float64)

    def _difference(self, motion: Array) -> Floats:
        """Difference of brightness (N, h, w) once all is moved."""
        moved = (self._whole_design @ motion).reshape(*self.before.shape, 2) / self.pixel
        return difference(self.before, self.after, *(moved[..., n].astype(np.float32) for n in (0, 1)))


def _known(images: Floats) -> tuple[Array, Array]:
    """R (P, 2, 2): |R error|^2 is a flow's squared error along the directions of texture; and its strength (P,)."""
    xx, yy, xy = (part.reshape(-1).astype(np.float64) for part in texture(images))
    tensor = np.stack([xx, xy, xy, yy], -1).reshape(-1, 2, 2) / (xx + yy + FLAT)[:, None, None]
    values, vectors = np.linalg.eigh(tensor)
    return np.sqrt(values.clip(0))[:, :, None] * vectors.transpose(0, 2, 1), xx + yy


def _design(at: Array) -> Array:
    """(P, 2, 4): the flow at places (P, 2) is this times (right, down, zoom, turn)."""
    (x, y), one, zero = at.T, np.ones(len(at)), np.zeros(len(at))
    return np.stack([np.stack([one, zero, x, -y], -1), np.stack([zero, one, y, x], -1)], 1)
