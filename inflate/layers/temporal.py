"""Temporal layers in the style of Stable Video Diffusion, and the 2D layers that own them.

An inflated layer is its 2D class plus one child called `temporal`, so a parameter is named as in the 2D model, or has
`.temporal.` in its name. With `D` for a resnet or attention such as `down_blocks.0`:

    D.resnets.0.temporal.{norm1,conv1,time_emb_proj,norm2,conv2}.*      the residual block over time
    D.resnets.0.temporal.mix                                            shape (1,), before the sigmoid
    D.attentions.0.temporal.position.{linear_1,linear_2}.*              frame positions, one per transformer
    D.attentions.0.temporal.mix                                         one mix per transformer, shared over its depth
    D.attentions.0.transformer_blocks.0.temporal.{norm_in,ff_in,norm1,attn1,norm2,attn2,norm3,ff}.*
    decoder.conv_out.temporal.{weight,bias}                             last convolution of a video decoder

Every temporal layer is born as the identity: its last projections are zero. Mixing is a `lerp`, which returns equal
inputs unchanged, so that a newborn video model repeats its parent bit for bit.

Source: Blattmann et al., Stable Video Diffusion (2023), appendix D; Align your Latents (2023), section 3.1.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from inflate.layers.clip import Clip, ClipState
from inflate.layers.convolution import convolutions_within, convolve
from inflate.layers.frame_attention import FrameAttention
from inflate.layers.freeu import FreeU, freed
from inflate.layers.recompute import Compiled, Recompute, divide, run
from inflate.layers.up_blocks import join

Child = TypeVar("Child", bound=nn.Module)


def mix_parameter() -> nn.Parameter:
    """A mixing logit of 0.5, shape (1,): sharded training refuses 0-dimensional parameters."""
    return nn.Parameter(torch.full((1,), 0.5))


def mix(spatial: Tensor, temporal: Tensor, share: Tensor, image_only: Tensor | None) -> Tensor:
    """Blend (B,F,...) features, `share` in [0,1] of the temporal ones; image frames keep the spatial ones."""
    share = share.to(spatial.dtype)
    if image_only is not None:
        share = torch.where(image_only, share.new_zeros(()), share)  # (B, F)
        share = share.reshape(*image_only.shape, *[1] * (spatial.ndim - 2))  # (B, F, 1, ...)
    return torch.lerp(spatial, temporal.to(spatial.dtype), share)


def zero_(*layers: nn.Module) -> None:
    """Set every parameter of the layers to zero."""
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()


def like(child: Child, parent: nn.Module) -> Child:
    """Put a new child in its parent's dtype, device and train or eval mode."""
    reference = next(parent.parameters())
    return child.to(device=reference.device, dtype=reference.dtype).train(parent.training)


class TemporalConv(nn.Conv3d):
    """Convolution over 3 frames at each pixel: weight (out, in, 3, 1, 1), input and output (B,C,F,H,W).

    Computed as a 2D convolution over (frames, pixels), a free view that is 1.3 to 1.8 times as fast on a CPU. Other
    kernels (n, 1, 1) are the factors of a LoRA on such a layer, which PEFT makes as Conv3d's are made.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int | None = None,
        kernel_size: tuple[int, int, int] = (3, 1, 1),
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: tuple[int, int, int] | None = None,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        padding = padding or (kernel_size[0] // 2, 0, 0)
        super().__init__(channels, out_channels or channels, kernel_size, stride, padding, groups=groups, bias=bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        pixels, around = input.flatten(3), (self.kernel_size[0] // 2, 0)  # (B, C, F, H*W)
        output = convolve(pixels, weight.squeeze(-1), bias, padding=around, groups=self.groups)  # (B, C, F, H*W)
        return output.unflatten(3, input.shape[3:])  # (B, C, F, H, W)

    def identity_(self) -> None:
        """Make the layer repeat its input: a one in the middle of each channel's own kernel, no bias."""
        zero_(self)
        with torch.no_grad():
            self.weight[:, :, 1, 0, 0].fill_diagonal_(1)


