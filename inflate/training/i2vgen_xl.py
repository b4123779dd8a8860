"""I2VGen-XL's base stage: what one step does, how it is measured and shown; and the settings of both stages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from inflate.data.buckets import Bucket
from inflate.errors import ConfigError
from inflate.families import i2vgen_xl, i2vgen_xl_refiner
from inflate.families.i2vgen_xl import Condition, I2VGenXL
from inflate.layers.hierarchy import Part
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VideoUNet
from inflate.objectives import TRAIN_TIMESTEPS
from inflate.sampling.ddim import Spacing
from inflate.sampling.i2vgen_xl import Sampling, sample
from inflate.training.animating import FEATURES, AnimatingTask
from inflate.training.captions import text_of
from inflate.training.denoising import Denoising, Given
from inflate.training.held_out import size_of
from inflate.training.noise import Noise
from inflate.training.player import Batch

AnyClips = TypeVar("AnyClips", i2vgen_xl.Clips, i2vgen_xl_refiner.Clips)


@dataclass
class I2VGenXLSettings(Denoising):
    """Settings of both stages of I2VGen-XL (2311.04145)."""

    text: bool | None = None
    """for stage=base: clips are told by their captions, as the released model is; false: by image and frame rate alone,
    as the paper's, which goes with clips that have none (data.captions=optional); null: as the model it starts from,
    told captions if it is new"""
    drop_text: float = 0.05
    """share of samples without the text alone; a refiner's without any"""
    drop_image: float = 0.05
    """for stage=base: share of samples without CLIP's embedding of the image alone; the image's latent stays"""
    drop_both: float = 0.05
    """for stage=base: share of samples without either, what guidance leads away from"""
    negative: str | None = None
    """prompt that a sample without its text is told, and that samples are led away from; null: that of the model it
    starts from, the empty one if it is new"""
    gamma: float | None = None
    """learning rate of the image model's layers, as a multiple of the others'; null: 0.2, the paper's, of an image
    model, otherwise 1, and beside an adapter"""
    offset_noise: float = 0.1
    """spread of a shift of the noise of each frame and channel, which lets brightness change"""
    fade_in: int = 0
    """for stage=base: steps over which the first frame's tokens come to weigh as much as the text's, so that they
    disturb little before they have learned; 0: at once, as published"""
    schedule: Literal["cosine", "shifted_cosine"] | None = None
    """noise schedule to move to, and with it to predicting v: cosine, which ends in pure noise, is the released base's;
    shifted_cosine that of the released refiner; null: the schedule and prediction of the model it starts from"""
    levels: int | None = None
    """for stage=refine: how many timesteps are trained, the less noisy ones; null: those of the refiner it starts from,
    600 of a new one"""
    padded_rows: int | None = None
    """for stage=refine: rows of zeros at each edge that downsampling is given; 2 as the released refiner, by which 720
    pixels divide evenly; null: as the model it starts from"""

    section: ClassVar[str] = "i2vgen_xl"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None and not 0 < self.gamma < math.inf:
            raise ConfigError(f"i2vgen_xl.gamma={self.gamma}: must be positive; 1 trains all layers at one rate")
        if not 0 <= self.offset_noise < math.inf or self.fade_in < 0:
            raise ConfigError(
                f"i2vgen_xl: offset_noise ({self.offset_noise}) and fade_in ({self.fade_in}) must be at least 0"
            )
        if self.levels is not None and not 1 <= self.levels <= TRAIN_TIMESTEPS:
            raise ConfigError(f"i2vgen_xl.levels={self.levels}: there are 1 to {TRAIN_TIMESTEPS} timesteps")
        if self.padded_rows is not None and self.padded_rows < 1:
            raise ConfigError(f"i2vgen_xl.padded_rows={self.padded_rows}: must be at least 1, which is no padding more")

    def clips(self, before: AnyClips, main: Bucket, fps: float) -> AnyClips:
        """What an export is to remember of its clips, those of the main bucket; what is left open, as it was before."""
        return replace(before, frames=main.frames, fps=fps, height=main.height, width=main.width, **self._told(before))

    def unlike_base(self, clips: TrainedClips) -> Mapping[str, int | None]:
        """The settings that an adapter on a model of such clips goes without, and what they are to be.

        Samples have the base's way alone, layers that stay as they are no rate, and its tokens have learned already.
        """
        others = [name for name, value in self._told(clips).items() if getattr(clips, name) != value]
        others += [name for name in ("schedule", "padded_rows", "gamma") if getattr(self, name) is not None]
        reset: dict[str, int | None] = {f"i2vgen_xl.{'text' if name == 'prompts' else name}": None for name in others}
        return {**reset, "i2vgen_xl.fade_in": 0} if self.fade_in else reset

    def _told(self, clips: TrainedClips) -> dict[str, Any]:
        """What these settings say of clips of this kind, by its own names."""
        told = {"prompts": self.text, "negative": self.negative, "levels": self.levels}
        return {name: value for name, value in told.items() if value is not None and hasattr(clips, name)}

    def image_share(self, step: int) -> float:
        """What the first frame's tokens weigh at a step, above 0: a pure function, for exact resume."""
        return min(1.0, (step + 1) / self.fade_in) if self.fade_in else 1.0


