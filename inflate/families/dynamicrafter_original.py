"""DynamiCrafter in the original's single file: which tensors are whose, read and written.

The files of VideoCrafter have the same parts: those of its text-to-video lack the image's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.families import dynamicrafter_keys as keys
from inflate.families.dynamicrafter import Clips
from inflate.models import exchange, open_clip, schedule_buffers, single_file, single_file_text
from inflate.models.original_names import size_of
from inflate.models.original_video_names import FPS, LVDM, layout_of
from inflate.models.stable_diffusion import noise_of
from inflate.models.text_encoders import TextEncoders
from inflate.models.unet import DYNAMICRAFTER, MODELSCOPE, TemporalSpec, VideoUNet
from inflate.objectives import BETA_END, BETA_START, DDPM

log = logging.getLogger(__name__)

HEAD_WIDTH = 64
"""Channels of a head of the published query transformers, which their tensors do not tell."""
BY_STRIDE = Clips(height=256, width=256, told="stride", number=3.0)
"""The clips of the published model that is told the stride."""
BY_SCALE = {
    0.7: Clips(height=320, width=512, number=24.0),
    0.3: Clips(height=576, width=1024, number=10.0),
}
"""The clips of the others, by how far their clean latents are rescaled."""
UNTOLD = {
    True: DDPM("epsilon"),
    False: DDPM("v_prediction", zero_terminal_snr=True, base_scale=0.7),
}
"""The objective of the published models that are told the stride, or the frame rate, for files without a schedule."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Original:
    """The tensors of a file, as precise as saved. The networks made of them are in float32."""

    origin: Path
    tensors: Tensors
    """by the names of today's files, without what nothing uses"""
    idle: tuple[str, ...]
    """what nothing uses"""
    stride: bool
    """whether the UNet is told the stride"""

    @classmethod
    def read(cls, file: Path, read: exchange.Read = exchange.read_saved) -> Self:
        """The tensors of a file; CheckpointError, listing them, where some are of no known part."""
        saved = read(file)
        tensors = keys.plain(saved)
        surplus = [key for key in tensors if not key.startswith(keys.PARTS) and key not in schedule_buffers.NAMES]
        if surplus:
            raise CheckpointError(
                f"{file} holds tensors of no known part: {exchange.listing(surplus)}; nothing was loaded"
            )
        stride = any(keys.STRIDE in key or key.endswith(keys.GATE) for key in saved)
        used = {key: tensor for key, tensor in tensors.items() if not key.startswith(keys.IDLE)}
        return cls(file, used, tuple(key for key in tensors if key not in used), stride)

    @property
    def has_image(self) -> bool:
        """Whether its UNet attends to an image, as that of text-to-video does not."""
        return keys.attends_to_image(self.tensors)

    def load_unet(self) -> VideoUNet:
        """The UNet with its query transformer; CheckpointError, listing tensors, where it is not whole."""
        return unet_of(self.tensors, str(self.origin))

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder; CheckpointError, listing tensors, where it is not whole."""
        return single_file.load_vae(self.origin, lambda _: dict(self.tensors))

    def load_text(self, tokenizer: str | Path | None) -> TextEncoders:
        """The text encoder with the tokenizer in a folder; CheckpointError where one is missing or not whole."""
        if not any(key.startswith(keys.TEXT_ENCODER) for key in self.tensors):
            raise CheckpointError(f"{self.origin} holds no text encoder ({keys.TEXT_ENCODER}*): use a file with all parts")
        return single_file_text.load_text_encoders(self.origin, tokenizer, lambda _: dict(self.tensors))

    def load_image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder; CheckpointError where there is none, or not a whole one of a known width."""
        own = keys.part(self.tensors, keys.IMAGE_ENCODER)
        if not own:
            raise CheckpointError(
                f"{self.origin} holds no image encoder ({keys.IMAGE_ENCODER}*): give its folder as image_encoder"
            )
        return open_clip.load_image_encoder(exchange.in_float32(own), str(self.origin))

    @property
    def objective(self) -> DDPM:
        """What the model was trained with, as its saved schedule tells; the log warns where that is untold or odd."""
        objective = schedule_buffers.told(self.tensors, str(self.origin))
        if objective is None:
            objective = UNTOLD[self.stride]
            log.warning("%s holds no noise schedule (%s): %s is taken, that of the published model", self.origin,
                        schedule_buffers.SIGNAL, objective)  # fmt: skip
        return objective

    @property
    def noise(self) -> DDIMScheduler:
        """The noise schedule, as a DDIM sampler's settings: its steps begin where those of the original do."""
        objective = self.objective
        settings: dict[str, Any] = {
            "num_train_timesteps": 1000, "beta_start": BETA_START, "beta_end": BETA_END,
            "beta_schedule": "scaled_linear", "prediction_type": objective.prediction,
            "rescale_betas_zero_snr": objective.zero_terminal_snr, "steps_offset": 1, "set_alpha_to_one": False,
        }  # fmt: skip
        return noise_of(settings, self.origin)

    @property
    def clips(self) -> Clips:
        """What the clips were: as a file of ours tells, else as those of the published model of the same schedule."""
        told = exchange.told_by(self.origin).get("clips")
        if told is not None:
            return Clips(**told)
        clips = BY_STRIDE if self.stride else BY_SCALE.get(self.objective.base_scale, Clips())
        latents = size_of(self.tensors, f"{keys.IMAGE_PROJ}latents", 1) if self.has_image else 0
        return replace(clips, frames=latents // keys.QUERIES) if latents > keys.QUERIES else clips


def spec(width: int) -> TemporalSpec:
    """The layers of a UNet that is told the frame rate, or stride, by an embedding of that width."""
    return replace(DYNAMICRAFTER, added_id_dim=width)


def unet_of(tensors: Tensors, origin: str, head_width: int = HEAD_WIDTH) -> VideoUNet:
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
