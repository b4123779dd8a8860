"""How much a clip moves: one number per clip, for SVD's motion bucket."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

SIDE = 32
"""Frames are reduced by whole numbers until their short side is just above this many pixels."""
LEVELS = 3
ITERATIONS = 3
NOISE = 1e-3
"""Squared brightness gradient below which a place counts as flat, and flow there shrinks to zero."""


def motion_score(frames: Pixels, fps: float) -> float:
    """Mean length of the optical flow, in shares of the frame's short side per second.

    frames: uint8 (F, H, W, 3); fps: frames per second. One frame scores 0. The mean runs over all places and pairs of
    frames, so a flat background counts as still (stable video diffusion takes the same mean, of Farneback's flow:
    arXiv 2311.15127, appendix C). It measures motion on screen, of camera and objects alike.
    """
    return motion_of(reduced(frames), fps)


def motion_of(grey: Floats, fps: float) -> float:
    """`motion_score` of frames that are `reduced` already: brightness (F, h, w)."""
    if len(grey) < 2:
        return 0.0
    x, y = flow(grey[:-1], grey[1:])
    length = float(np.hypot(x, y).mean(dtype=np.float64))  # pixels per frame
    return length * fps / int(min(grey.shape[1:]))


def flow(before: Floats, after: Floats) -> tuple[Floats, Floats]:
    """Dense optical flow by iterated Lucas-Kanade, coarse to fine (Bouguet 2001).

    before, after: brightness in [0, 1], (N, H, W). Returns x and y, pixels, (N, H, W): what is at p in `before` is at
    p + flow in `after`.
    """
    pyramid = [(before, after)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[1:]) >= 32:
        pyramid.append((_halved(pyramid[-1][0]), _halved(pyramid[-1][1])))
    x = y = np.zeros_like(pyramid[-1][0])
    for first, second in reversed(pyramid):
        if x.shape != first.shape:
            x, y = 2 * _doubled(x, first.shape), 2 * _doubled(y, first.shape)
        x, y = _refined(first, second, x, y)
    return x, y


def _refined(first: Floats, second: Floats, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Gauss-Newton steps on the brightness difference in a window about each pixel."""
    gradient_y, gradient_x = _gradient(first, 1), _gradient(first, 2)
    xx, yy, xy = texture(first)
    xx, yy = xx + NOISE, yy + NOISE
    determinant = xx * yy - np.square(xy)
    for _ in range(ITERATIONS):
        error = difference(first, second, x, y)
        along_x, along_y = window_mean(error * gradient_x), window_mean(error * gradient_y)
        x = np.asarray(x + (yy * along_x - xy * along_y) / determinant, np.float32)
        y = np.asarray(y + (xx * along_y - xy * along_x) / determinant, np.float32)
    return x, y


def texture(images: Floats) -> tuple[Floats, Floats, Floats]:
    """Squared brightness gradients xx, yy and xy (N, H, W), each the mean of a window: what flow can be known by."""
    gradient_y, gradient_x = _gradient(images, 1), _gradient(images, 2)
    return window_mean(np.square(gradient_x)), window_mean(np.square(gradient_y)), window_mean(gradient_x * gradient_y)


def reduced(frames: Pixels, short: int = SIDE) -> Floats:
    """Brightness in [0, 1] (F, h, w), averaged over whole blocks of pixels; the short side is just above `short`."""
    factor = max(1, min(frames.shape[1:3]) // short)
    height, width = (side // factor for side in frames.shape[1:3])
    result = np.empty((len(frames), height, width), np.float32)
    for number, frame in enumerate(frames):  # frame by frame: a float copy of a large clip would be four times its size
        grey = frame[: height * factor, : width * factor].mean(axis=2, dtype=np.float32) / 255
        result[number] = grey.reshape(height, factor, width, factor).mean(axis=(1, 3))
    return result


def _halved(images: Floats) -> Floats:
    images = images[:, : images.shape[1] // 2 * 2, : images.shape[2] // 2 * 2]
    quarter = images[:, ::2, ::2] + images[:, 1::2, ::2] + images[:, ::2, 1::2] + images[:, 1::2, 1::2]
    return np.asarray(quarter / 4, np.float32)


def _doubled(images: Floats, shape: tuple[int, ...]) -> Floats:
    rows = np.minimum(np.arange(shape[1]) // 2, images.shape[1] - 1)
    columns = np.minimum(np.arange(shape[2]) // 2, images.shape[2] - 1)
    return images[:, rows][:, :, columns]


def _gradient(images: Floats, axis: int) -> Floats:
    """Central differences, one-sided at the edges."""
    return np.asarray(np.gradient(images, axis=axis), np.float32)


def window_mean(images: Floats) -> Floats:
    """Mean over 5 x 5 pixels, edges repeated."""
    for axis in (1, 2):
        padding = [(2, 2) if axis == i else (0, 0) for i in range(3)]
        padded = np.pad(images, padding, mode="edge")
        size = images.shape[axis]
        parts = [padded.take(range(k, k + size), axis=axis) for k in range(5)]
        images = np.asarray(sum(parts[1:], parts[0]) / 5, np.float32)
    return images


def difference(first: Floats, second: Floats, x: Floats, y: Floats) -> Floats:
    """first(p) - second(p + (x, y)), bilinear; 0 where that lies outside the frame and so says nothing."""
    count, height, width = first.shape
    column = np.arange(width, dtype=np.float32) + x
    row = np.arange(height, dtype=np.float32)[:, None] + y
    inside = (column >= 0) & (column <= width - 1) & (row >= 0) & (row <= height - 1)
    column, row = np.where(inside, column, 0), np.where(inside, row, 0)
    left, top = np.minimum(column.astype(np.int64), width - 2), np.minimum(row.astype(np.int64), height - 2)
    part_x, part_y = column - left, row - top
    at = (np.arange(count)[:, None, None] * height + top) * width + left
    flat = second.ravel()
    upper = flat[at] + part_x * (flat[at + 1] - flat[at])
    lower = flat[at + width] + part_x * (flat[at + width + 1] - flat[at + width])
    return np.where(inside, first - upper - part_y * (lower - upper), 0).astype(np.float32)
