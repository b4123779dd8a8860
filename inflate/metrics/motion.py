"""Direction of an object's motion, by masked template matching.

The pixels of the first frame under the object's mask are a template. A candidate motion (a shift and a growth per
frame, about the object's centre) says where each of them must lie in every later frame; its cost is the colour
difference found there, summed over the later frames. Because the inside of a plain shape fits inside the grown shape
too, a ring around the object takes part: finding the object's colour there costs as well. The search is a coarse grid
on a few frames and pixels, then finer ones on more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inflate.data.demo import Scene, render
from inflate.errors import DataError

Name = Literal["left", "right", "up", "down", "in", "out", "still"]


@dataclass(frozen=True)
class Motion:
    """An object's motion per frame."""

    name: Name
    dx: float
    """shift to the right per frame, in widths of the frame"""
    dy: float
    """shift downwards per frame, in heights of the frame"""
    log_scale: float
    """growth of the object's log-size per frame"""


@dataclass(frozen=True)
class Search:
    """Where to look for a motion, and what counts as none."""

    shift: float = 0.04
    """largest shift per frame, in frame sides"""
    log_scale: float = 0.05
    """largest growth of the log-size per frame"""
    still: float = 0.012
    """an outline that moves less than this over the whole clip, in frame sides, is still"""
    points: int = 256
    """template pixels compared, at most"""
    frames: int = 8
    """later frames compared, at most, evenly spread"""


