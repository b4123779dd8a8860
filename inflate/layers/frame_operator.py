"""Attention over frames by our own Triton kernel, as an operator of PyTorch's: differentiable, compilable, on paper.

Importable without Triton, which is needed when the operator first meets tensors that have values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from inflate.errors import InflateError

MOST_FRAMES, MOST_CHANNELS = 32, 128
"""Longest clip and widest head that the kernel takes."""


def by_triton(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention over the frames of heads (B,N,H,F,d), in any order of memory, any number of them: (B,N,H,F,d).

    Raises `InflateError` for clips too long and heads too wide for the kernel.
    """
    frames, channels = queries.shape[-2:]
    if frames > MOST_FRAMES or channels > MOST_CHANNELS:
        raise InflateError(
            f"attention=triton takes at most {MOST_FRAMES} frames of heads {MOST_CHANNELS} channels wide, "
            f"not {frames} of {channels}: set training.attention=sdpa, or train shorter clips"
        )
    attended: Tensor = attend_frames(*map(_side_by_side, (queries, keys, values)))  # (B, N, H, F, d)
    return attended


@torch.library.custom_op("inflate::attend_frames", mutates_args=())
def attend_frames(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from inflate.layers import frame_kernel

    output = _frame_by_frame(query)
    frame_kernel.forward(query, key, value, output)
    return output


@torch.library.custom_op("inflate::attend_frames_backward", mutates_args=())
def attend_frames_backward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from inflate.layers import frame_kernel

    gradients = (_frame_by_frame(query), _frame_by_frame(query), _frame_by_frame(query))
    frame_kernel.backward(query, key, value, gradient, gradients)
    return gradients


@attend_frames.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _frame_by_frame(query)


@attend_frames_backward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _frame_by_frame(query), _frame_by_frame(query), _frame_by_frame(query)


def _frame_by_frame(heads: Tensor) -> Tensor:
    """Memory for heads (B,N,H,F,d) in the order B, F, N, H, d, as projections have them."""
    return torch.empty_permuted(heads.shape, (0, 3, 1, 2, 4), dtype=heads.dtype, device=heads.device)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = attend_frames_backward(*ctx.saved_tensors, _side_by_side(gradient))
    return gradients


def _side_by_side(heads: Tensor) -> Tensor:
    """The same with channels side by side, as the kernel reads them; the gradient of a sum has them all in one."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


attend_frames.register_autograd(_differentiate, setup_context=_keep)


def _products(query: Any, times: int) -> int:
    """FLOPs of that many products of (F,d) with (d,F) per clip, pixel and head."""
    clips, places, heads, frames, channels = query
    return int(2 * times * clips * places * heads * frames * frames * channels)


@register_flop_formula(torch.ops.inflate.attend_frames)
def _(query: Any, *_: Any, **__: Any) -> int:
    return _products(query, 2)


@register_flop_formula(torch.ops.inflate.attend_frames_backward)
def _(query: Any, *_: Any, **__: Any) -> int:
    return _products(query, 5)
