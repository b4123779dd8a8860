"""DynamiCrafter (Xing et al., 2310.12190): image and text to video, loading, conditioning, export.

The UNet of a text-to-video model sees an image twice: as tokens in cross-attention, which its query transformer makes
of what CLIP tells of each patch, and as a latent beside the noisy latents of every frame (visual detail guidance). A
model of the first two training stages has the tokens alone. `DynamiCrafter.condition` is the one function that builds
the condition, for training and for sampling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError, ConfigError, InflateError
from inflate.layers.image_context import ImageContext
from inflate.models import folders
from inflate.models.animators import Animator, AnimatorEncoders, ImageEncoding
from inflate.models.conditions import Batched, left_out
from inflate.models.image_encoders import shown
from inflate.models.moments import LatentMoments
from inflate.models.stable_diffusion import TextToVideo
from inflate.models.text_encoders import TextCondition
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet
from inflate.objectives import Predict

FAMILY = "dynamicrafter"
Told = Literal["fps", "stride"]


@dataclass(frozen=True)
class Clips(TrainedClips):
    """What the clips of training were; their frames per second are those of the files that are written."""

    family: ClassVar[str] = FAMILY

    told: Told = "fps"
    """what the UNet is told of a clip: fps = its frames per second, fewer of which are more motion; stride = how many
    frames of the source lie between two of its own"""
    number: float | None = None
    """what it is told unless asked otherwise; none: the frames per second above, or a stride of 1"""
    interpolation: bool = False
    """whether it was trained to go from a first to a last frame"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.told not in get_args(Told):
            raise ConfigError(f"clips.told={self.told}: fps or stride")
        if not 0 < self.usual < math.inf:
            raise ConfigError(f"clips.number={self.number}: must be positive")

    @property
    def usual(self) -> float:
        """What the UNet is told unless asked otherwise."""
        if self.number is not None:
            return self.number
        return self.fps if self.told == "fps" else 1.0

    def numbers(self, fps: Tensor, stride: Tensor) -> Tensor:
        """What the UNet is told (B,), in whole numbers, of clips of such rates and strides, each (B,)."""
        return (fps if self.told == "fps" else stride).floor()


@dataclass(frozen=True)
class Condition(Batched):
    """All that the UNet is given beside the noisy clips."""

    text: Tensor
    """what the text encoder tells of the prompts, (B, L, D)"""
    image: Tensor | None
    """what CLIP tells of the image, (B, P, E); none: no image in cross-attention"""
    detail: Tensor | None
    """latents beside the noisy ones, (B, F, C, h, w), where the UNet takes them"""
    number: Tensor
    """the frame rate or the stride, (B,)"""
    tokens: Tensor | None = None
    """what the query transformer made of `image`, in its place: (B, F, T, D) or, shared by all frames, (B, T, D)"""

    def drop(
        self,
        draw: Tensor,
        no_text: Tensor,
        no_image: Tensor,
        text: float = 0.05,
        both: float = 0.05,
        image: float = 0.05,
    ) -> Condition:
        """Nothing in place of each clip's text alone, of its image alone or of both, by its uniform draw (B,).

        The detail latent and the number stay. `no_text` (1, L, D) and `no_image` (1, P, E) stand for nothing. The three
        rates are probabilities, by default those of the published training; ConfigError where they exceed 1 together or
        one is negative, InflateError where the image is tokens already.
        """
        if self.tokens is not None:
            raise InflateError("image tokens cannot be left out: drop before they are made, of the image's features")
        without_text, without_image = left_out(draw, text, both, image)
        kept = torch.where(without_text, no_text.to(self.text), self.text)
        shown = self.image
        if shown is not None:
            shown = torch.where(without_image, no_image.to(shown), shown)
        return replace(self, text=kept, image=shown)


class PatchEncoding(ImageEncoding):
    """What a model makes of frames, prompts and images, which it is told patch by patch."""

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """What CLIP tells of images (B, 3, H, W) in [-1, 1]: the last states (B, P, E), before the norm, of its class
        token and of all patches."""
        pixels = shown(self.image_encoder, images, self.image_mean, self.image_std)
        states: Tensor = self.image_encoder(pixels, output_hidden_states=True).hidden_states[-1]
        return states  # (B, P, E)

    def null_image(self) -> Tensor:
        """What CLIP tells of no image, which is a grey one: (1, P, E)."""
        size = self.image_encoder.config.image_size
        return self.embed_image(torch.zeros(1, 3, size, size, device=self.image_encoder.device))


class Encoders(PatchEncoding, AnimatorEncoders):
    """The frozen networks without a UNet."""

    clips = Clips


