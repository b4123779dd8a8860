"""Animating an image by a text, as DynamiCrafter does: what one step does, how it is measured and shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from inflate.data.buckets import Bucket
from inflate.data.pixels import unit
from inflate.errors import ConfigError, DataError
from inflate.families.dynamicrafter import Clips, Condition, DynamiCrafter, Told
from inflate.metrics.video import ssim
from inflate.models import image_stream
from inflate.models.moments import LatentMoments
from inflate.models.unet import VideoUNet
from inflate.models.visits import away, visiting
from inflate.sampling.animators import decoded
from inflate.sampling.dynamicrafter import Sampling, sample
from inflate.training.adapting import Adapting
from inflate.training.captions import encoded_text, text_of
from inflate.training.economy import as_loaded
from inflate.training.held_out import REMEDY, TOGETHER, fixed_losses, is_image, named_losses, same_size, size_of
from inflate.training.leakage import ConditionNoise
from inflate.training.loop import Player
from inflate.training.noise import Noise
from inflate.training.player import Batch, Selected
from inflate.training.previews import scores, write_pairs, write_scores
from inflate.training.stages import Stage
from inflate.training.timesteps import by_band, middles

FEATURES, ALL_FEATURES = "features", "frame_features"
"""What the image encoder makes of each clip's conditioning frame (B, P, E), and of all of its frames (B, F, P, E)."""


