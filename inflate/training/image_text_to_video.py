"""Animating an image by a text, as DynamiCrafter does: what one step does, how it is measured and shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from inflate.data.buckets import Bucket
from inflate.errors import ConfigError
from inflate.families.dynamicrafter import Clips, Condition, DynamiCrafter, Told
from inflate.models import image_stream
from inflate.models.moments import LatentMoments
from inflate.models.unet import VideoUNet
from inflate.sampling.dynamicrafter import Sampling, sample
from inflate.training.animating import FEATURES, AnimatingTask
from inflate.training.captions import text_of
from inflate.training.denoising import Denoising, Given, check_drops
from inflate.training.held_out import size_of
from inflate.training.leakage import ConditionNoise
from inflate.training.noise import Noise
from inflate.training.player import Batch
from inflate.training.stages import Stage

ALL_FEATURES = "frame_features"
"""What the image encoder makes of all of a clip's frames: (B, F, P, E)."""


@dataclass
class ImageTextToVideo(Denoising):
    """Settings of image-and-text-to-video training (DynamiCrafter, 2310.12190)."""

    drop_text: float = 0.05
    """share of samples without the text alone: more, where captions say all that the image tokens could"""
    drop_image: float = 0.05
    """share of samples without the image tokens alone; the image's latent stays"""
    drop_both: float = 0.05
    """share of samples without either, the null condition of guidance"""
    condition_frame: Literal["random", "first"] = "random"
    """the frame of each clip that is the image: one drawn for each sample, so that it cannot be copied to where it
    came from, or the first"""
    interpolation: bool | None = None
    """both ends of a clip are given: the detail latents of its first and last frame, zeros between them; null: as the
    model it starts from was trained"""
    told: Told | None = None
    """what the model is told of a clip: fps, its frames per second, or stride, how many frames of its file lie between
    two of its own; null: what the model it starts from is told"""
    condition_noise: ConditionNoise = ConditionNoise()
    """noise on the image's latent, where the model is shown that: against clips that stand still"""
    section: ClassVar[str] = "image_text_to_video"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_drops(self.section, self.drop_text, self.drop_image, self.drop_both)
        if self.interpolation and self.condition_frame != "first":
            raise ConfigError(
                "image_text_to_video.interpolation=true gives both ends of a clip, of which the image encoder sees the "
                "first: set image_text_to_video.condition_frame=first"
            )

    def continuing(self, clips: Clips) -> Self:
        """The settings, where they leave it open with what the model was trained that a run starts from."""
        return self if self.interpolation is not None else replace(self, interpolation=clips.interpolation)

    def refuse_other(self, clips: Clips) -> None:
        """ConfigError, beside an adapter, where clips are told otherwise than those of its base.

        Sampling with the adapter has the base's way alone.
        """
        if (self.told or clips.told) != clips.told or self.interpolation != clips.interpolation:
            raise ConfigError(
                "image_text_to_video: an adapter is used as its base is: told and interpolation must be the base's "
                f"({clips.told}, {str(clips.interpolation).lower()}); set them to null, or train without an adapter"
            )

    def clips(self, before: Clips, main: Bucket, shown: Batch) -> Clips:
        """What an export is to remember of its clips, of those of the main bucket, one of which is `shown`."""
        told = replace(before, told=self.told or before.told, interpolation=bool(self.interpolation), number=None)
        number = float(told.numbers(shown["fps"], shown["stride"])[0])
        return replace(
            told, frames=main.frames, fps=float(shown["fps"][0]), height=main.height, width=main.width, number=number
        )


@dataclass
class Preview:
    """How previews are sampled; the prompt, the image, the length and the seed are each held-out clip's own."""

    steps: int = 50
    """denoising steps"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    image_guidance: float | None = None
    """guidance scale of the image, that above being the text's, at half the cost again; none: one scale for both"""
    rescale: float | None = None
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1, against overexposed
    clips; none: 0.7 of models that were trained on pure noise, otherwise 0"""
    eta: float = 1.0
    """fresh noise of each step, 0 (none) to 1"""
    start: int | None = None
    """timestep to start from; none: the last, 999. A lower one, such as 900, draws more motion"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""


