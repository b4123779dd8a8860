"""An image in cross-attention beside the text: a query transformer makes tokens of it, which have keys of their own.

Every 2D transformer block attends to the text and to the image with the same queries; both results are added before the
one output projection. Names, with `B` for a block such as `down_blocks.0.attentions.0.transformer_blocks.0`:

    query_transformer.{latents,proj_in,proj_out,norm_out}.*          learned queries, and what surrounds the layers
    query_transformer.layers.0.attention.{norm_image,norm_latents,to_q,to_kv,to_out}.*
    query_transformer.layers.0.feed_forward.{norm,linear_1,linear_2}.*
    B.attn2.image.{to_k,to_v}.weight                                 keys and values of image tokens
    B.attn2.image.gate                                               shape (1,), where the image's share is learned

Source: Xing et al., DynamiCrafter (2023), section 3.2; Ye et al., IP-Adapter (2023), section 3.2. The query transformer
is the perceiver resampler of Alayrac et al., Flamingo (2022), section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from inflate.errors import ConfigError, InflateError
from inflate.layers.clip import Clip
from inflate.layers.temporal import ContextAttention, SpatialBlock, like

OtherLengths = Literal["interpolate", "share"]


@dataclass(frozen=True)
class ImageContext:
    """How a UNet attends to an image; stored in the model's config. ConfigError for sizes that cannot be.

    The defaults are DynamiCrafter's.
    """

    embedding: int = 1280
    """width of the image features that come in, one for each patch"""
    width: int = 1024
    """width of the query transformer"""
    depth: int = 4
    """its layers"""
    heads: int = 12
    """attention heads of each layer"""
    head_width: int = 64
    """channels of a head"""
    queries: int = 16
    """tokens for each frame"""
    frames: int = 16
    """groups of queries that are learned, one for each frame of a clip of training; 1: the same for all frames"""
    other_lengths: OtherLengths = "interpolate"
    """clips of another length: interpolate = the groups of queries are interpolated over the clip, its ends keeping
    theirs, and weigh in their own attention as the learned ones do; share = every frame attends to the tokens of all
    groups"""
    counted: int | None = None
    """groups that the queries weigh as in each other's attention, however many there are: one group that is to become
    16 learns what those will make if it weighs as 16; none: as many as are learned"""
    gate: bool = False
    """whether each block learns the image's share, tanh(gate) + 1; otherwise it is 1"""

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.type == "int"}
        low = [name for name, size in {**sizes, "counted": self.weight}.items() if size < 1]
        if low:
            raise ConfigError(f"image_context: {', '.join(low)} must be at least 1")
        if self.other_lengths not in get_args(OtherLengths):
            raise ConfigError(f"image_context.other_lengths={self.other_lengths}: interpolate or share")

    @property
    def weight(self) -> int:
        """Groups that the queries weigh as."""
        return self.frames if self.counted is None else self.counted

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ImageContext:
        """The settings of `to_dict`; raises `ConfigError` for an unknown one."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ConfigError(f"image_context: unknown setting {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**settings)


class QueryAttention(nn.Module):
    """Attention of the queries to the image's features and to themselves."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm_image = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, image: Tensor, latents: Tensor, weight: float = 1.0) -> Tensor:
        """Features (B,P,W) and queries (B,Q,W), each of which weighs as so many, to (B,Q,W)."""
        bias = None
        if weight != 1.0:
            bias = latents.new_zeros(image.shape[1] + latents.shape[1])  # (P+Q,)
            bias[image.shape[1] :] = math.log(weight)
        image, latents = self.norm_image(image), self.norm_latents(latents)
        keys, values = self.to_kv(torch.cat([image, latents], dim=1)).chunk(2, dim=-1)  # (B, P+Q, I)
        output: Tensor = self.to_out(attend(self.to_q(latents), keys, values, self.heads, bias))  # (B, Q, W)
        return output


class QueryFeedForward(nn.Module):
    """Norm, and two linear layers with GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, 4 * width, bias=False)
        self.linear_2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B,Q,W) to (B,Q,W)."""
        output: Tensor = self.linear_2(functional.gelu(self.linear_1(self.norm(tokens))))
        return output