@dataclass
class ImageTextToVideo:
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
    timestep_power: float = 1.0
    """timesteps are the last one's share u ** power, u uniform: below 1, more of them are noisy, where it is decided
    how a clip moves"""
    condition_noise: ConditionNoise = ConditionNoise()
    """noise on the image's latent, where the model is shown that: against clips that stand still"""
    held_out_clips: int = 32
    """held-out clips that the loss is measured on"""
    bands: int = 4
    """bands of the timestep: the training loss is told for each, the held-out loss at its middle"""
    train_clips: int = 8
    """training clips that the same is measured on as on held-out ones, to tell overfitting; 0 = none"""
    preview_clips: int = 8
    """held-out clips that each preview animates, by their captions and first frames"""

    def __post_init__(self) -> None:
        rates = (self.drop_text, self.drop_image, self.drop_both)
        if min(rates) < 0 or sum(rates) > 1:
            raise ConfigError(
                "image_text_to_video: drop_text, drop_image and drop_both are shares: not below 0, not above 1 together"
            )
        if self.interpolation and self.condition_frame != "first":
            raise ConfigError(
                "image_text_to_video.interpolation=true gives both ends of a clip, of which the image encoder sees the "
                "first: set image_text_to_video.condition_frame=first"
            )
        if not 0 < self.timestep_power < math.inf:
            raise ConfigError(
                f"image_text_to_video.timestep_power={self.timestep_power}: must be positive; 1 is uniform"
            )
        if min(self.held_out_clips, self.bands, self.preview_clips) < 1 or self.train_clips < 0:
            raise ConfigError(
                "image_text_to_video: held_out_clips, bands and preview_clips must be at least 1, train_clips at "
                "least 0"
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


class ImageTextToVideoTask:
    """Trains `family.unet` to animate images by texts; measures and shows it on held-out clips.

    `context` trains the image stream alone, on single images, past the temporal layers; `adapt` that and the image
    model's layers, on clips; `joint` the same in a model that is also shown the image's latent; `finetune` everything.

    `held_out` and `training` are batches of one clip each (`pixels` (1, F, 3, H, W), `caption`, `fps`, `stride`,
    `number`). Where batches hold the clips' `latents` and what is encoded of captions and frames (`cached`), the
    encoders are on the device only while they work to look at the model. So many clips are measured `together`, at
    most: as many as a step has need no more memory than it.

    Beside an `adapter`, which is on the UNet, all else stays as it is, and the adapter alone is exported.
    """

    def __init__(
        self,
        family: DynamiCrafter,
        stage: Stage,
        settings: ImageTextToVideo,
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
        if settings.condition_noise.maximum and not family.takes_detail:
            raise ConfigError(
                "image_text_to_video.condition_noise is on the image's latent, which the model of "
                f"stage={stage} is not shown: leave it out"
            )
        self.family, self.stage, self.settings, self.sampling, self.seed = family, stage, settings, sampling, seed
        self.adapter, self.together = adapter, together
        encoders: list[nn.Module] = [family.vae, family.image_encoder, *family.text.networks]
        for module in encoders:
            module.requires_grad_(False).eval()
        self.frozen, self.visiting = ([], encoders) if cached else (encoders, [])
        self.no_text, self.no_image = family.embed([""]).context, family.null_image()  # (1, L, D), (1, P, E)
        self.held_out = held_out[: settings.held_out_clips]
        self.training = [*training[: settings.train_clips]]
        self.shown = self.held_out[: settings.preview_clips]
        if adapter is None:
            choose_trainable(family.unet, stage)
        self.players = [Player("unet", family.unet, lr=lr, loss=self.loss, remedy=REMEDY)]

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Selected]]:
        """The loss per sample (B,), fp32, of one batch; logged for each band of the timestep."""
        family, objective, settings = self.family, self.family.objective, self.settings
        clean = self.clean(batch, noise.device)  # (B, F, C, h, w)
        timestep = objective.timestep(noise.uniform("timestep") ** settings.timestep_power)  # (B,)
        seen = settings.condition_noise.add(clean, objective.time(timestep), noise)  # (B, F, C, h, w)
        rates = (settings.drop_text, settings.drop_both, settings.drop_image)
        condition = self.condition(batch, seen, noise).drop(noise.uniform("drop"), self.no_text, self.no_image, *rates)
        predict = family.predict(condition, self.players[0].network, self._single(batch))
        loss = objective.loss(predict, clean, timestep, noise.normal("noise", *clean.shape[1:]))  # (B, F)
        return loss.mean(dim=1), by_band(loss, timestep, self.settings.bands)

    def clean(self, batch: Batch, device: torch.device) -> Tensor:
        """The clips' scaled latents (B, F, C, h, w)."""
        if "latents" in batch:
            latents: Tensor = batch["latents"].to(device, self.family.vae.dtype)
            return latents
        return self.family.encode(batch["pixels"].to(device))

    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> Condition:
        """What the UNet is told of clips with these latents (B, F, C, h, w): one frame of each is the image."""
        family, frame = self.family, self.frame(clean, noise)  # (B,)
        number = family.clips.numbers(batch["fps"], batch["stride"]).to(noise.device)  # (B,)
        text, features = text_of(family, batch, noise.device), self.features(batch, frame)
        last = clean[:, -1] if self.settings.interpolation else None
        return family.condition(text, features, number, taken(clean, frame), clean.shape[1], last)

    def frame(self, clean: Tensor, noise: Noise) -> Tensor:
        """The place (B,) of each clip's conditioning frame."""
        first = self.settings.condition_frame == "first"
        return (noise.uniform("condition frame") * (not first) * clean.shape[1]).long()

    def features(self, batch: Batch, frame: Tensor) -> Tensor:
        """What the image encoder makes of each clip's conditioning frame: (B, P, E)."""
        family = self.family
        if FEATURES in batch:
            features: Tensor = batch[FEATURES]
        elif ALL_FEATURES in batch:
            features = taken(batch[ALL_FEATURES], frame)
        else:
            return family.embed_image(taken(batch["pixels"], frame).to(frame.device))
        return features.to(frame.device, family.vae.dtype)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on fixed noise: its mean, per timestep, per size, and with parts of the model left out.

        Without temporal layers, without text, without image tokens and without the image's latent: as much as it rises,
        the model has learned to make of each.
        """
        held_out, training = self.measured
        losses = self.fixed_losses(held_out)  # (N, levels)
        bypassed = losses if self.stage == "context" else self.fixed_losses(held_out, image_only=True)  # (N, levels)
        known = self.fixed_losses(training)
        named = [f"timestep {timestep}" for timestep in middles(self.settings.bands)]
        told = named_losses(losses, bypassed, known, named, [size_of(clip) for clip in self.held_out])
        for part in ("text", "image tokens", *(["image latent"] if self.family.takes_detail else [])):
            told[f"held-out loss, without {part}"] = float(self.fixed_losses(held_out, without=part).mean())
        return told

    @cached_property
    def measured(self) -> tuple[list[Batch], list[Batch]]:
        """The held-out clips and those of training as a cache holds them, on the CPU: encoded once in a run.

        Each encoder is on the device while it works.
        """
        family, device, clips = self.family, self._device(), [*self.held_out, *self.training]
        with away(self._idle()), visiting([family.vae], device):
            encoded = [self._without_pixels(clip) | {"latents": self.clean(clip, device).cpu()} for clip in clips]
        with away(self._idle()), visiting([family.image_encoder], device):
            for clip, found in zip(clips, encoded, strict=True):
                frame = self.frame(found["latents"], Noise(self.seed, clip["number"], device))
                found[FEATURES] = self.features(clip, frame).cpu()
        with visiting(family.text.networks, device):
            for clip in encoded:
                clip |= encoded_text(family, clip)
        return encoded[: len(self.held_out)], encoded[len(self.held_out) :]

    @staticmethod
    def _without_pixels(clip: Batch) -> Batch:
        return {name: value for name, value in clip.items() if name not in ("pixels", ALL_FEATURES)}

    def fixed_losses(self, clips: list[Batch], image_only: bool = False, without: str = "") -> Tensor:
        """The loss of each clip at each timestep (N, levels), float64, on noise fixed by the seed and its number."""

        def measure(batch: Batch, noise: Noise) -> Tensor:
            clean = self.clean(batch, noise.device)
            condition = self.lacking(self.condition(batch, clean, noise), without)
            predict = self.family.predict(condition, self.players[0].network, image_only or self._single(batch))
            fixed, objective = noise.normal("held-out", *clean.shape[1:]), self.family.objective
            steps = torch.tensor(middles(self.settings.bands), device=noise.device)[:, None]  # (levels, 1)
            steps = steps.expand(-1, len(clean))  # (levels, B)
            return torch.stack([objective.loss(predict, clean, one, fixed).mean(1) for one in steps], dim=1)

        return fixed_losses(clips, self.settings.bands, self.seed, self._device(), measure, self.together)

    def lacking(self, condition: Condition, part: str) -> Condition:
        """The condition without a part of it, or as it is."""
        if part == "text":
            return replace(condition, text=self.no_text.to(condition.text).expand_as(condition.text))
        if part == "image tokens":
            return replace(condition, image=None)
        if part == "image latent" and condition.detail is not None:
            return replace(condition, detail=torch.zeros_like(condition.detail))
        return condition

    def preview(self, folder: Path) -> None:
        """Animate the first held-out clips: an mp4 each, a contact sheet per size (truth above sample), prompts.txt.

        `scores.json` holds the mean over all of them.
        """
        lines = [f"{place:02d} {clip['caption'][0]}" for place, clip in enumerate(self.shown)]
        (folder / "prompts.txt").write_text("\n".join(lines) + "\n")
        found = []
        for places, truth, generated, measured in self.drawn():
            write_pairs(folder, self.shown, places, truth, generated)
            found += [measured] * len(places)
        write_scores(folder, found)

    def drawn(self) -> Iterator[tuple[list[int], Tensor, Tensor, dict[str, float]]]:
        """What a preview shows, by size: places of clips, the clips, their animations (`animate`) and `score`."""
        for places in same_size(self.shown, len(self.shown)):
            truth = torch.cat([self.shown[place]["pixels"] for place in places])
            generated = self.animate(places)
            yield places, truth, generated, self.score(truth, generated)

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

    @torch.no_grad()
    def score(self, truth: Tensor, generated: Tensor) -> dict[str, float]:
        """How close animations come to their clips (`previews.scores`), and to the given frames in structure."""
        family, device = self.family, self._device()
        with visiting([family.vae], device):
            given = torch.cat([decoded(family, family.encode(clip.to(device))).cpu() for clip in truth.split(1)])
        found = scores(truth, generated, given)
        places = {"frame 0": slice(0, 1)} | ({"last frame": slice(-1, None)} if self.settings.interpolation else {})
        for name, place in places.items():
            for what, clip in (("sample", generated), ("autoencoder", given)):
                found[f"{name} ssim, {what}"] = float(ssim(unit(clip[:, place]), unit(truth[:, place])).mean())
        return found

    def export(self, folder: Path) -> None:
        """Write the adapter, the image stream alone (`context`), or the model as `DynamiCrafter.load` reads it."""
        if self.adapter is not None:
            self.adapter.export(self.family.unet, folder)
        elif self.stage == "context":
            image_stream.save(self.family.unet, self.family.image_encoder, folder)
        else:
            self._keep_moments()
            with as_loaded(self.family.unet):
                self.family.save_pretrained(folder)

    def _keep_moments(self) -> None:
        """Let the family know what the latents of the measured clips are like, for sampling from a lower timestep."""
        held_out, training = self.measured
        self.family.moments = LatentMoments.of(clip["latents"] for clip in [*held_out, *training])

    def _single(self, batch: Batch) -> bool:
        """Whether a batch is of images, which the temporal layers do not see."""
        return self.stage == "context" or is_image(batch)

    def _idle(self) -> list[nn.Module]:
        """What may leave the device while encoders and the decoder work: the UNet of a run of one process.

        Of several, it stays: PyTorch forgets the hooks by which they exchange gradients where a weight changes its
        device.
        """
        return [] if torch.distributed.is_initialized() else [self.family.unet]

    def _device(self) -> torch.device:
        return next(self.players[0].network.parameters()).device


def taken(frames: Tensor, place: Tensor) -> Tensor:
    """One frame of each clip: of (B, F, ...), at places (B,), (B, ...)."""
    return frames[torch.arange(len(frames), device=frames.device), place.to(frames.device)]


def choose_trainable(unet: VideoUNet, stage: Stage) -> None:
    """Freeze what a stage does not train: all but the image stream, the temporal layers, or nothing."""
    image, temporal = unet.image_parameters(), unet.temporal_parameters()
    for name, parameter in unet.named_parameters():
        wanted = {"context": name in image, "finetune": True}.get(stage, name not in temporal)
        parameter.requires_grad_(wanted)
