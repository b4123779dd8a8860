"""Self-attention along the frames of each pixel, without putting pixels before frames and in any number of them.

There are many short sequences: one per pixel of every clip, as long as a clip has frames. The fused kernels launch one
row of blocks per sequence, of which CUDA counts 65,535. Source: CUDA C++ Programming Guide, technical specifications.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn import functional

ATTENTION_ROWS = 65_535
"""Most sequences in one attention call: CUDA's fused kernels launch one block row each and cannot index more."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention of queries, keys and values (B,N,H,F,d) over the frames, for each clip, pixel and head: (B,N,H,F,d)."""


def in_calls(function: Callable[..., Tensor], most: int, *rows: Tensor) -> Tensor:
    """`function` of tensors with as many rows, `most` at a time where there are more."""
    if len(rows[0]) <= most:
        return function(*rows)  # a split into one part would copy its gradient
    parts = zip(*(each.split(most) for each in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


def by_sdpa(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """PyTorch's attention over heads (B,N,H,F,d), which it takes strided; free of copies for B=1 or N=1."""
    rows = [heads.flatten(0, 1) for heads in (queries, keys, values)]  # (B*N, H, F, d)
    attended = in_calls(functional.scaled_dot_product_attention, ATTENTION_ROWS, *rows)  # (B*N, H, F, d)
    return attended.unflatten(0, queries.shape[:2])  # (B, N, H, F, d)


class FrameAttention(Attention):
    """Self-attention over frames; it reads queries, keys and values where their projections left them, frame by frame.

    `attend` is how. Another processor than diffusers' default gets rows (B*N,F,C), so few at a time that it may count
    each head of each row as one.
    """

    attend: Attend = staticmethod(by_sdpa)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Features (B,F,N,C), or rows (R,F,C), to the same."""
        if hidden_states.ndim == 3:
            return self.forward(hidden_states.unsqueeze(2), *args, **kwargs).squeeze(2)  # (R, F, C)
        extra = {name: value for name, value in kwargs.items() if value is not None}
        if args or extra or type(self.processor) is not AttnProcessor2_0:
            return self._processed(hidden_states, partial(super().forward, **extra), args)
        if self.attend is by_sdpa and len(hidden_states) > 1:  # queries, keys and values would be copied each
            return _unfolded(self._attended(_folded(hidden_states).unsqueeze(2)).squeeze(2), hidden_states)
        return self._attended(hidden_states)

    def _attended(self, hidden: Tensor) -> Tensor:
        """The layer as diffusers' default processor computes it: (B,F,N,C) to (B,F,N,C)."""
        layers: tuple[nn.Module, ...] = (self.to_q, self.to_k, self.to_v)
        heads = [self._heads(layer(hidden)) for layer in layers]  # (B, N, H, F, d)
        attended = self.attend(*heads)  # (B, N, H, F, d)
        first = attended.permute(0, 3, 1, 2, 4)  # (B, F, N, H, d)
        if first.is_contiguous():
            return self._out(first)  # (B, F, N, C)
        return self._out(attended.transpose(2, 3)).transpose(1, 2)  # (B, F, N, C)

    def _heads(self, projected: Tensor) -> Tensor:
        """A view (B,N,H,F,d) of projected features (B,F,N,C)."""
        return projected.unflatten(-1, (self.heads, -1)).permute(0, 2, 3, 1, 4)  # (B, N, H, F, d)

    def _out(self, attended: Tensor) -> Tensor:
        """The last projection of heads (...,H,d), in whatever order a kernel has left the rest: (...,C)."""
        output: Tensor = self.to_out[1](self.to_out[0](attended.flatten(-2)))
        return output

    def _processed(self, hidden: Tensor, process: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        """The layer as its processor computes it: (B,F,N,C) to (B,F,N,C)."""
        rows = in_calls(lambda part: process(part, *args), ATTENTION_ROWS // self.heads, _folded(hidden))
        return _unfolded(rows, hidden)


def _folded(hidden: Tensor) -> Tensor:
    """Rows (B*N,F,C) of features (B,F,N,C)."""
    return hidden.transpose(1, 2).contiguous().flatten(0, 1)  # (B*N, F, C)


def _unfolded(rows: Tensor, hidden: Tensor) -> Tensor:
    """Features (B,F,N,C) of their rows (B*N,F,C)."""
    return rows.unflatten(0, (len(hidden), -1)).transpose(1, 2)  # (B, F, N, C)


def attend_frames_by(model: nn.Module, attend: Attend) -> list[FrameAttention]:
    """Let every attention over frames of a model compute by `attend`; those layers."""
    found = [module for module in model.modules() if isinstance(module, FrameAttention)]
    for module in found:
        setattr(module, "attend", attend)  # noqa: B010 -- a plain attribute, which mypy takes for a method
    return found
