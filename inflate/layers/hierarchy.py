"""What a UNet is told of a clip's first frame, from fine to coarse, as in I2VGen-XL.

The detail encoder makes channels beside the noisy latents of every frame, the global encoder context tokens of the
frame's latent, and two linear layers those of its CLIP embedding. All tokens stand behind the text's in one context.
Names, in a UNet:

    first_frame.detail.convolutions.{0,2,4}.*                            per frame
    first_frame.detail.frames.{norm,to_qkv,to_out,linear_1,linear_2}.*   over the frames of each pixel
    first_frame.whole.{0,3,5}.*                                          the global encoder
    first_frame.tokens.{0,2}.*                                           CLIP's tokens

Source: Zhang et al., I2VGen-XL (2023), section 3.2, in the form of the released model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from inflate.errors import ConfigError, InflateError
from inflate.layers.clip import Clip
from inflate.layers.conditioning import ImageTokens
from inflate.layers.image_context import attend
from inflate.layers.temporal import ContextAttention, SpatialBlock

Part = Literal["detail", "global", "clip"]
GLOBAL_SIDE = 8
"""Rows and columns of the global encoder's tokens, whatever the size of the frame."""
_HEADS = 2
"""Attention heads of the detail encoder, each as wide as the latents."""


@dataclass(frozen=True)
class Hierarchy:
    """Which parts of a first frame a UNet is told; stored in the model's config. ConfigError for sizes that cannot be.

    The defaults are those of the released I2VGen-XL.
    """

    channels: int = 4
    """of the first frame's latent"""
    embedding: int = 1024
    """width of CLIP's embedding of the first frame"""
    clip_tokens: int = 4
    """context tokens of that embedding; 0: none"""
    detail_encoder: bool = True
    """channels beside the noisy latents, of the first frame's latent"""
    global_encoder: bool = True
    """64 context tokens of the first frame's latent"""
    dropout: float = 0.05
    """in training, between the frames of the detail encoder"""

    def __post_init__(self) -> None:
        if self.channels < 1 or self.embedding < 1 or self.clip_tokens < 0:
            raise ConfigError(
                f"hierarchy: channels ({self.channels}) and embedding ({self.embedding}) must be at least 1, "
                f"clip_tokens ({self.clip_tokens}) at least 0"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"hierarchy.dropout={self.dropout}: a share from 0 to below 1")
        if not self.parts:
            raise ConfigError("hierarchy: all of detail_encoder, global_encoder and clip_tokens are off: set one")

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is, from fine to coarse."""
        there = {"detail": self.detail_encoder, "global": self.global_encoder, "clip": self.clip_tokens > 0}
        return tuple(part for part in get_args(Part) if there[part])

    @property
    def takes_latents(self) -> bool:
        """Whether the first frame's latent is needed."""
        return self.detail_encoder or self.global_encoder

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> Hierarchy:
        """The settings of `to_dict`; raises `ConfigError` for an unknown one."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"hierarchy: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**settings)


class Told(NamedTuple):
    """What `FirstFrame` makes of first frames."""

    detail: Tensor | None
    """channels beside the noisy latents, (B, F, C, h, w)"""
    tokens: Tensor | None
    """context tokens, the global encoder's before CLIP's, (B, T, D)"""


class FirstFrame(nn.Module):
    """The encoders of a first frame, of a UNet whose context is `width` wide and time embedding `hidden`."""

    def __init__(self, hierarchy: Hierarchy, width: int, hidden: int) -> None:
        super().__init__()
        self.hierarchy = hierarchy
        channels, tokens = hierarchy.channels, hierarchy.clip_tokens
        self.detail = DetailEncoder(channels, hierarchy.dropout) if hierarchy.detail_encoder else None
        self.whole = GlobalEncoder(channels, width) if hierarchy.global_encoder else None
        self.tokens = ImageTokens(hierarchy.embedding, hidden, tokens, width) if tokens else None

    def forward(
        self, latents: Tensor | None, embeddings: Tensor | None, frames: int, left_out: Collection[str] = ()
    ) -> Told:
        """Latents (B,C,h,w) and CLIP embeddings (B,1,E), or none, of first frames, for clips of so many frames.

        Of what is left out there are no tokens, and zeros in place of the detail. Raises `InflateError` where an input
        is missing, of another shape or not taken.
        """
        self._check(latents, embeddings, left_out)
        detail, tokens = None, []
        if self.detail is not None and latents is not None:
            detail = self.detail(latents, frames)  # (B, F, C, h, w)
            detail = torch.zeros_like(detail) if "detail" in left_out else detail
        if self.whole is not None and latents is not None and "global" not in left_out:
            tokens.append(self.whole(latents))  # (B, 64, D)
        if self.tokens is not None and embeddings is not None and "clip" not in left_out:
            tokens.append(self.tokens(embeddings))  # (B, T, D)
        return Told(detail, torch.cat(tokens, dim=1) if tokens else None)

    def _check(self, latents: Tensor | None, embeddings: Tensor | None, left_out: Collection[str]) -> None:
        own = self.hierarchy
        unknown = sorted(set(left_out) - set(get_args(Part)))
        if unknown:
            raise InflateError(f"left_out: {', '.join(unknown)} is no part of a first frame: detail, global, clip")
        if (latents is not None) != own.takes_latents:
            needed = "takes the latents of first frames: give" if own.takes_latents else "takes no latents: leave out"
            raise InflateError(f"this UNet {needed} image_latents")
        if latents is not None and (latents.ndim != 4 or latents.shape[1] != own.channels):
            raise InflateError(
                f"image_latents must be (batch, {own.channels}, height, width), got {tuple(latents.shape)}"
            )
        if embeddings is not None and (not own.clip_tokens or embeddings.shape[1:] != (1, own.embedding)):
            wanted = f"must be (batch, 1, {own.embedding})" if own.clip_tokens else "are not taken by this UNet"
            raise InflateError(f"image_embeddings {wanted}, got {tuple(embeddings.shape)}")


class DetailEncoder(nn.Module):
    """Channels for every frame of a clip, of the latent of its first and the places of the others."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        inner = 4 * channels
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, inner, 3, padding=1), nn.SiLU(),
            nn.Conv2d(inner, inner, 3, padding=1), nn.SiLU(),
            nn.Conv2d(inner, channels, 3, padding=1),
        )  # fmt: skip
        self.frames = FrameEncoder(channels, dropout)

    def forward(self, latents: Tensor, frames: int) -> Tensor:
        """The latents (B,C,h,w) of first frames to (B,F,C,h,w)."""
        placed = with_places(latents, frames)  # (B, F, C, h, w)
        hidden = self.convolutions(placed.flatten(0, 1)).unflatten(0, placed.shape[:2])  # (B, F, C, h, w)
        pixels = hidden.permute(0, 3, 4, 1, 2)  # (B, h, w, F, C)
        found: Tensor = self.frames(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3])  # (B, h, w, F, C)
        return found.permute(0, 3, 4, 1, 2)  # (B, F, C, h, w)