@dataclass
class DynamiCrafter(Animator, PatchEncoding):
    """A model that animates an image by a prompt: its networks, its noise schedule, and what its clips were."""

    encoders = Encoders

    clips: Clips
    moments: LatentMoments | None = None
    """of the scaled latents of training; none: not measured"""

    def __post_init__(self) -> None:
        super().__post_init__()
        context = self.unet.image_context
        if context is None:
            raise CheckpointError("the UNet attends to no image: give it an image context")
        embedding = self.image_encoder.config.hidden_size
        if context.embedding != embedding:
            raise CheckpointError(
                f"the image encoder has {embedding} dimensions but the query transformer takes {context.embedding}"
            )
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels not in (channels, 2 * channels):
            raise CheckpointError(
                f"the UNet takes {self.unet.config.in_channels} channels: {channels} without and {2 * channels} with "
                "the image's latent are known"
            )

    @classmethod
    def _remembered(cls, file: Path) -> Mapping[str, Any]:
        return {**super()._remembered(file), "moments": LatentMoments.told(folders.read_json(file))}

    @classmethod
    def from_text_to_video(
        cls,
        model: TextToVideo,
        image_encoder: CLIPVisionModelWithProjection,
        clips: Clips,
        context: ImageContext | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> Self:
        """A text-to-video model that attends to an image, too, whose networks are taken over.

        With a `context` the UNet is given it, born with no effect; without, it has one. `statistics` are the image
        encoder's `image_mean` and `image_std`, where they are not CLIP's own.
        """
        if context is not None:
            model.unet.add_image_context(context)
        return cls(
            model.unet, model.vae, model.text, model.noise, clips, image_encoder, **(statistics or {}),
            base_scale=model.base_scale,
        )  # fmt: skip

    @property
    def takes_detail(self) -> bool:
        """Whether the UNet takes the image's latent beside the noisy ones."""
        return bool(self.unet.config.in_channels > self.vae.config.latent_channels)

    def take_detail(self) -> None:
        """Let the UNet take the image's latent and be told the frame rate, in place; born without effect of either."""
        if not self.takes_detail:
            self.unet.widen(2 * self.vae.config.latent_channels)
        if not self.unet.spec.added_ids:
            self.unet.add_ids(1, self.unet.config.block_out_channels[0])

    def condition(
        self,
        text: TextCondition,
        image: Tensor | None,
        number: Tensor,
        first: Tensor | None = None,
        frames: int | None = None,
        last: Tensor | None = None,
    ) -> Condition:
        """The condition on prompts, on what CLIP tells of an image (B, P, E) and on latents of frames (B, C, h, w).

        The first frame's latent is repeated for each of so many frames; with a last one, each stands at its end, and
        between them is nothing (interpolation; of a loop both are the same). InflateError where the UNet takes latents
        and there are none.
        """
        detail = None
        if self.takes_detail:
            if first is None or frames is None:
                raise InflateError("this model takes the latent of its image: give it, and the number of frames")
            detail = repeated(first, frames) if last is None else ends(first, last, frames)
        return Condition(text.context, image, detail, number)

    def predict(self, condition: Condition, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a condition.

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed, as it is for a clip of one frame.
        """
        return predictor(self.unet, condition, unet, image_only)

    def with_tokens(self, condition: Condition, frames: int) -> Condition:
        """A condition whose image is already what the query transformer makes of it: the same in every step."""
        if condition.image is None:
            return condition
        image = condition.image.to(self.unet.dtype)
        return replace(condition, image=None, tokens=self.unet.image_tokens_of(image, frames))

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept of the model beside its parts, as JSON values."""
        return {**super().settings, "latent_moments": asdict(self.moments) if self.moments else None}


def repeated(latent: Tensor, frames: int) -> Tensor:
    """The latent (B, C, h, w) of an image for every frame of its clip: (B, F, C, h, w)."""
    return latent[:, None].expand(-1, frames, -1, -1, -1)


def ends(first: Tensor, last: Tensor, frames: int) -> Tensor:
    """The latents (B, C, h, w) of a first and a last frame at the ends of a clip, exact zeros between: (B, F, C, h, w).

    ConfigError for fewer than two frames.
    """
    if frames < 2:
        raise ConfigError(f"a clip of {frames} frame has no two ends: give at least 2 frames")
    latents = first.new_zeros(len(first), frames, *first.shape[1:])
    latents[:, 0], latents[:, -1] = first, last
    return latents


def predictor(
    unet: VideoUNet, condition: Condition, network: nn.Module | None = None, image_only: bool = False
) -> Predict:
    """A UNet's prediction of noisy clips, by its wrapped form (`network`) where there is one.

    The latents beside the noisy ones join their channels. The temporal layers pass clips of one frame, and those that
    are `image_only`.
    """
    called = unet if network is None else network

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        marks = unet.all_images(noisy) if image_only or noisy.shape[1] == 1 else None
        sample = noisy if condition.detail is None else torch.cat([noisy, condition.detail.to(noisy)], dim=2)
        ids = condition.number.to(noisy)[:, None] if unet.spec.added_ids else None  # (B, 1)
        image, text = _image(condition, noisy.dtype), condition.text.to(noisy.dtype)
        output: Tensor = called(sample, timestep, text, ids, image_only=marks, **image).sample
        return output  # (B, F, C, h, w)

    return predict


def _image(condition: Condition, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the UNet is given of the image in cross-attention."""
    if condition.tokens is not None:
        return {"image_tokens": condition.tokens.to(dtype)}
    return {} if condition.image is None else {"image_features": condition.image.to(dtype)}
