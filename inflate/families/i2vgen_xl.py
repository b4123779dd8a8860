"""I2VGen-XL (Zhang et al., 2311.04145), its base stage: image and text to video, loading, conditioning, export.

Three models go by that name. The one released as `i2vgen_xl` with VGen is told text, image and frame rate; that of the
paper image and frame rate alone (clips without a prompt), and ModelScope's Image-to-Video of August 2023 CLIP's tokens
and the frame rate alone (`Hierarchy` without its two encoders of latents). All of them are loaded here. The refinement
stage is `inflate.families.i2vgen_xl_refiner`.

`I2VGenXL.condition` is the one function that builds the condition, for training and for sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError, InflateError
from inflate.layers.hierarchy import Hierarchy, Part
from inflate.models.animators import Animator, AnimatorEncoders, ImageEncoding
from inflate.models.conditions import Batched, left_out
from inflate.models.image_encoders import shown_squarely
from inflate.models.stable_diffusion import TextToVideo
from inflate.models.text_encoders import TextCondition
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet
from inflate.objectives import Predict

FAMILY = "i2vgen_xl"
NEGATIVE = (
    "Distorted, discontinuous, Ugly, blurry, low resolution, motionless, static, disfigured, disconnected limbs, "
    "Ugly faces, incomplete arms"
)
"""The prompt that the released weights are led away from, and that VGen tells in place of none (`Clips.negative`)."""


@dataclass(frozen=True)
class Clips(TrainedClips):
    """What the clips of training were; the UNet is told their frames per second."""

    family: ClassVar[str] = FAMILY

    prompts: bool = True
    """whether the UNet is told prompts; otherwise the image alone"""
    negative: str = ""
    """prompt that stood for none in training, and that guidance leads away from"""


@dataclass(frozen=True)
class Condition(Batched):
    """All that the UNet is given beside the noisy clips."""

    text: Tensor
    """what the text encoder tells of the prompts, (B, L, D); of no prompts L is 0"""
    latents: Tensor | None
    """of first frames, (B, C, h, w), where the UNet takes them"""
    embedding: Tensor | None
    """CLIP's of first frames, (B, 1, E); none: no tokens of it"""
    fps: Tensor
    """frames per second, (B,)"""
    left_out: tuple[Part, ...] = ()
    """parts of the first frame that the UNet is not told: detail, global or clip"""
    image_share: float = 1.0
    """what the first frame's tokens weigh beside the text's; 1: as published"""

    def drop(
        self, draw: Tensor, no_text: Tensor, text: float = 0.05, both: float = 0.05, image: float = 0.05
    ) -> Condition:
        """Nothing in place of each clip's text alone, of CLIP's embedding alone or of both, by its uniform draw (B,).

        Nothing is `no_text` (1, L, D), which is the negative prompt's where the model was trained with one, and an
        embedding of zeros. Latents and frame rate stay. The three rates are probabilities; how the released model was
        trained is not known. ConfigError where they exceed 1 together or one is negative.
        """
        without_text, without_image = left_out(draw, text, both, image)
        kept, embedding = self.text, self.embedding
        if kept.shape[1]:
            kept = torch.where(without_text, no_text.to(kept), kept)
        if embedding is not None:
            embedding = embedding.masked_fill(without_image, 0.0)
        return replace(self, text=kept, embedding=embedding)

    def unguided(self, text: Tensor) -> Condition:
        """What guidance leads away from: another text (B, L, D) and an embedding of zeros, all else as it is."""
        embedding = None if self.embedding is None else torch.zeros_like(self.embedding)
        return replace(self, text=text, embedding=embedding)


class FirstFrameEncoding(ImageEncoding):
    """What a model makes of frames, prompts and first frames, which it is told as a whole."""

    @torch.no_grad()
    def embed_image(self, images: Tensor) -> Tensor:
        """CLIP's embedding (B, 1, E), not normalised, of the central square of images (B, 3, H, W) in [-1, 1]."""
        pixels = shown_squarely(self.image_encoder, images, self.image_mean, self.image_std)
        embedding: Tensor = self.image_encoder(pixels).image_embeds
        return embedding[:, None]  # (B, 1, E)


