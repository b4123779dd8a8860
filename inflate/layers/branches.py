"""Temporal layers that stand after a 2D layer, as in ModelScope, VGen and AnimateDiff, and the 2D input that owns one.

Each adds to what the 2D layer gave, and is born adding exactly zero: its last projection is zero. Names, with `D` for a
resnet or attention such as `down_blocks.0`:

    D.resnets.0.temporal.conv{1,2,3,4}.*                         four convolutions over time
    D.attentions.0.temporal.{norm,proj_in,proj_out}.*            a transformer over frames, also after a resnet
    D.attentions.0.temporal.transformer_blocks.0.{norm1,attn1,norm2,attn2,norm3,ff}.*
    conv_in.temporal.*                                           a transformer over frames after the input convolution

A transformer with positions holds their table, `transformer_blocks.0.pos_embed.pe`, as AnimateDiff's files do.
Source: Wang et al., ModelScope Text-to-Video Technical Report (2023), section 3; Guo et al., AnimateDiff (2023),
section 4.2.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from inflate.errors import InflateError
from inflate.layers.clip import Clip, ClipState
from inflate.layers.convolution import Convolution
from inflate.layers.recompute import Recompute, divide, run
from inflate.layers.temporal import ATTENTION_ROWS, TemporalConv, become, like, zero_

NormOver = Literal["clip", "frame"]
"""What a group norm averages over: all frames of a clip together, or each frame alone."""


def add_to_frames(hidden: Tensor, change: Tensor, state: ClipState) -> Tensor:
    """Features (B*F,C,H,W) and what a branch adds to them; image frames stay as they are."""
    if state.image_only is not None:
        change = change.masked_fill(state.image_only.reshape(-1, 1, 1, 1), 0)
    return hidden + change


class TemporalConvs(nn.Module):
    """Four convolutions over 3 frames at each pixel, each after a group norm over the clip and SiLU; the last is zero.

    `dropout` stands before all but the first convolution.
    """

    inner = True
    recompute: Recompute | None = None

    def __init__(self, channels: int, groups: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.GroupNorm(groups, channels), nn.SiLU(), TemporalConv(channels))
        self.conv2 = self._dropping(channels, groups, dropout)
        self.conv3 = self._dropping(channels, groups, dropout)
        self.conv4 = self._dropping(channels, groups, dropout)
        zero_(self.conv4[-1])

    @staticmethod
    def _dropping(channels: int, groups: int, dropout: float) -> nn.Sequential:
        layers = (nn.GroupNorm(groups, channels), nn.SiLU(), nn.Dropout(dropout), TemporalConv(channels))
        return nn.Sequential(*layers)

    def forward(self, hidden: Tensor, time: Tensor | None, state: ClipState) -> Tensor:
        """(B*F,C,H,W) features to (B*F,C,H,W); the time embedding is not used."""
        change = run(self, partial(self._change, frames=state.frames), hidden)  # (B*F, C, H, W)
        return add_to_frames(hidden, change, state)  # (B*F, C, H, W)

    def _change(self, hidden: Tensor, frames: int) -> Tensor:
        """What the convolutions add to (B*F,C,H,W) features."""
        video = hidden.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()  # (B, C, F, H, W)
        change: Tensor = self.conv4(self.conv3(self.conv2(self.conv1(video))))  # (B, C, F, H, W)
        return change.transpose(1, 2).flatten(0, 1)  # (B*F, C, H, W)


class FrameTransformer(nn.Module):
    """A transformer over the frames of each pixel: two self-attentions and a feed-forward between two projections.

    Its width is `heads * head_width`, whatever the number of channels. `positions` is the most frames it can tell apart
    by sinusoids, which it adds before each attention; None adds none, and any number of frames will do.
    """

    inner = True
    recompute: Recompute | None = None

    def __init__(
        self,
        channels: int,
        heads: int,
        head_width: int,
        groups: int,
        norm_over: NormOver = "clip",
        positions: int | None = None,
    ) -> None:
        super().__init__()
        width = heads * head_width
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width)
        block = BasicTransformerBlock(
            width,
            heads,
            head_width,
            double_self_attention=True,
            positional_embeddings=None if positions is None else "sinusoidal",
            num_positional_embeddings=positions,
        )
        divide(block.ff, block.norm3)
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(width, channels)
        self.norm_over = norm_over
        self.positions = positions
        zero_(self.proj_out)

    def forward(self, hidden: Tensor, time: Tensor | None, state: ClipState) -> Tensor:
        """(B*F,C,H,W) features to (B*F,C,H,W); the time embedding is not used.

        Raises `InflateError` where a clip has more frames than there are positions.
        """
        if self.positions is not None and state.frames > self.positions:
            raise InflateError(
                f"a clip of {state.frames} frames is longer than the {self.positions} positions of this motion module: "
                "give shorter clips, or inflate with more motion_frames"
            )
        change = run(self, partial(self._change, frames=state.frames), hidden)  # (B*F, C, H, W)
        return add_to_frames(hidden, change, state)  # (B*F, C, H, W)

    def _change(self, hidden: Tensor, frames: int) -> Tensor:
        """What the transformer adds to (B*F,C,H,W) features."""
        clip = self._normed(hidden, frames)  # (B, F, C, H, W)
        batch, _, _, height, width = clip.shape
        rows = clip.permute(0, 3, 4, 1, 2).flatten(0, 2)  # (B*H*W, F, C)
        change: Tensor = self.proj_out(self._over_frames(self.proj_in(rows)))  # (B*H*W, F, C)
        change = change.unflatten(0, (batch, height, width)).permute(0, 3, 4, 1, 2)  # (B, F, C, H, W)
        return change.flatten(0, 1)  # (B*F, C, H, W)

    def _normed(self, hidden: Tensor, frames: int) -> Tensor:
        """The features after the group norm, per clip: (B,F,C,H,W)."""
        if self.norm_over == "frame":
            output: Tensor = self.norm(hidden).unflatten(0, (-1, frames))  # (B, F, C, H, W)
            return output
        video = hidden.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()  # (B, C, F, H, W)
        output = self.norm(video).transpose(1, 2)  # (B, F, C, H, W)
        return output

    def _over_frames(self, rows: Tensor) -> Tensor:
        """The block over rows (N,F,C), in calls that CUDA's attention kernels can index: (N,F,C)."""
        block = self.transformer_blocks[0]
        parts = [block(part) for part in rows.split(ATTENTION_ROWS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class VideoConvIn(Convolution):
    """The first 2D convolution, followed by a transformer over frames; recomputed together under checkpointing."""

    clip: Clip
    recompute: Recompute | None = None
    temporal: FrameTransformer

    def forward(self, input: Tensor) -> Tensor:
        """(B*F,C,H,W) latents to (B*F,C',H,W) features."""
        output: Tensor = run(self, self._both, input)
        return output

    def _both(self, input: Tensor) -> Tensor:
        hidden = super().forward(input)  # (B*F, C', H, W)
        state = self.clip.state
        return hidden if state.bypass else self.temporal(hidden, None, state)


def inflate_conv_in(convolution: nn.Conv2d, clip: Clip, temporal: FrameTransformer) -> None:
    """Turn the first convolution of a UNet into a `VideoConvIn` in place."""
    convolution.temporal = like(temporal, convolution)
    become(convolution, VideoConvIn, clip)