class QueryLayer(nn.Module):
    """One layer of the query transformer; both of its parts are residual."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.attention = QueryAttention(width, heads, head_width)
        self.feed_forward = QueryFeedForward(width)

    def forward(self, image: Tensor, latents: Tensor, weight: float = 1.0) -> Tensor:
        """Features (B,P,W) and queries (B,Q,W), each of which weighs as so many, to (B,Q,W)."""
        latents = latents + self.attention(image, latents, weight)
        output: Tensor = latents + self.feed_forward(latents)
        return output


class QueryTransformer(nn.Module):
    """Makes tokens for every frame of the features of an image's patches."""

    def __init__(self, context: ImageContext, output_width: int) -> None:
        super().__init__()
        width = context.width
        self.context = context
        self.latents = nn.Parameter(torch.randn(1, context.queries, width).repeat(1, context.frames, 1) / width**0.5)
        self.proj_in = nn.Linear(context.embedding, width)
        self.layers = nn.ModuleList(QueryLayer(width, context.heads, context.head_width) for _ in range(context.depth))
        self.proj_out = nn.Linear(width, output_width)
        self.norm_out = nn.LayerNorm(output_width)

    def forward(self, features: Tensor, frames: int) -> Tensor:
        """Features (B,P,E) to the tokens (B,F,T,C) of each frame or, where frames share them, (B,T,C)."""
        if features.ndim != 3 or features.shape[2] != self.context.embedding:
            raise InflateError(
                f"image features must be (batch, patches, {self.context.embedding}), got {tuple(features.shape)}"
            )
        shared = self.context.other_lengths == "share" and frames != self.context.frames
        queries = self.latents if shared else self.queries_of(frames)  # (1, Q, W)
        image, latents = self.proj_in(features), queries.expand(len(features), -1, -1)
        weight = self.context.weight * self.context.queries / queries.shape[1]
        for layer in self.layers:
            latents = layer(image, latents, weight)  # (B, Q, W)
        tokens: Tensor = self.norm_out(self.proj_out(latents))  # (B, Q, C)
        return tokens if shared else tokens.unflatten(1, (frames, -1))

    def queries_of(self, frames: int) -> Tensor:
        """The queries (1, F*T, W) of a clip: as they were learned, or interpolated between the two nearest groups."""
        groups = self.latents.unflatten(1, (self.context.frames, -1))  # (1, G, T, W)
        if frames == self.context.frames:
            return self.latents
        place = torch.linspace(0, self.context.frames - 1, frames, device=groups.device)
        low = place.floor().long().clamp(max=max(self.context.frames - 2, 0))
        high = (low + 1).clamp(max=self.context.frames - 1)
        share = (place - low).to(groups.dtype)[None, :, None, None]
        return torch.lerp(groups[:, low], groups[:, high], share).flatten(1, 2)  # (1, F*T, W)

    def with_groups(self, frames: int) -> QueryTransformer:
        """A copy with a group of queries for each of so many frames: of such clips it makes what this one makes."""
        weight = None if self.context.weight == frames else self.context.weight
        context = ImageContext.from_dict({**self.context.to_dict(), "frames": frames, "counted": weight})
        other = like(QueryTransformer(context, self.proj_out.out_features), self)
        other.load_state_dict({**self.state_dict(), "latents": self.queries_of(frames)})
        return other


class ImageAttention(nn.Module):
    """Keys and values of image tokens, and the share that the image has in what a block attends to."""

    def __init__(self, width: int, inner: int, gate: bool) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.gate = nn.Parameter(torch.zeros(1)) if gate else None

    def forward(self, queries: Tensor, tokens: Tensor, heads: int) -> Tensor:
        """Queries (B,N,I) and image tokens (B,T,C) to what is added to the text's part (B,N,I)."""
        output = attend(queries, self.to_k(tokens), self.to_v(tokens), heads)
        return output if self.gate is None else output * (torch.tanh(self.gate) + 1.0)


class DualAttention(ContextAttention):
    """Cross-attention to text and image. The image's tokens are the last of the context; the clip says how many.

    Both parts are computed by PyTorch's attention, whatever the layer's processor.
    """

    clip: Clip
    image: ImageAttention

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Queries (B,N,C) and context (B,L,D) to (B,N,C); without image tokens as the parent."""
        count = self.clip.state.image_tokens
        if not count:
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        extra = [name for name, value in kwargs.items() if value is not None]
        if args or extra or not isinstance(encoder_hidden_states, Tensor) or not self._plain():
            what = f"{', '.join(extra)} " if extra else "an image adapter or another processor of attention "
            raise InflateError(f"{what}cannot be used together with image tokens: leave one of the two out")
        text, image = encoder_hidden_states[:, :-count], encoder_hidden_states[:, -count:]
        queries = self.to_q(hidden_states)  # (B, N, I)
        found = attend(queries, self.to_k(text), self.to_v(text), self.heads)  # (B, N, I)
        output: Tensor = self.to_out[0](found + self.image(queries, image, self.heads))  # (B, N, C)
        return output / self.rescale_output_factor


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Attention of queries (B,N,I) to keys and values (B,L,I), to whose logits a bias (L,) may be added: (B,N,I)."""
    q, k, v = (tokens.unflatten(2, (heads, -1)).transpose(1, 2) for tokens in (queries, keys, values))  # (B, H, N, I/H)
    mask = None if bias is None else bias.to(q.dtype).expand(queries.shape[1], -1)  # (N, L)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)  # (B, N, I)


def cross_attentions(model: nn.Module) -> Iterator[tuple[str, SpatialBlock]]:
    """The 2D transformer blocks of a video model that attend to a context, by name."""
    for name, module in model.named_modules():
        if isinstance(module, SpatialBlock) and isinstance(module.attn2, Attention):
            yield name, module


def attend_to_image(block: SpatialBlock, clip: Clip, gate: bool) -> None:
    """Let a block attend to an image beside the text, in place.

    The image's keys are born as the text's and its values as zero: until they learn, the block is as it was.
    """
    attention = block.attn2
    image = ImageAttention(attention.cross_attention_dim, attention.inner_dim, gate)
    with torch.no_grad():
        image.to_v.weight.zero_()
    image = like(image, attention)
    if attention.to_k.weight.shape == image.to_k.weight.shape and not attention.to_k.weight.is_meta:
        image.to_k.weight.data.copy_(attention.to_k.weight)
    attention.image = image
    attention.__class__ = DualAttention
    # Both read the clip: the attention in its forward pass, the block where that is computed again.
    for module in (attention, block):
        setattr(module, "clip", clip)  # noqa: B010 -- a plain attribute, which mypy takes for a tensor