class TemporalResnet(nn.Module):
    """Residual block over time: norm, SiLU, conv, + time embedding, norm, SiLU, conv; and its mix with the 2D path.

    Group norms average over (channels of the group, F, H, W). `time_channels` None leaves the embedding out; `reverse`
    gives the temporal path sigmoid(mix) instead of 1 - sigmoid(mix), as in the video decoder.
    """

    inner = True
    recompute: Recompute | None = None

    def __init__(self, channels: int, groups: int, eps: float, time_channels: int | None, reverse: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = TemporalConv(channels)
        self.time_emb_proj = None if time_channels is None else nn.Linear(time_channels, channels)
        self.norm2 = nn.GroupNorm(groups, channels, eps)
        self.conv2 = TemporalConv(channels)
        self.mix = mix_parameter()
        self.reverse = reverse
        zero_(self.conv2)

    def forward(self, spatial: Tensor, time: Tensor | None, state: ClipState) -> Tensor:
        """(B*F,C,H,W) features and (B*F,E) time embedding to (B*F,C,H,W)."""
        output: Tensor = run(self, partial(self._mixed, state=state), spatial, time)
        return output

    def _mixed(self, spatial: Tensor, time: Tensor | None, state: ClipState) -> Tensor:
        spatial = spatial.unflatten(0, (-1, state.frames))  # (B, F, C, H, W)
        # The norm copies to this layout anyway; on a CPU its backward pass crashes on channels-last input (torch 2.13).
        # One name for all that comes of it: where no gradient is wanted, each is gone before the next convolution,
        # beside which cuDNN needs room for as much as goes in and comes out.
        hidden = spatial.transpose(1, 2).contiguous()  # (B, C, F, H, W)
        hidden = functional.silu(self.norm1(hidden))
        hidden = self.conv1(hidden)
        if self.time_emb_proj is not None and time is not None:
            shift = self.time_emb_proj(functional.silu(time))  # (B*F, C)
            hidden = hidden + shift.unflatten(0, (-1, state.frames)).transpose(1, 2)[..., None, None]
        hidden = functional.silu(self.norm2(hidden))
        hidden = self.conv2(hidden)  # (B, C, F, H, W)
        hidden = spatial + hidden.transpose(1, 2)  # (B, F, C, H, W)
        return mix(spatial, hidden, self.share, state.image_only).flatten(0, 1)  # (B*F, C, H, W)

    @property
    def share(self) -> Tensor:
        """The temporal path's share of the mix, shape (1,)."""
        return torch.sigmoid(self.mix if self.reverse else -self.mix)


PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)
"""Diffusers' processors that compute attention and nothing else, each in its own way."""


class ContextAttention(Attention):
    """Cross-attention that knows that a softmax over a single token is one.

    With one context token the output is `to_out(to_v(context))`, whatever the query: norm, queries, keys and softmax
    are then left out. Only when their parameters are frozen or no gradient is wanted: otherwise they would get no
    gradient instead of a zero one, over which distributed data parallel waits for ever.
    """

    query_norm: nn.Module

    def constant(self, context: Any, **extra: Any) -> Tensor | None:
        """The output (B,1,C) for every query, or None if it depends on the query or, by an image adapter, on more."""
        if not isinstance(context, Tensor) or context.shape[1] != 1 or not self._plain() or self._learns(extra):
            return None
        output = self.to_out[0](self.to_v(context))  # (B, 1, C)
        return output / self.rescale_output_factor

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Queries (B,N,C) and context (B,L,D) to (B,N,C), or (B,1,C) if all N are equal."""
        extra = {name: value for name, value in kwargs.items() if value is not None}
        constant = None if args else self.constant(encoder_hidden_states, **extra)
        if constant is not None:
            return constant
        output: Tensor = super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        return output

    def _plain(self) -> bool:
        """Whether the processor is diffusers' own, and nothing is added to what it computes."""
        if type(self.processor) not in PLAIN_PROCESSORS:
            return False
        unusual = (self.norm_cross, self.residual_connection, getattr(self, "fused_projections", False))
        return not any(unusual) and not (self.training and self.dropout > 0)

    def _learns(self, extra: dict[str, Any]) -> bool:
        """Whether leaving the query out could be noticed: by a gradient, or by an extra argument."""
        if extra or not torch.is_grad_enabled():
            return bool(extra)
        parts = (self.query_norm, self.to_q, self.to_k)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())


