"""Text-to-video by alignment of an image model: what one step does, how it is measured and shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from inflate.data import video
from inflate.data.pixels import to_uint8, unit
from inflate.errors import ConfigError, DataError
from inflate.families.video_ldm import Sampler, VideoLDM
from inflate.models.text_encoders import TextCondition
from inflate.models.unet import VideoUNet
from inflate.models.visits import visiting
from inflate.sampling.text_to_video import Sampling, sample
from inflate.training.adapting import Adapting
from inflate.training.captions import encoded_text, text_of
from inflate.training.domain import Domain
from inflate.training.economy import as_loaded
from inflate.training.held_out import REMEDY, TOGETHER, fixed_losses, is_image, named_losses, same_size, size_of
from inflate.training.loop import Player
from inflate.training.noise import Noise
from inflate.training.player import Batch, Selected
from inflate.training.previews import sheet_name
from inflate.training.timesteps import by_band, middles

Stage = Literal["spatial", "temporal", "joint"]


@dataclass
class TextToVideo:
    """Settings of text-to-video training (Video LDM, 2304.08818)."""

    drop_caption: float = 0.1
    """share of samples with the empty prompt, the null condition of guidance"""
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
    """held-out clips whose captions each preview samples"""
    domain_adapter: str | None = None
    """FILE or FILE:WEIGHT of an adapter on image layers that holds the clips' look (stage=spatial with
    adapters/spatial_lora.yaml makes one): stage=temporal trains on top of it, and draws and exports without it"""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_caption <= 1:
            raise ConfigError(f"text_to_video.drop_caption={self.drop_caption}: a share from 0 to 1")
        if not 0 < self.timestep_power < math.inf:
            raise ConfigError(f"text_to_video.timestep_power={self.timestep_power}: must be positive; 1 is uniform")
        if min(self.held_out_clips, self.bands, self.preview_clips) < 1 or self.train_clips < 0:
            raise ConfigError(
                "text_to_video: held_out_clips, bands and preview_clips must be at least 1, train_clips at least 0"
            )


@dataclass
class Preview:
    """How previews are sampled; the prompt, the length and the seed are each held-out clip's own."""

    steps: int = 50
    """denoising steps"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    negative: str = ""
    """prompt that guidance leads away from"""
    sampler: Sampler = "ddim"
    """ddim, or euler"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""