def direction(frames: Tensor, mask: Tensor, search: Search | None = None) -> Motion:
    """Name the motion of the object under `mask` (H, W) bool in the first of `frames` (F, 3, H, W) in [0, 1].

    Right, left, down and up are shifts in the frame; in and out are growth and shrinkage (a camera zoom). Whichever
    moves the object's outline further names the motion. Raises DataError for fewer than two frames or an empty mask.
    """
    search = search or Search()
    if frames.ndim != 4 or len(frames) < 2 or mask.shape != frames.shape[-2:] or not bool(mask.any()):
        raise DataError(
            "direction needs frames (F >= 2, 3, H, W) and a mask (H, W) that is not empty, "
            f"got {tuple(frames.shape)} and {tuple(mask.shape)} with {int(mask.sum())} pixels set"
        )
    frames, mask = frames.float(), mask.to(frames.device, torch.bool)
    coarse = _Matcher(frames, mask, replace(search, points=search.points // 4, frames=search.frames // 2))
    best = coarse.best(_grid(search, len(frames) - 1, frames.device))
    matcher = _Matcher(frames, mask, search)
    span = torch.tensor([0.02, 0.02, 0.1], device=frames.device) / (len(frames) - 1)
    for _ in range(3):
        best = matcher.best(best + _around(frames.device) * span)
        span = span / 2.5
    dx, dy, log_scale = best[0].tolist()
    return Motion(_name(dx, dy, log_scale, matcher.radius, search.still / (len(frames) - 1)), dx, dy, log_scale)


def object_mask(scene: Scene, size: int, time: float = 0.0) -> Tensor:
    """Where the scene's shape lies at `time` (seconds): bool (size, size), by comparing it rendered in two colours."""
    red, cyan = (render(replace(scene, colour=colour), [time], size)[0].astype(np.int16) for colour in ("red", "cyan"))
    return torch.from_numpy(np.abs(red - cyan).max(-1) > 64)  # (size, size)


class _Matcher:
    """The template, the frames to find it in, and the cost of candidates (K, 3) of (dx, dy, log-scale) per frame."""

    def __init__(self, frames: Tensor, mask: Tensor, search: Search) -> None:
        height, width = mask.shape
        steps = torch.linspace(1, len(frames) - 1, min(search.frames, len(frames) - 1)).round().long()
        self.steps = steps.to(frames.device, torch.float32)  # (T,)
        self.later = frames[steps.to(frames.device)]  # (T, 3, H, W)
        inside, ring = _pixels(mask, search.points), _pixels(_ring(mask), search.points // 2)
        pixels = torch.cat([inside, ring])  # (N, 2) row, column
        self.colours = frames[0][:, pixels[:, 0], pixels[:, 1]]  # (3, N)
        self.inside = len(inside)
        self.mean = self.colours[:, : self.inside].mean(1)[None, :, None, None]  # (1, 3, 1, 1)
        sides = torch.tensor([width, height], device=frames.device)
        self.points = (pixels.flip(1).float() + 0.5) / sides  # (N, 2) x, y in frame sides
        self.centre = self.points[: self.inside].mean(0)  # (2,)
        self.radius = math.sqrt(float(mask.sum()) / (math.pi * height * width))  # of a disc of the same area

    def best(self, candidates: Tensor) -> Tensor:
        """The candidate of least cost: (1, 3)."""
        cost = torch.cat([self._cost(chunk) for chunk in candidates.split(128)])  # (K,)
        return candidates[cost.argmin()][None]

    def _cost(self, candidates: Tensor) -> Tensor:
        shift = candidates[None, :, None, :2] * self.steps[:, None, None, None]  # (T, K, 1, 2)
        scale = torch.exp(candidates[None, :, None, 2:] * self.steps[:, None, None, None])  # (T, K, 1, 1)
        places = self.centre + scale * (self.points - self.centre) + shift  # (T, K, N, 2)
        found = F.grid_sample(self.later, places * 2 - 1, padding_mode="border", align_corners=False)  # (T, 3, K, N)
        here, spill = found[..., : self.inside], found[..., self.inside :]
        missed = (here - self.colours[None, :, None, : self.inside]).abs().sum(1).clamp(max=0.75)  # (T, K, n)
        # a ring pixel that looks like the object, while its own first colour did not, lies on the grown object
        contrast = (self.colours[:, self.inside :] - self.mean[0, :, 0]).abs().sum(0).clamp(max=0.75)  # (m,)
        likeness = (contrast - (spill - self.mean).abs().sum(1)).clamp(min=0)  # (T, K, m)
        return missed.mean((0, 2)) + 0.5 * likeness.mean((0, 2))  # (K,)


def _grid(search: Search, steps: int, device: torch.device) -> Tensor:
    """Coarse candidates, still included: about 0.04 frame sides and 20 % of size apart at the last frame."""
    reach = max(1, math.ceil(search.shift * steps / 0.04))
    growth = max(1, math.ceil(search.log_scale * steps / 0.2))
    shifts = torch.arange(-reach, reach + 1, device=device) * (search.shift / reach)
    scales = torch.arange(-growth, growth + 1, device=device) * (search.log_scale / growth)
    grid = torch.cartesian_prod(shifts, shifts, scales)  # (K, 3)
    far = (grid[:, :2] * steps).abs().amax(1)
    return grid[far <= 0.6]


def _around(device: torch.device) -> Tensor:
    """The 125 offsets of a 5x5x5 cube of half-side 1."""
    line = torch.linspace(-1, 1, 5, device=device)
    return torch.cartesian_prod(line, line, line)  # (125, 3)


def _name(dx: float, dy: float, log_scale: float, radius: float, still: float) -> Name:
    growth = abs(log_scale) * radius  # how far the outline moves
    if max(abs(dx), abs(dy), growth) < still:
        return "still"
    if growth > max(abs(dx), abs(dy)):
        return "in" if log_scale > 0 else "out"
    if abs(dx) >= abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def _ring(mask: Tensor) -> Tensor:
    """Pixels outside the mask within about 4 % of the frame of it, leaving out the outermost, half-covered ones."""
    inner, outer = 1, max(2, round(0.04 * min(mask.shape)))
    near, nearer = (_grow(mask, n) for n in (outer + 1, inner))
    return near & ~nearer


def _grow(mask: Tensor, pixels: int) -> Tensor:
    return F.max_pool2d(mask.float()[None, None], 2 * pixels + 1, stride=1, padding=pixels)[0, 0] > 0


def _pixels(mask: Tensor, most: int) -> Tensor:
    """Row and column of at most `most` pixels of the mask, evenly spread in reading order: (N, 2)."""
    found = mask.nonzero()  # (n, 2)
    if len(found) <= most:
        return found
    return found[torch.linspace(0, len(found) - 1, most, device=mask.device).round().long()]
