"""DynamiCrafter, and VideoCrafter's text-to-video, in the original's single file: which tensors are whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from inflate.families import dynamicrafter_keys as keys
from inflate.models import exchange
from inflate.models.original_names import size_of
from inflate.models.original_video_names import FPS, LVDM, layout_of
from inflate.models.unet import DYNAMICRAFTER, MODELSCOPE, TemporalSpec, VideoUNet

HEAD_WIDTH = 64
"""Channels of a head of the published query transformers, which their tensors do not tell."""


def spec(width: int) -> TemporalSpec:
    """The layers of a UNet that is told the frame rate, or stride, by an embedding of that width."""
    return replace(DYNAMICRAFTER, added_id_dim=width)


def unet_of(tensors: Mapping[str, Tensor], origin: str, head_width: int = HEAD_WIDTH) -> VideoUNet:
    """The UNet of a file's tensors, in float32, with its query transformer, whose heads are so many channels wide.

    CheckpointError, listing the tensors, where one is missing, left over or of another shape.
    """
    own = {key: tensor for key, tensor in tensors.items() if key.startswith((keys.UNET, keys.IMAGE_PROJ))}
    diffusion = keys.part(own, keys.UNET)
    config, context = LVDM.config(diffusion), keys.image_context(own, head_width)
    told = {"image_context": context.to_dict()} if context else {}
    layers = spec(size_of(diffusion, FPS, 1)) if FPS in diffusion else MODELSCOPE
    unet = exchange.build_unet({**config, **told}, layers)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(keys.unet_names(wanted, layout_of(config)))
    exchange.adopt(unet, exchange.in_float32(exchange.convert(own, names, wanted, origin)))
    return unet


def unet_tensors(unet: VideoUNet) -> dict[str, Tensor]:
    """The tensors of a UNet, which share its memory, as a file has them; it must have LVDM's layers."""
    own = exchange.detached(unet)
    names = keys.unet_names(own, layout_of(unet.config))
    return exchange.convert(own, names, LVDM.shapes(exchange.shapes(unet), names), "this UNet")
