"""Attention over the frames of each pixel as one Triton kernel each way, for clips of at most 32 frames.

The sequences are shorter than the tiles of general kernels, so a program takes as many pixels of one head as fill its
rows: all their scores at once, of which those between pixels are left out. Keys are all there, so nothing is summed up
online and the backward pass needs queries, keys and values alone. Tensors are (B,N,H,F,d) in any order of memory with
channels side by side; frames of a pixel may lie far apart. Sums are in float32. Halves are exact in TF32, in which they
are multiplied; weights and their gradients are rounded to it. Of float32 tensors, each product is made of three.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = tl.constexpr(32)
"""Rows of a program, whole pixels of as many frames: the most frames that a clip may have."""


@triton.jit
def _places(pixels: tl.tensor, FRAMES: tl.constexpr) -> tl.tuple:
    """Of each row (ROWS,): its pixel among the program's and among all, its frame, and whether there is such a row."""
    row = tl.arange(0, ROWS)
    inner = row // FRAMES
    pixel = tl.program_id(0).to(tl.int64) * (ROWS // FRAMES) + inner
    return inner, pixel, row % FRAMES, (inner < ROWS // FRAMES) & (pixel < pixels)


@triton.jit
def _at(
    tensor: tl.tensor, strides: tl.tuple, pixel: tl.tensor, frame: tl.tensor, places: tl.tensor, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Pointers (ROWS,COLUMNS) to the program's head of a tensor, at frames of pixels of any clip."""
    of_clip, of_place, of_head, of_frame = strides
    start = (pixel // places) * of_clip + (pixel % places) * of_place + frame * of_frame + tl.program_id(1) * of_head
    return tensor + start[:, None] + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _weights(
    query: tl.tensor, key: tl.tensor, inner: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr
) -> tl.tensor:
    """Softmax (ROWS,ROWS) over the frames of each row's own pixel; rows that are not there have some of their own."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
    scores = tl.where(inner[:, None] == inner[None, :], scores, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, output: tl.tensor,
    of_query: tl.tuple, of_key: tl.tuple, of_value: tl.tuple, of_output: tl.tuple,
    pixels: tl.tensor, places: tl.tensor, scale: tl.tensor,
    FRAMES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    inner, pixel, frame, there = _places(pixels, FRAMES)
    mask = there[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]
    q = tl.load(_at(query, of_query, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    k = tl.load(_at(key, of_key, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    v = tl.load(_at(value, of_value, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    attended = tl.dot(_weights(q, k, inner, scale, PRECISION), v, input_precision=PRECISION)
    tl.store(_at(output, of_output, pixel, frame, places, COLUMNS), attended, mask)


@triton.jit
def _backward(
    query: tl.tensor, key: tl.tensor, value: tl.tensor, gradient: tl.tensor,
    by_query: tl.tensor, by_key: tl.tensor, by_value: tl.tensor,
    of_query: tl.tuple, of_key: tl.tuple, of_value: tl.tuple, of_gradient: tl.tuple, of_output: tl.tuple,
    pixels: tl.tensor, places: tl.tensor, scale: tl.tensor,
    FRAMES: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    inner, pixel, frame, there = _places(pixels, FRAMES)
    mask = there[:, None] & (tl.arange(0, COLUMNS) < WIDTH)[None, :]
    q = tl.load(_at(query, of_query, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    k = tl.load(_at(key, of_key, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    v = tl.load(_at(value, of_value, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    g = tl.load(_at(gradient, of_gradient, pixel, frame, places, COLUMNS), mask, 0.0).to(tl.float32)
    weights = _weights(q, k, inner, scale, PRECISION)
    dv = tl.dot(tl.trans(weights), g, input_precision=PRECISION)
    tl.store(_at(by_value, of_output, pixel, frame, places, COLUMNS), dv, mask)
    by_weights = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    by_scores = weights * (by_weights - tl.sum(weights * by_weights, 1)[:, None]) * scale
    dq = tl.dot(by_scores, k, input_precision=PRECISION)
    tl.store(_at(by_query, of_output, pixel, frame, places, COLUMNS), dq, mask)
    dk = tl.dot(tl.trans(by_scores), q, input_precision=PRECISION)
    tl.store(_at(by_key, of_output, pixel, frame, places, COLUMNS), dk, mask)


def forward(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """Write the attention of queries, keys and values into `output`."""
    tensors = (query, key, value, output)
    _launch(_forward, tensors, tensors)


def backward(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, gradients: tuple[Tensor, ...]) -> None:
    """Write the gradients by queries, keys and values into `gradients`, three tensors of one order of memory."""
    given = (query, key, value, gradient)
    _launch(_backward, (*given, *gradients), (*given, gradients[0]))


def _launch(kernel: Any, tensors: tuple[Tensor, ...], told: tuple[Tensor, ...]) -> None:
    """Run a kernel on tensors (B,N,H,F,d), with the strides of those that are `told`."""
    clips, places, heads, frames, width = tensors[0].shape
    grid = (triton.cdiv(clips * places, ROWS.value // frames), heads)  # CUDA counts 2^31 - 1 in the first
    settings = {
        "FRAMES": frames, "WIDTH": width, "COLUMNS": max(16, triton.next_power_of_2(width)),
        "PRECISION": "tf32x3" if tensors[0].dtype == torch.float32 else "tf32",
    }  # fmt: skip
    strides = [tensor.stride()[:4] for tensor in told]
    kernel[grid](*tensors, *strides, clips * places, places, width**-0.5, **settings)