class Encoders(FirstFrameEncoding, AnimatorEncoders):
    """The frozen networks without a UNet."""

    clips = Clips


@dataclass
class I2VGenXL(Animator, FirstFrameEncoding):
    """A model that animates an image by a prompt: its networks, its noise schedule, and what its clips were."""

    encoders = Encoders

    clips: Clips

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.vae.config.latent_channels
        check_hierarchy(self.unet, channels, int(self.image_encoder.config.projection_dim))

    @classmethod
    def from_text_to_video(
        cls,
        model: TextToVideo,
        image_encoder: CLIPVisionModelWithProjection,
        clips: Clips,
        hierarchy: Hierarchy | None = None,
        statistics: Mapping[str, Any] | None = None,
    ) -> Self:
        """A text-to-video model, such as an image model freshly inflated, that is told first frames and frame rates.

        Its networks are taken over. With a `hierarchy` the UNet is given it; without, it has one. What the UNet is told
        is born without effect, but for tokens: until they have learned, weigh them less (`Condition.image_share`).
        `statistics` are the image encoder's `image_mean` and `image_std`, where they are not CLIP's own.
        """
        if hierarchy is not None:
            model.unet.add_hierarchy(hierarchy)
        if not model.unet.spec.added_ids:
            model.unet.add_ids(1, model.unet.config.block_out_channels[0])
        return cls(
            model.unet, model.vae, model.text, model.noise, clips, image_encoder, **(statistics or {}),
            base_scale=model.base_scale,
        )  # fmt: skip

    @property
    def hierarchy(self) -> Hierarchy:
        """Which parts of first frames the UNet is told."""
        hierarchy = self.unet.hierarchy
        assert hierarchy is not None  # as checked when the model was made
        return hierarchy

    def condition(
        self, text: TextCondition | None, latents: Tensor | None, embedding: Tensor | None, fps: Tensor
    ) -> Condition:
        """The condition on prompts (none: on the image alone), on the latents (B, C, h, w) of first frames, on CLIP's
        embedding of them (B, 1, E) and on frame rates (B,).

        What the UNet does not take is left away; InflateError where it takes latents and there are none.
        """
        own = self.hierarchy
        if own.takes_latents and latents is None:
            raise InflateError("this model takes the latents of first frames: give them")
        context = fps.new_zeros(len(fps), 0, self.text.width) if text is None else text.context
        kept, seen = latents if own.takes_latents else None, embedding if own.clip_tokens else None
        return Condition(context, kept, seen, fps)

    def predict(self, condition: Condition, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a condition.

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed, as it is for a clip of one frame.
        """
        called = self.unet if unet is None else unet

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            marks = self.unet.all_images(noisy) if image_only or noisy.shape[1] == 1 else None
            ids = condition.fps.to(noisy)[:, None] if self.unet.spec.added_ids else None  # (B, 1)
            told = {"image_latents": condition.latents, "image_embeddings": condition.embedding}
            given = {name: None if value is None else value.to(noisy) for name, value in told.items()}
            output: Tensor = called(
                noisy, timestep, condition.text.to(noisy), ids, image_only=marks, **given,
                left_out=condition.left_out, image_share=condition.image_share,
            ).sample  # fmt: skip
            return output  # (B, F, C, h, w)

        return predict


def check_hierarchy(unet: VideoUNet, channels: int, embedding: int) -> None:
    """CheckpointError where a UNet is not told first frames of such latents and CLIP embeddings."""
    own = unet.hierarchy
    if own is None:
        raise CheckpointError("the UNet is told no first frames: give it a hierarchy")
    if own.takes_latents and own.channels != channels:
        raise CheckpointError(f"the VAE has {channels} channels but the first frame's encoders take {own.channels}")
    if own.clip_tokens and own.embedding != embedding:
        raise CheckpointError(
            f"the image encoder embeds in {embedding} dimensions but the layers of its tokens take {own.embedding}"
        )
    needed = channels * (1 + own.detail_encoder)
    if unet.config.in_channels != needed:
        raise CheckpointError(
            f"the UNet takes {unet.config.in_channels} channels; with its hierarchy, {needed} are known"
        )