@dataclass
class Preview:
    """How previews of stage=base are sampled; the prompt, the image, the length and the seed are each held-out clip's
    own."""

    steps: int = 50
    """denoising steps"""
    guidance: float = 9.0
    """guidance scale of text and CLIP's tokens; up to 1 there is no guidance, at half the cost"""
    rescale: float = 0.0
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1, against overexposed
    clips"""
    eta: float = 0.0
    """fresh noise of each step, 0 (none) to 1"""
    spacing: Spacing = "leading"
    """which timesteps: leading, of which 50 begin at 981, as published, or trailing, from the last one, 999"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""


class I2VGenXLTask(AnimatingTask[I2VGenXL, Condition]):
    """Trains `family.unet` to animate first frames by captions, or by themselves.

    The image model's layers learn at `gamma` times the rate of the others, which inflation created, and of the time
    embedding. What is measured and shown has first frames at their full weight, as in sampling, at any step.
    """

    settings: I2VGenXLSettings

    def __init__(
        self, family: I2VGenXL, settings: I2VGenXLSettings, sampling: Preview, given: Given, gamma: float = 1.0
    ) -> None:
        super().__init__(family, settings, given, spatial_rates(family.unet, gamma))
        self.sampling = sampling
        self.no_text = family.embed([family.clips.negative]).context  # (1, L, D)
        if given.adapter is None:
            family.unet.requires_grad_(True)
            for unread in family.unet.textless_parameters().values():
                unread.requires_grad_(self.reads_captions)

    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> Condition:
        """What the UNet is told of clips with these latents (B, F, C, h, w): captions, first frames and frame rates."""
        family, device = self.family, noise.device
        text = text_of(family, batch, device) if self.reads_captions else None
        embedding = self.features(batch, clean, noise) if family.hierarchy.clip_tokens else None
        return family.condition(text, clean[:, 0], embedding, batch["fps"].to(device))

    def trained_condition(self, batch: Batch, clean: Tensor, timestep: Tensor, noise: Noise, step: int) -> Condition:
        """The same without what is dropped, its tokens of first frames weighing as much as at this step."""
        settings = self.settings
        rates = (settings.drop_text, settings.drop_both, settings.drop_image)
        dropped = self.condition(batch, clean, noise).drop(noise.uniform("drop"), self.no_text, *rates)
        return replace(dropped, image_share=settings.image_share(step))

    def features(self, batch: Batch, clean: Tensor, noise: Noise) -> Tensor:
        """CLIP's embedding of first frames: (B, 1, E)."""
        if FEATURES in batch:
            features: Tensor = batch[FEATURES].to(noise.device, self.family.vae.dtype)
            return features
        return self.family.embed_image(batch["pixels"][:, 0].to(noise.device))

    @property
    def offset(self) -> float:
        """Spread of the shift of the noise of each frame and channel."""
        return self.settings.offset_noise

    @property
    def reads_captions(self) -> bool:
        """Whether the UNet is told captions."""
        return self.family.clips.prompts

    @property
    def parts(self) -> tuple[str, ...]:
        """Text and the parts of first frames, from fine to coarse, but for what alone gives attention its tokens."""
        own, told = self.family.hierarchy.parts, ("text",) if self.reads_captions else ()
        tokens = [part for part in own if part != "detail"]
        needed = tokens if not told and len(tokens) == 1 else []
        return (*told, *(part for part in own if part not in needed))

    def lacking(self, condition: Condition, part: str) -> Condition:
        """The condition with the negative prompt for its text, without a part of the first frame, or as it is."""
        if part == "text":
            return replace(condition, text=self.no_text.to(condition.text).expand_as(condition.text))
        left_out: tuple[Part, ...] = tuple(one for one in self.family.hierarchy.parts if one == part)
        return replace(condition, left_out=left_out)

    @torch.no_grad()
    def animate(self, places: list[int]) -> Tensor:
        """Clips (N, F, 3, H, W), about in [-1, 1], of the captions and first frames at places of one size.

        The place is the seed.
        """
        clips = [self.shown[place] for place in places]
        first = torch.cat([clip["pixels"][:, 0] for clip in clips])  # (N, 3, H, W)
        settings = Sampling(**asdict(self.sampling), frames=size_of(clips[0])[0], fps=float(clips[0]["fps"][0]))
        prompts = [clip["caption"][0] if self.reads_captions else "" for clip in clips]
        seeds = [self.seed + place for place in places]
        return sample(self.family, first, prompts, seeds, settings, idle=self._idle(), device=self._device()).cpu()


def spatial_rates(unet: VideoUNet, gamma: float) -> Mapping[str, float]:
    """What the learning rates are multiplied by of the image model's layers, all but those of its time embedding."""
    created = unet.created_parameters()
    spatial = [name for name, _ in unet.named_parameters() if name not in created and "time_embedding" not in name]
    return dict.fromkeys(spatial, gamma) if gamma != 1 else {}
