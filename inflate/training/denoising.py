"""What tasks share that train a video UNet by the objective of its image model: a step's loss, and how it is measured.

A task of these says what its UNet is told of clips (`DenoisingTask.condition`), what of that a step leaves out
(`trained_condition`), and what a person should look at (`preview`). `Denoising` are the settings that all of them have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from inflate.errors import ConfigError, DataError
from inflate.models.stable_diffusion import TextToVideo
from inflate.models.visits import away, visiting
from inflate.objectives import TRAIN_TIMESTEPS
from inflate.training.adapting import Adapting
from inflate.training.captions import encoded_text
from inflate.training.clip_task import ClipTask
from inflate.training.held_out import REMEDY, TOGETHER, fixed_losses, is_image, named_losses, size_of
from inflate.training.noise import Noise
from inflate.training.player import Batch, Player, Selected
from inflate.training.timesteps import by_band, middles

Family = TypeVar("Family", bound=TextToVideo)
Condition = TypeVar("Condition")
PIXELS = ("pixels",)
"""Of a batch, what is not needed once it is encoded."""


@dataclass
class Denoising:
    """Settings of every such task; each has them in a section of its own name."""

    timestep_power: float = 1.0
    """timesteps are the last one's share u ** power, u uniform: below 1, more of them are noisy, where it is decided
    how a clip moves"""
    held_out_clips: int = 32
    """held-out clips that the loss is measured on"""
    bands: int = 4
    """bands of the timestep: the training loss is told for each, the held-out loss at its middle"""
    train_clips: int = 8
    """training clips that the same is measured on as on held-out ones, to tell overfitting; 0 = none"""
    preview_clips: int = 8
    """held-out clips that each preview shows"""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        if not 0 < self.timestep_power < math.inf:
            raise ConfigError(f"{self.section}.timestep_power={self.timestep_power}: must be positive; 1 is uniform")
        if min(self.held_out_clips, self.bands, self.preview_clips) < 1 or self.train_clips < 0:
            raise ConfigError(
                f"{self.section}: held_out_clips, bands and preview_clips must be at least 1, train_clips at least 0"
            )


def check_drops(section: str, text: float, image: float, both: float) -> None:
    """Raise ConfigError unless the shares of samples that lose their text, image or both can be drawn at once."""
    if min(text, image, both) < 0 or text + image + both > 1:
        raise ConfigError(
            f"{section}: drop_text, drop_image and drop_both are shares: not below 0, not above 1 together"
        )


@dataclass(frozen=True)
class Given:
    """What a run gives such a task beside its model and its settings."""

    held_out: Sequence[Batch]
    """batches of one clip each: `pixels` (1, F, 3, H, W), `caption`, `fps`, `number`"""
    lr: float
    """learning rate"""
    seed: int
    """of all that is drawn"""
    training: Sequence[Batch] = ()
    """such batches of clips that are trained on"""
    cached: bool = False
    """whether a step's batches hold the clips' `latents` and what else is encoded of them: the encoders are then on the
    device only while they work to look at the model"""
    adapter: Adapting | None = None
    """what is on the UNet and learns alone: all else stays as it is, and it alone is exported"""
    together: int = TOGETHER
    """how many clips are measured at once, at most: as many as a step has need no more memory than it"""


class DenoisingTask(ClipTask, ABC, Generic[Family, Condition]):
    """Trains `family.unet` on clips; measures it on held-out ones.

    A clip of one frame is an image: the temporal layers are bypassed. `rates` are multipliers of the learning rate by a
    parameter's name.
    """

    family: Family
    settings: Denoising

    def __init__(
        self, family: Family, settings: Denoising, given: Given, rates: Mapping[str, float] | None = None
    ) -> None:
        if not given.held_out:
            raise DataError("there are no held-out clips (data.held_out) to measure and preview")
        self.family, self.settings, self.seed = family, settings, given.seed
        self.adapter, self.together = given.adapter, given.together
        encoders = [network for network in family.networks if network is not family.unet]
        for module in encoders:
            module.requires_grad_(False).eval()
        self.frozen, self.visiting = ([], encoders) if given.cached else (encoders, [])
        self.held_out = [*given.held_out[: settings.held_out_clips]]
        self.training = [*given.training[: settings.train_clips]]
        self.shown = self.held_out[: settings.preview_clips]
        self.players = [Player("unet", family.unet, lr=given.lr, loss=self.loss, remedy=REMEDY, rates=rates or {})]

    @abstractmethod
    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> Condition:
        """All that the UNet can be told of clips with these latents (B, F, C, h, w)."""

    def trained_condition(self, batch: Batch, clean: Tensor, timestep: Tensor, noise: Noise, step: int) -> Condition:
        """What it is told of them in a step of training, at timesteps (B,)."""
        return self.condition(batch, clean, noise)

    @abstractmethod
    def preview(self, folder: Path) -> None:
        """Write what a person should look at, from fixed seeds and inputs, into an existing empty folder."""

    def _write_prompts(self, folder: Path) -> None:
        """Write the captions of what a preview shows."""
        lines = [f"{place:02d} {clip['caption'][0]}" for place, clip in enumerate(self.shown)]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n")

    @property
    def parts(self) -> Sequence[str]:
        """What a condition may lack, by the names that `lacking` takes: how much worse it is without is measured."""
        return ()

    def lacking(self, condition: Condition, part: str) -> Condition:
        """The condition without a part of it, or, of none, as it is."""
        return condition

    @property
    def levels(self) -> int:
        """How many timesteps are trained, the less noisy ones."""
        return TRAIN_TIMESTEPS

    @property
    def offset(self) -> float:
        """Spread of a shift that the noise of each frame and channel has beside."""
        return 0.0

    @property
    def frames_alone(self) -> bool:
        """Whether the temporal layers see no clip at all."""
        return False

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Selected]]:
        """The loss per sample (B,), fp32, of one batch; logged for each band of the timestep."""
        clean = self.clean(batch, noise.device)  # (B, F, C, h, w)
        timestep = self.timestep(clean, noise)  # (B,) or (B, F)
        condition = self.trained_condition(batch, clean, timestep, noise, step)
        predict = self.family.predict(condition, self.players[0].network, self._single(batch))
        loss = self.family.objective.loss(predict, clean, timestep, self.drawn_noise("noise", clean, noise))  # (B, F)
        return loss.mean(dim=1), by_band(loss, timestep, self.settings.bands, self.levels)

    def timestep(self, clean: Tensor, noise: Noise) -> Tensor:
        """The timesteps (B,) of a step's clips."""
        return self.timestep_of(noise.uniform("timestep"))

    def timestep_of(self, uniform: Tensor) -> Tensor:
        """Timesteps below `levels` from draws in [0, 1); same shape."""
        share = uniform**self.settings.timestep_power * (self.levels / TRAIN_TIMESTEPS)
        return self.family.objective.timestep(share).clamp(max=self.levels - 1)

    def drawn_noise(self, purpose: str, clean: Tensor, noise: Noise) -> Tensor:
        """The noise for latents (B, F, C, h, w), of their shape."""
        return noise.offset(purpose, self.offset, *clean.shape[1:])

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on fixed noise: its mean, per timestep, per size, without temporal layers and without each of
        `parts`: as much as it rises, the model has learned to make of each."""
        held_out, training = self.measured
        losses = self.fixed_losses(held_out)  # (N, levels)
        bypassed = None if self.frames_alone else self.fixed_losses(held_out, image_only=True)  # (N, levels)
        named = [f"timestep {timestep}" for timestep in self.middles]
        sizes = [size_of(clip) for clip in self.held_out]
        told = named_losses(losses, bypassed, self.fixed_losses(training), named, sizes)
        for part in self.parts:
            told[f"held-out loss, without {part}"] = float(self.fixed_losses(held_out, without=part).mean())
        return told

    @property
    def middles(self) -> list[int]:
        """The timesteps at which losses are measured."""
        return middles(self.settings.bands, self.levels)

    def fixed_losses(self, clips: list[Batch], image_only: bool = False, without: str = "") -> Tensor:
        """The loss of each clip at each timestep (N, levels), float64, on noise fixed by the seed and its number."""

        def measure(batch: Batch, noise: Noise) -> Tensor:
            clean = self.clean(batch, noise.device)
            condition = self.lacking(self.condition(batch, clean, noise), without)
            predict = self.family.predict(condition, self.players[0].network, image_only or self._single(batch))
            fixed, objective = self.drawn_noise("held-out", clean, noise), self.family.objective
            steps = torch.tensor(self.middles, device=noise.device)[:, None].expand(-1, len(clean))  # (levels, B)
            return torch.stack([objective.loss(predict, clean, one, fixed).mean(1) for one in steps], dim=1)

        return fixed_losses(clips, self.settings.bands, self.seed, self._device(), measure, self.together)

    @cached_property
    def measured(self) -> tuple[list[Batch], list[Batch]]:
        """The held-out clips and those of training as a cache holds them, on the CPU: encoded once in a run.

        Each encoder is on the device while it works.
        """
        family, device, clips = self.family, self._device(), [*self.held_out, *self.training]
        with away(self._idle()), visiting([family.vae], device):
            encoded = [self._without_pixels(clip) | {"latents": self.clean(clip, device).cpu()} for clip in clips]
        self._see(clips, encoded, device)
        if self.reads_captions:
            with visiting(family.text.networks, device):
                for clip in encoded:
                    clip |= encoded_text(family, clip)
        return encoded[: len(self.held_out)], encoded[len(self.held_out) :]

    @property
    def reads_captions(self) -> bool:
        """Whether the UNet is told captions."""
        return True

    def _see(self, clips: list[Batch], encoded: list[Batch], device: torch.device) -> None:
        """Add to encoded clips what else than their latents is encoded of their pixels."""

    @staticmethod
    def _without_pixels(clip: Batch) -> dict[str, Any]:
        return {name: value for name, value in clip.items() if name not in PIXELS}

    def _single(self, batch: Batch) -> bool:
        """Whether a batch's frames stand alone: those of images, and all where a stage trains on frames."""
        return self.frames_alone or is_image(batch)
