"""Up blocks of a 2D UNet whose residual blocks join the skip connections themselves.

A residual block that is recomputed keeps its input. Joined before it, each skip connection would be kept a second time
beside the down path, which keeps it as the input of a layer of its own: handed over apart, it is the same tensor.
Likewise, the gradients of features and skip connection part at once: the latter's, which waits for the down path, would
keep the former's memory.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn


class _Join(torch.autograd.Function):
    """Concatenation of channels whose gradients are copies, not views of the joint one."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, skip: Tensor) -> Tensor:
        ctx.sizes = hidden.shape[1], skip.shape[1]
        return torch.cat([hidden, skip], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = gradients[0].split(ctx.sizes, 1)
        return tuple(part.clone() if wanted else None for part, wanted in zip(parts, ctx.needs_input_grad, strict=True))


def join(hidden: Tensor, skip: Tensor) -> Tensor:
    """Features (N,C,h,w) and a skip connection (N,D,h,w) as (N,C+D,h,w)."""
    joined: Tensor = _Join.apply(hidden, skip)
    return joined


def _upwards(
    block: Any, hidden: Tensor, skips: tuple[Tensor, ...], time: Tensor | None, size: Any, **attending: Any
) -> Tensor:
    """Features (N,C,h,w) through a block's layers, the last skip connection first, to (N,C',2h,2w) or, last, h, w."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    for resnet, attention, skip in zip(block.resnets, attentions, reversed(skips), strict=True):
        hidden = fitting(hidden, skip)  # (N, C, h, w)
        hidden = resnet(hidden, time, skip)  # (N, C', h, w)
        hidden = hidden if attention is None else attention(hidden, return_dict=False, **attending)[0]
    for upsample in block.upsamplers or ():
        hidden = upsample(hidden, size)  # (N, C', 2h, 2w)
    return hidden


def fitting(hidden: Tensor, skip: Tensor) -> Tensor:
    """Features as large as a skip connection, of (N,C,h or h+1,w or w+1): upsampling with spare rows doubles odd sizes,
    too, each of which downsampling had rounded up."""
    height, width = skip.shape[2:]
    return hidden if hidden.shape[2:] == skip.shape[2:] else hidden[:, :, :height, :width]


def _is_free(block: nn.Module) -> bool:
    """Whether FreeU, which alters features and skip connections before they are joined, is switched on."""
    return all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2"))


class VideoUpBlock(UpBlock2D):
    """A 2D up block without transformers."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """(B*F,C,h,w) features and as many skip connections as residual blocks to (B*F,C',2h,2w), or h, w."""
        given = hidden_states, res_hidden_states_tuple, temb, upsample_size
        if _is_free(self):
            output: Tensor = super().forward(*given, *args, **kwargs)
            return output
        return _upwards(self, *given)


class VideoCrossAttnUpBlock(CrossAttnUpBlock2D):
    """A 2D up block with transformers."""

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """(B*F,C,h,w) features and as many skip connections as residual blocks to (B*F,C',2h,2w), or h, w."""
        attending = {
            "encoder_hidden_states": encoder_hidden_states,
            "cross_attention_kwargs": cross_attention_kwargs,
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
        }
        if _is_free(self):
            given = {"upsample_size": upsample_size, **attending}
            output: Tensor = super().forward(hidden_states, res_hidden_states_tuple, temb, **given)
            return output
        return _upwards(self, hidden_states, res_hidden_states_tuple, temb, upsample_size, **attending)


def inflate_up_block(block: nn.Module) -> None:
    """Turn a 2D up block into its video counterpart, in place; others stay as they are."""
    if type(block) is UpBlock2D:
        block.__class__ = VideoUpBlock
    elif type(block) is CrossAttnUpBlock2D:
        block.__class__ = VideoCrossAttnUpBlock