def constant_when_single(block: nn.Module) -> None:
    """Turn the cross-attention of a transformer block into a `ContextAttention`; it keeps its parameters."""
    if type(block.attn2) is Attention:
        block.attn2.__class__ = ContextAttention
        # Set past nn.Module, which would register the norm a second time and rename it in the state dict.
        object.__setattr__(block.attn2, "query_norm", block.norm2)


class TemporalTransformer(nn.Module):
    """Transformer block over frames: feed-forward, self-attention over time, cross-attention, feed-forward.

    Each part is residual and normalised before. All but the self-attention act on single tokens, and it finds the
    frames of a pixel where they are: of one clip nothing is copied into another order.
    """

    inner = True
    recompute: Recompute | None = None

    def __init__(self, width: int, heads: int, head_width: int, context_width: int | None) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(width)
        self.ff_in = FeedForward(width, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = FrameAttention(width, heads=heads, dim_head=head_width)
        self.norm2 = None if context_width is None else nn.LayerNorm(width)
        self.attn2 = None if context_width is None else Attention(width, context_width, heads, dim_head=head_width)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width, activation_fn="geglu")
        zero_(self.ff_in.net[-1], self.attn1.to_out, self.ff.net[-1])
        divide(self.ff_in, self.norm_in)
        divide(self.ff, self.norm3)
        if self.attn2 is not None:
            zero_(self.attn2.to_out)
            constant_when_single(self)

    def forward(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        """Tokens (B,F,N,C) and the context (B,L,D) of each clip's first frame to (B,F,N,C)."""
        output: Tensor = run(self, self._parts, hidden, context)
        return output

    def _parts(self, hidden: Tensor, context: Tensor | None) -> Tensor:
        hidden = hidden + self.ff_in(self.norm_in(hidden))
        hidden = hidden + self.attn1(self.norm1(hidden))
        if self.attn2 is not None and self.norm2 is not None and context is not None:
            hidden = hidden + self._to_context(hidden, self.attn2, self.norm2, context)
        return hidden + self.ff(self.norm3(hidden))

    @staticmethod
    def _to_context(hidden: Tensor, attention: nn.Module, norm: nn.Module, context: Tensor) -> Tensor:
        """Cross-attention of all tokens of a clip to its one context: (B,F,N,C), or (B,1,1,C) if they are equal."""
        constant = attention.constant(context) if isinstance(attention, ContextAttention) else None
        if constant is not None:
            return constant.unsqueeze(1)  # (B, 1, 1, C)
        tokens = norm(hidden).flatten(1, 2)  # (B, F*N, C)
        output: Tensor = attention(tokens, context)  # (B, F*N, C)
        return output.unflatten(1, hidden.shape[1:3])  # (B, F, N, C)


class TransformerTime(nn.Module):
    """What the temporal blocks of one transformer share: the embedding of frame numbers, and the mix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.position = TimestepEmbedding(width, 4 * width, out_dim=width)
        self.mix = mix_parameter()
        self.width = width
        zero_(self.position.linear_2)

    def positions(self, frames: int) -> Tensor:
        """Embeddings (F,1,C) of the frame numbers 0 to F-1."""
        number = torch.arange(frames, device=self.mix.device)
        waves = get_timestep_embedding(number, self.width, flip_sin_to_cos=True, downscale_freq_shift=0)  # (F, C)
        embedding: Tensor = self.position(waves.to(self.mix.dtype))  # (F, C)
        return embedding.unsqueeze(1)  # (F, 1, C)


class VideoResnet(ResnetBlock2D):
    """A 2D residual block followed by a temporal layer; both are recomputed together under checkpointing."""

    clip: Clip
    recompute: Recompute | None = None
    compiled: Compiled | None = None
    temporal: nn.Module | None
    free: FreeU | None = None
    """What FreeU does to features and skip connection before they are joined."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        """(B*F,C,H,W) features, of which `skip` may be the last channels, and (B*F,E) embedding to (B*F,C',H',W')."""
        output: Tensor = run(self, self._both, input_tensor, temb, skip)
        return output

    def image(self, hidden: Tensor, time: Tensor | None = None) -> Tensor:
        """The 2D residual block alone: (N,C,H,W) features and (N,E) time embedding to (N,C',H',W')."""
        output: Tensor = super().forward(hidden, time)
        return output

    def _both(self, hidden: Tensor, time: Tensor | None, skip: Tensor | None) -> Tensor:
        if skip is not None and self.free is not None:
            hidden, skip = freed(hidden, skip, self.free)
        joined = hidden if skip is None else join(hidden, skip)  # (B*F, C, H, W)
        hidden = self.image(joined, time)  # (B*F, C', H', W')
        state = self.clip.state
        if self.temporal is None or state.bypass:
            return hidden
        output: Tensor = self.temporal(hidden, time, state)  # (B*F, C', H', W')
        return output


class SpatialBlock(BasicTransformerBlock):
    """A 2D transformer block of a video transformer: a sub-block of what is recomputed."""

    inner = True
    recompute: Recompute | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Tokens (B*F,N,C) and per-frame context (B*F,L,D) to (B*F,N,C)."""

        def spatial(hidden: Tensor, context: Any) -> Any:
            return super(SpatialBlock, self).forward(hidden, attention_mask, context, *args, **kwargs)

        output: Tensor = run(self, spatial, hidden_states, encoder_hidden_states)
        return output


class VideoBlock(SpatialBlock):
    """A 2D transformer block followed by a temporal one."""

    clip: Clip
    shared: TransformerTime
    temporal: TemporalTransformer

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Tokens (B*F,N,C) and per-frame context (B*F,L,D) to (B*F,N,C)."""
        hidden = super().forward(hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
        state = self.clip.state
        if state.bypass:
            return hidden
        spatial = hidden.unflatten(0, (-1, state.frames))  # (B, F, N, C)
        context = self._first_context(encoder_hidden_states, state)
        temporal = self.temporal(spatial + self.shared.positions(state.frames), context)  # (B, F, N, C)
        share = torch.sigmoid(-self.shared.mix)
        return mix(spatial, temporal, share, state.image_only).flatten(0, 1)  # (B*F, N, C)

    @staticmethod
    def _first_context(context: Any, state: ClipState) -> Tensor | None:
        """The text (B,L,D) of the first frame of each clip, if any; image adapters send it as the first of a pair."""
        if isinstance(context, tuple):
            context = context[0]
        if context is None:
            return None
        first: Tensor = context.unflatten(0, (-1, state.frames))[:, 0]  # (B, L + image tokens, D)
        text = first[:, : first.shape[1] - state.image_tokens]  # (B, L, D)
        return text if text.shape[1] else None


class VideoTransformer(Transformer2DModel):
    """A 2D transformer with `VideoBlock`s in it or a temporal layer after it, recomputed as a whole if checkpointed.

    `temporal` is what its video blocks share, or the layer after it.
    """

    clip: Clip
    recompute: Recompute | None = None
    compiled: Compiled | None = None
    temporal: nn.Module | None

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        """(B*F,C,H,W) features and per-frame context (B*F,L,D) to (B*F,C,H,W)."""
        return run(self, self._both, hidden_states, encoder_hidden_states, args, kwargs)

    def _both(self, hidden: Tensor, context: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._followed(super().forward(hidden, context, *args, **kwargs))

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        """The last projection of tokens (N,H*W,C), added to the features (N,C,H,W) in whatever order those lie."""
        if not self.use_linear_projection:  # in another order a convolution would round otherwise than the parent's
            output: Tensor = super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
            return output
        return residual + self.proj_out(hidden_states).transpose(1, 2).unflatten(2, (height, width))  # (N, C, H, W)

    def _followed(self, output: Any) -> Any:
        """The 2D output, of which the features (B*F,C,H,W) are the first part, after the temporal layer."""
        state = self.clip.state
        if self.temporal is None or isinstance(self.temporal, TransformerTime) or state.bypass:
            return output
        hidden = self.temporal(output[0], None, state)  # (B*F, C, H, W)
        return (hidden,) if isinstance(output, tuple) else type(output)(sample=hidden)


class VideoUpsample(Upsample2D):
    """2D upsampling, recomputed under checkpointing if it learns: its convolution keeps the enlarged input."""

    clip: Clip
    recompute: Recompute | None = None
    spare_rows: int = 0
    """Rows above and below that downsampling was given beyond its one of padding, and that are taken off again."""

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """(N,C,H,W) features to (N,C',2H,2W), or to `output_size`; with spare rows, to two rows less for each."""
        learns = any(parameter.requires_grad for parameter in self.parameters())
        enlarge = partial(self.image, output_size=output_size)
        output: Tensor = run(self, enlarge, hidden_states) if learns else enlarge(hidden_states)
        return output

    def image(self, hidden: Tensor, output_size: Any = None) -> Tensor:
        """The same, whatever is recomputed."""
        if self.spare_rows:
            enlarged = functional.interpolate(hidden, scale_factor=2.0, mode="nearest")  # (N, C, 2H, 2W)
            output: Tensor = self.conv(enlarged[:, :, self.spare_rows : -self.spare_rows])
            return output
        output = super().forward(hidden, output_size)
        return output


class VideoConvOut(nn.Conv2d):
    """The last 2D convolution of a decoder, followed by a temporal one over the pixels.

    It keeps its input as PyTorch's does: adversarial training asks for the gradient of its weights while they are
    frozen, which a recomputation could not know.
    """

    clip: Clip
    temporal: TemporalConv

    def forward(self, input: Tensor) -> Tensor:
        """(B*F,C,H,W) features to (B*F,3,H,W) pixels."""
        pixels = self.image(input)  # (B*F, 3, H, W)
        state = self.clip.state
        return pixels if state.bypass else self.over_time(pixels, state.frames)

    def image(self, input: Tensor) -> Tensor:
        """The 2D convolution alone: (N,C,H,W) features to (N,3,H,W) pixels."""
        return super().forward(input)

    def over_time(self, pixels: Tensor, frames: int) -> Tensor:
        """The temporal convolution alone, over clips of `frames`: (B*F,3,H,W) pixels."""
        video = pixels.unflatten(0, (-1, frames)).transpose(1, 2)  # (B, 3, F, H, W)
        return self.temporal(video).transpose(1, 2).flatten(0, 1)  # (B*F, 3, H, W)


def inflate_resnet(resnet: ResnetBlock2D, clip: Clip, temporal: nn.Module | None) -> None:
    """Turn a 2D residual block into a `VideoResnet` in place."""
    convolutions_within(resnet)
    resnet.temporal = None if temporal is None else like(temporal, resnet)
    become(resnet, VideoResnet, clip)


def inflate_transformer(
    transformer: Transformer2DModel, clip: Clip, temporal: nn.Module | None, blocks: int = 0
) -> None:
    """Turn a 2D transformer into a `VideoTransformer` in place, and its last `blocks` blocks into `VideoBlock`s.

    `temporal` is the layer after it or, with video blocks, the `TransformerTime` that they share.
    """
    convolutions_within(transformer)
    transformer.temporal = None if temporal is None else like(temporal, transformer)
    become(transformer, VideoTransformer, clip)
    for spatial in transformer.transformer_blocks:
        constant_when_single(spatial)
        spatial.__class__ = SpatialBlock
        divide(spatial.ff, spatial.norm3)
    for spatial in list(transformer.transformer_blocks)[len(transformer.transformer_blocks) - blocks :]:
        _inflate_block(spatial, clip, transformer.temporal)


def inflate_upsample(upsample: Upsample2D, clip: Clip) -> None:
    """Turn 2D upsampling into a `VideoUpsample` in place."""
    convolutions_within(upsample)
    become(upsample, VideoUpsample, clip)


def inflate_conv_out(convolution: nn.Conv2d, clip: Clip) -> None:
    """Turn the last convolution of a decoder into a `VideoConvOut` in place."""
    temporal = TemporalConv(convolution.out_channels)
    temporal.identity_()
    convolution.temporal = like(temporal, convolution)
    become(convolution, VideoConvOut, clip)


def _inflate_block(block: BasicTransformerBlock, clip: Clip, shared: TransformerTime) -> None:
    heads, width = block.num_attention_heads, block.attention_head_dim
    block.temporal = like(TemporalTransformer(block.dim, heads, width, block.cross_attention_dim), block)
    # Set past nn.Module: the transformer owns the shared layer, a block only reads it.
    object.__setattr__(block, "shared", shared)
    become(block, VideoBlock, clip)


def become(module: nn.Module, kind: type[nn.Module], clip: Clip) -> None:
    """Turn a 2D layer into its subclass `kind`, in place, and let it see `clip`."""
    module.__class__ = kind
    setattr(module, "clip", clip)  # noqa: B010 -- a plain attribute, which mypy takes for a tensor
