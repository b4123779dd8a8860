"""A tiny video UNet whose temporal layers take part, and adapters trained on it for two steps."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from helpers import randomise, tiny_unet
from inflate.adapters import attach, targets, verify
from inflate.adapters.bases import sha256
from inflate.adapters.file import Adapter
from inflate.adapters.settings import AdapterSettings
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.surgery import inflate_unet

EVERYWHERE = ["temporal.attn1.to_*", "temporal.conv1", "attn1.to_q", "resnets.*.conv1"]
FLAT = ["temporal.attn1.to_*", "temporal.ff.*", "attn1.to_q", "resnets.*.conv1"]
"""Layers of each class that LoRA, and that LoKr and LoHa sit on."""


def video_unet(trained: bool = True) -> VideoUNet:
    """Stable Video Diffusion's layers, of one level each."""
    return copy.deepcopy(_video_unet(trained))


@cache
def _video_unet(trained: bool) -> VideoUNet:
    kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet, _ = inflate_unet(
        tiny_unet(True, block_out_channels=(16,), norm_num_groups=4, cross_attention_dim=8, **kinds),
        TemporalSpec(),
        in_channels=8,
    )
    if trained:
        randomise(unet)
    return unet.eval()


def settings(kind: Any = "lora", **changes: Any) -> AdapterSettings:
    layers = FLAT if kind in ("lokr", "loha") else EVERYWHERE
    return AdapterSettings(kind, **{"rank": 2, "alpha": 3.0, "targets": layers, **changes})


def output(unet: VideoUNet, tokens: int = 1) -> Tensor:
    with torch.no_grad():
        made: Tensor = unet(**targets.inputs(unet, tokens)).sample
    return made


def train(unet: VideoUNet, steps: int = 2, lr: float = 0.05) -> None:
    """Move what learns; every part of it gets a gradient."""
    optimizer = torch.optim.AdamW([parameter for parameter in unet.parameters() if parameter.requires_grad], lr=lr)
    for _ in range(steps):
        unet(**targets.inputs(unet, 1)).sample.square().mean().backward()
        learning = {name: parameter.grad for name, parameter in unet.named_parameters() if parameter.requires_grad}
        assert [name for name, gradient in learning.items() if gradient is None] == []
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Trained:
    """An adapter as it is kept, and what its UNet gave with it."""

    adapter: Adapter
    output: Tensor


def trained(kind: Any = "lora", **changes: Any) -> Trained:
    """An adapter whose tensors a test may change."""
    made = _trained(kind, **changes)
    return replace(made, adapter=copy.deepcopy(made.adapter))


@cache
def _trained(kind: Any, **changes: Any) -> Trained:
    unet, wanted = video_unet(), settings(kind, **changes)
    base = {"name": "tiny", "sha256": sha256(unet)}
    torch.manual_seed(5)
    attach.create(unet, wanted, targets.resolve(unet, wanted))
    train(unet)
    about = {"targets": wanted.targets, "family": "svd", "base": base, "reference": verify.reference(unet)}
    return Trained(attach.carried(unet, wanted, about), output(unet))


def adapted(kind: Any = "lora") -> VideoUNet:
    """A UNet that carries a trained adapter, which goes on learning."""
    unet = video_unet().requires_grad_(False)
    attach.load(unet, trained(kind).adapter)
    for name, value in unet.named_parameters():
        value.requires_grad_(f".{attach.SLOT}" in name)
    return unet