def with_places(latents: Tensor, frames: int) -> Tensor:
    """The latents (B,C,h,w) of first frames, followed by the place of every other frame in its clip, from above 0 to 1:
    (B,F,C,h,w)."""
    places = torch.arange(1, frames, device=latents.device, dtype=latents.dtype) / max(frames - 1, 1)  # (F-1,)
    others = places[:, None, None, None].expand(len(latents), -1, *latents.shape[1:])  # (B, F-1, C, h, w)
    return torch.cat([latents[:, None], others], dim=1)


class FrameEncoder(nn.Module):
    """Self-attention over the frames of a pixel and a feed-forward, both residual; the first is normalised before."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        inner = _HEADS * channels
        self.norm = nn.LayerNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * inner, bias=False)
        self.to_out = nn.Linear(inner, channels)
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, channels)
        self.dropout = dropout

    def forward(self, pixels: Tensor) -> Tensor:
        """Channels (N,F,C) of pixels over frames to (N,F,C)."""
        queries, keys, values = self.to_qkv(self.norm(pixels)).chunk(3, dim=-1)  # (N, F, 2C)
        pixels = pixels + self._dropped(self.to_out(attend(queries, keys, values, _HEADS)))
        hidden = self._dropped(functional.gelu(self.linear_1(pixels)))
        return pixels + self.linear_2(hidden)

    def _dropped(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training)


class GlobalEncoder(nn.Sequential):
    """As many context tokens of a latent of any size."""

    def __init__(self, channels: int, width: int) -> None:
        inner, side = 8 * channels, 4 * GLOBAL_SIDE
        super().__init__(
            nn.Conv2d(channels, inner, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d((side, side)),
            nn.Conv2d(inner, 2 * inner, 3, stride=2, padding=1), nn.SiLU(),
            nn.Conv2d(2 * inner, width, 3, stride=2, padding=1),
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """Latents (B,C,h,w) to tokens (B,64,D), row by row."""
        output: Tensor = super().forward(input)  # (B, D, 8, 8)
        return output.flatten(2).transpose(1, 2)  # (B, 64, D)


class WeighedAttention(ContextAttention):
    """Cross-attention to a context whose last tokens may weigh less, as the clip says."""

    clip: Clip

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Queries (B,N,C) and context (B,L,D) to (B,N,C), as the parent where all tokens weigh the same."""
        weight = self.clip.state.image_bias
        if weight is None:
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        extra = [name for name, value in kwargs.items() if value is not None]
        if args or extra or not isinstance(encoder_hidden_states, Tensor) or not self._plain():
            what = f"{', '.join(extra)} " if extra else "an image adapter or another processor of attention "
            raise InflateError(f"{what}cannot be used while image tokens fade in: leave it out, or image_share at 1")
        bias = hidden_states.new_zeros(encoder_hidden_states.shape[1])  # (L,)
        bias[len(bias) - self.clip.state.image_tokens :] = weight
        queries, keys = self.to_q(hidden_states), self.to_k(encoder_hidden_states)  # (B, N, I), (B, L, I)
        found = attend(queries, keys, self.to_v(encoder_hidden_states), self.heads, bias)  # (B, N, I)
        output: Tensor = self.to_out[0](found)  # (B, N, C)
        return output / self.rescale_output_factor


def weigh_image(block: SpatialBlock, clip: Clip) -> None:
    """Let the cross-attention of a block weigh an image's tokens as the clip says, in place."""
    if isinstance(block.attn2, Attention):
        block.attn2.__class__ = WeighedAttention
    # Both read the clip: the attention in its forward pass, the block where that is computed again.
    for module in (block.attn2, block):
        setattr(module, "clip", clip)  # noqa: B010 -- a plain attribute, which mypy takes for a tensor