class TextToVideoTask:
    """Trains `family.unet` to draw clips of their captions; measures and shows it on held-out clips.

    `spatial` trains the image model's layers on single frames, each with a timestep of its own; `temporal` the temporal
    layers, on clips, with the image model as it is; `joint` everything. A clip of one frame is an image: the temporal
    layers are bypassed.

    `held_out` and `training` are batches of one clip each (`pixels` (1, F, 3, H, W), `caption`, `fps`, `number`, and
    where they are known their `origin`). Where batches hold the clips' `latents` and what is encoded of captions
    (`cached`), the encoders are on the device only while they work to look at the model. So many clips are measured
    `together`, at most: as many as a step has need no more memory than it.

    Beside an `adapter`, which is on the UNet, all else stays as it is, and the adapter alone is exported. The setting
    `domain_adapter` is merged into the UNet for every loss, and for no sample and no export.
    """

    def __init__(
        self,
        family: VideoLDM,
        stage: Stage,
        settings: TextToVideo,
        held_out: list[Batch],
        sampling: Preview,
        lr: float,
        seed: int,
        training: Sequence[Batch] = (),
        cached: bool = False,
        adapter: Adapting | None = None,
        together: int = TOGETHER,
    ) -> None:
        if not held_out:
            raise DataError("there are no held-out clips (data.held_out) to measure and preview")
        self.family, self.stage, self.settings, self.sampling, self.seed = family, stage, settings, sampling, seed
        self.adapter, self.together = adapter, together
        encoders: list[nn.Module] = [family.vae, *family.text.networks]
        for module in encoders:
            module.requires_grad_(False).eval()
        self.frozen, self.visiting = ([], encoders) if cached else (encoders, [])
        self.nothing = family.embed([""])
        self.held_out = held_out[: settings.held_out_clips]
        self.training = [*training[: settings.train_clips]]
        self.shown = self.held_out[: settings.preview_clips]
        self.domain = Domain.below(family.unet, settings.domain_adapter)
        family.clips = replace(family.clips, domain_adapter=self.domain.name if self.domain else None)
        if adapter is None:
            choose_trainable(family.unet, stage)
        self.players = [Player("unet", family.unet, lr=lr, loss=self.loss, remedy=REMEDY)]

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Selected]]:
        """The loss per sample (B,), fp32, of one batch; logged for each band of the timestep."""
        family, objective = self.family, self.family.objective
        clean = self.clean(batch, noise.device)  # (B, F, C, h, w)
        condition = self.drop(self.condition(batch, noise.device), noise.uniform("drop"))
        share = noise.uniform("timestep", *self._drawn_alone(clean)) ** self.settings.timestep_power
        timestep = objective.timestep(share)  # (B,) or (B, F)
        predict = family.predict(condition, self.players[0].network, self._single(batch))
        loss = objective.loss(predict, clean, timestep, noise.normal("noise", *clean.shape[1:]))  # (B, F)
        return loss.mean(dim=1), by_band(loss, timestep, self.settings.bands)

    def clean(self, batch: Batch, device: torch.device) -> Tensor:
        """The clips' scaled latents (B, F, C, h, w)."""
        if "latents" in batch:
            latents: Tensor = batch["latents"].to(device, self.family.vae.dtype)
            return latents
        return self.family.encode(batch["pixels"].to(device))

    def condition(self, batch: Batch, device: torch.device) -> TextCondition:
        """What the UNet is told of the clips: their captions, frame rates, and where their pixels come from."""
        beside = {name: batch[name].to(device) for name in ("origin", "fps") if name in batch}
        return replace(text_of(self.family, batch, device), **beside)

    def drop(self, condition: TextCondition, draw: Tensor) -> TextCondition:
        """The condition, of the empty prompt in place of those captions whose uniform draw (B,) says so."""
        dropped, nothing = (draw < self.settings.drop_caption)[:, None], self.nothing  # (B, 1)
        context = torch.where(dropped[..., None], nothing.context.to(condition.context), condition.context)  # (B, L, D)
        if condition.pooled is None or nothing.pooled is None:
            return replace(condition, context=context)
        pooled = torch.where(dropped, nothing.pooled.to(condition.pooled), condition.pooled)  # (B, P)
        return replace(condition, context=context, pooled=pooled)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on fixed noise: its mean, per timestep, per size, and with temporal layers bypassed."""
        held_out, training = self.measured
        losses = self.fixed_losses(held_out)  # (N, levels)
        bypassed = self.fixed_losses(held_out, image_only=True)  # (N, levels)
        known = self.fixed_losses(training)
        named = [f"timestep {timestep}" for timestep in middles(self.settings.bands)]
        return named_losses(losses, bypassed, known, named, [size_of(clip) for clip in self.held_out])

    @cached_property
    def measured(self) -> tuple[list[Batch], list[Batch]]:
        """The held-out clips and those of training as a cache holds them, on the CPU: encoded once in a run.

        The encoders are on the device while they work.
        """
        device, clips = self._device(), [*self.held_out, *self.training]
        with visiting([self.family.vae], device):
            encoded = [
                {**{name: value for name, value in clip.items() if name != "pixels"},
                 "latents": self.clean(clip, device).cpu()}
                for clip in clips
            ]  # fmt: skip
        with visiting(self.family.text.networks, device):
            for clip in encoded:
                clip |= encoded_text(self.family, clip)
        return encoded[: len(self.held_out)], encoded[len(self.held_out) :]

    def fixed_losses(self, clips: list[Batch], image_only: bool = False) -> Tensor:
        """The loss of each clip at each timestep (N, levels), float64, on noise fixed by the seed and its number."""

        def measure(batch: Batch, noise: Noise) -> Tensor:
            clean, condition = self.clean(batch, noise.device), self.condition(batch, noise.device)
            predict = self.family.predict(condition, self.players[0].network, image_only or self._single(batch))
            fixed, objective = noise.normal("held-out", *clean.shape[1:]), self.family.objective
            steps = torch.tensor(middles(self.settings.bands), device=noise.device)[:, None]  # (levels, 1)
            steps = steps.expand(-1, len(clean))  # (levels, B)
            return torch.stack([objective.loss(predict, clean, one, fixed).mean(1) for one in steps], dim=1)

        return fixed_losses(clips, self.settings.bands, self.seed, self._device(), measure, self.together)

    def preview(self, folder: Path) -> None:
        """Sample the first held-out clips' captions: an mp4 each, a contact sheet per size, and prompts.txt."""
        lines = [f"{place:02d} {clip['caption'][0]}" for place, clip in enumerate(self.shown)]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
        for places, drawn in self.drawn():
            clips = [to_uint8(unit(clip)) for clip in drawn]
            for place, clip in zip(places, clips, strict=True):
                video.write(folder / f"{place:02d}.mp4", clip, float(self.shown[place]["fps"][0]))
            labels = [f"{place:02d}" for place in places]
            video.contact_sheet(folder / sheet_name(self.shown, places), clips, labels)

    def drawn(self) -> Iterator[tuple[list[int], Tensor]]:
        """What a preview shows, by size: places of clips, and the samples of their captions (`draw`)."""
        for places in same_size(self.shown, len(self.shown)):
            yield places, self.draw(places)

    def draw(self, places: list[int]) -> Tensor:
        """Samples (N, F, 3, H, W), about in [-1, 1], of the captions at places of one size; the place is the seed."""
        frames, height, width = size_of(self.shown[places[0]])
        settings = Sampling(**asdict(self.sampling), frames=frames, height=height, width=width)
        prompts = [self.shown[place]["caption"][0] for place in places]
        with self._as_exported():
            return sample(self.family, prompts, [self.seed + place for place in places], settings).cpu()

    def export(self, folder: Path) -> None:
        """Write the adapter or, without one, the whole model as a folder that `VideoLDM.load` reads."""
        if self.adapter is None:
            with self._as_exported(), as_loaded(self.family.unet):
                self.family.save_pretrained(folder)
        else:
            self.adapter.export(self.family.unet, folder)

    def fingerprint(self) -> Mapping[str, str]:
        """What the trained weights rest on that no checkpoint holds: the adapter below the temporal layers."""
        return {} if self.domain is None else self.domain.fingerprint

    def _as_exported(self) -> AbstractContextManager[None]:
        return nullcontext() if self.domain is None else self.domain.left_out()

    def _single(self, batch: Batch) -> bool:
        """Whether frames stand alone: those of images, and all while only the image model's layers are trained."""
        return self.stage == "spatial" or is_image(batch)

    def _drawn_alone(self, clean: Tensor) -> tuple[int, ...]:
        return (clean.shape[1],) if self.stage == "spatial" else ()

    def _device(self) -> torch.device:
        return next(self.players[0].network.parameters()).device


def choose_trainable(unet: VideoUNet, stage: Stage) -> None:
    """Freeze what a stage does not train."""
    created = unet.created_parameters()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(stage == "joint" or (name in created) == (stage == "temporal"))