class ImageTextToVideoTask(AnimatingTask[DynamiCrafter, Condition]):
    """Trains `family.unet` to animate images by texts.

    `context` trains the image stream alone, on single images, past the temporal layers; `adapt` that and the image
    model's layers, on clips; `joint` the same in a model that is also shown the image's latent; `finetune` everything.
    Batches also hold the `stride` of each clip.
    """

    settings: ImageTextToVideo

    def __init__(
        self, family: DynamiCrafter, stage: Stage, settings: ImageTextToVideo, sampling: Preview, given: Given
    ) -> None:
        super().__init__(family, settings, given)
        if settings.condition_noise.maximum and not family.takes_detail:
            raise ConfigError(
                "image_text_to_video.condition_noise is on the image's latent, which the model of "
                f"stage={stage} is not shown: leave it out"
            )
        self.stage, self.sampling = stage, sampling
        self.no_text, self.no_image = family.embed([""]).context, family.null_image()  # (1, L, D), (1, P, E)
        if given.adapter is None:
            choose_trainable(family.unet, stage)

    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> Condition:
        """What the UNet is told of clips with these latents (B, F, C, h, w): one frame of each is the image."""
        family, frame = self.family, self.frame(clean, noise)  # (B,)
        number = family.clips.numbers(batch["fps"], batch["stride"]).to(noise.device)  # (B,)
        text, features = text_of(family, batch, noise.device), self.features(batch, clean, noise)
        last = clean[:, -1] if self.settings.interpolation else None
        return family.condition(text, features, number, taken(clean, frame), clean.shape[1], last)

    def trained_condition(self, batch: Batch, clean: Tensor, timestep: Tensor, noise: Noise, step: int) -> Condition:
        """The same, with noise on the image's latent, where that is asked for, and without what is dropped."""
        settings, time = self.settings, self.family.objective.time(timestep)
        seen = settings.condition_noise.add(clean, time, noise)  # (B, F, C, h, w)
        rates = (settings.drop_text, settings.drop_both, settings.drop_image)
        return self.condition(batch, seen, noise).drop(noise.uniform("drop"), self.no_text, self.no_image, *rates)

    def frame(self, clean: Tensor, noise: Noise) -> Tensor:
        """The place (B,) of each clip's conditioning frame."""
        first = self.settings.condition_frame == "first"
        return (noise.uniform("condition frame") * (not first) * clean.shape[1]).long()

    def features(self, batch: Batch, clean: Tensor, noise: Noise) -> Tensor:
        """What the image encoder makes of each clip's conditioning frame: (B, P, E)."""
        family, frame = self.family, self.frame(clean, noise)
        if FEATURES in batch:
            features: Tensor = batch[FEATURES]
        elif ALL_FEATURES in batch:
            features = taken(batch[ALL_FEATURES], frame)
        else:
            return family.embed_image(taken(batch["pixels"], frame).to(frame.device))
        return features.to(frame.device, family.vae.dtype)

    @property
    def parts(self) -> tuple[str, ...]:
        """Text, image tokens and the image's latent, where the model is shown it."""
        return ("text", "image tokens", *(["image latent"] if self.family.takes_detail else []))

    def lacking(self, condition: Condition, part: str) -> Condition:
        """The condition without a part of it, or as it is."""
        if part == "text":
            return replace(condition, text=self.no_text.to(condition.text).expand_as(condition.text))
        if part == "image tokens":
            return replace(condition, image=None)
        if part == "image latent" and condition.detail is not None:
            return replace(condition, detail=torch.zeros_like(condition.detail))
        return condition

    @property
    def frames_alone(self) -> bool:
        """Whether the temporal layers see no clip at all: in stage `context`, of images."""
        return self.stage == "context"

    @property
    def given_frames(self) -> dict[str, slice]:
        """The frames of a clip that an animation is given, by name: for interpolation the last one, too."""
        last = {"last frame": slice(-1, None)} if self.settings.interpolation else {}
        return {**super().given_frames, **last}

    @torch.no_grad()
    def animate(self, places: list[int]) -> Tensor:
        """Clips (N, F, 3, H, W), about in [-1, 1], of the captions and first frames at places of one size.

        The place is the seed; for interpolation, the last frames are given, too.
        """
        clips = [self.shown[place] for place in places]
        if self.sampling.start is not None:
            self._keep_moments()
        first, last = (torch.cat([clip["pixels"][:, end] for clip in clips]) for end in (0, -1))  # (N, 3, H, W)
        ends = last if self.settings.interpolation else None
        settings = Sampling(**asdict(self.sampling), frames=size_of(clips[0])[0])
        prompts, seeds = [clip["caption"][0] for clip in clips], [self.seed + place for place in places]
        return sample(
            self.family, first, prompts, seeds, settings, ends, idle=self._idle(), device=self._device()
        ).cpu()

    def export(self, folder: Path) -> None:
        """Write the adapter, the image stream alone (`context`), or the model as `DynamiCrafter.load` reads it."""
        if self.adapter is None and self.stage == "context":
            image_stream.save(self.family.unet, self.family.image_encoder, folder)
            return
        if self.adapter is None:
            self._keep_moments()
        super().export(folder)

    def _keep_moments(self) -> None:
        """Let the family know what the latents of the measured clips are like, for sampling from a lower timestep."""
        held_out, training = self.measured
        self.family.moments = LatentMoments.of(clip["latents"] for clip in [*held_out, *training])

    @staticmethod
    def _without_pixels(clip: Batch) -> Batch:
        return {name: value for name, value in clip.items() if name not in ("pixels", ALL_FEATURES)}


def taken(frames: Tensor, place: Tensor) -> Tensor:
    """One frame of each clip: of (B, F, ...), at places (B,), (B, ...)."""
    return frames[torch.arange(len(frames), device=frames.device), place.to(frames.device)]


def choose_trainable(unet: VideoUNet, stage: Stage) -> None:
    """Freeze what a stage does not train: all but the image stream, the temporal layers, or nothing."""
    image, temporal = unet.image_parameters(), unet.temporal_parameters()
    for name, parameter in unet.named_parameters():
        wanted = {"context": name in image, "finetune": True}.get(stage, name not in temporal)
        parameter.requires_grad_(wanted)
