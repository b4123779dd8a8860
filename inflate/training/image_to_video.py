"""Image-to-video fine-tuning of Stable Video Diffusion: what one step does, how it is measured and shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor, nn

from inflate.data.clips import Frames
from inflate.errors import ConfigError, DataError
from inflate.families.svd import SVD, Condition, assemble
from inflate.models.moments import LatentMoments
from inflate.models.unet import VideoUNet
from inflate.models.visits import away, visiting
from inflate.sampling.svd import Sampling, decoded, sample
from inflate.training.adapting import Adapting
from inflate.training.clip_task import ClipTask
from inflate.training.held_out import (
    REMEDY,
    TOGETHER,
    band_name,
    fixed_losses,
    is_image,
    named_losses,
    same_size,
    size_of,
)
from inflate.training.leakage import ConditionNoise
from inflate.training.loop import Player
from inflate.training.noise import Noise
from inflate.training.player import Batch, Selected
from inflate.training.previews import Drawn, scores, write_drawn


@dataclass
class ImageToVideo:
    """Settings of image-to-video fine-tuning (Stable Video Diffusion, appendix D)."""

    trainable: Literal["all", "temporal"] = "all"
    """all: every weight, as the paper does; temporal: what inflation created, and the input convolution"""
    P_mean: float = 0.7
    """mean of the log noise level in training: higher for larger frames (0.7 at 320x576, 1.0 at 576x1024)"""
    P_std: float = 1.6
    """its standard deviation"""
    drop_both: float = 0.10
    """share of samples without image embedding and image latent, the null condition of guidance"""
    drop_embedding: float = 0.05
    """share of samples without image embedding only"""
    drop_image: float = 0.05
    """share of samples without image latent only"""
    noise_aug_mean: float = -3.0
    """mean of the log noise added to the conditioning frame's pixels"""
    noise_aug_std: float = 0.5
    """its standard deviation"""
    condition_noise: ConditionNoise = ConditionNoise()
    """noise on the conditioning latent beside that, which the model is not told: against clips that stand still"""
    held_out_clips: int = 32
    """held-out clips that the loss is measured on"""
    bands: int = 4
    """bands of the noise level, equally likely in training: the training loss is told for each, the held-out loss at
    its middle"""
    train_clips: int = 8
    """training clips that the same is measured on as on held-out ones, to tell overfitting; 0 = none"""
    preview_clips: int = 4
    """held-out clips that each preview animates; images are passed over"""

    def __post_init__(self) -> None:
        rates = (self.drop_both, self.drop_embedding, self.drop_image)
        if min(rates) < 0 or sum(rates) > 1:
            raise ConfigError(
                "image_to_video: drop_both, drop_embedding and drop_image are shares: not below 0, not above 1 together"
            )
        if min(self.held_out_clips, self.bands, self.preview_clips) < 1 or self.train_clips < 0:
            raise ConfigError(
                "image_to_video: held_out_clips, bands and preview_clips must be at least 1, train_clips at least 0"
            )


@dataclass
class Preview:
    """How previews are sampled; length, frame rate, motion bucket and seed are each held-out clip's own."""

    steps: int = 25
    """denoising steps"""
    guidance_min: float = 1.0
    """guidance scale of the first frame"""
    guidance_max: float = 3.0
    """guidance scale of the last frame; up to 1 there is no guidance, at half the cost"""
    noise_aug: float = 0.02
    """noise added to the first frame, a sigma in pixel values of [-1, 1]"""
    sigma_max: float | None = None
    """noise level to start from; none: the model's highest. A lower one, 100 of 700, draws more motion"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clip; none: where it
    is large, of more than 8 frames of 512x512"""


class ImageToVideoTask(ClipTask):
    """Trains `family.unet` to animate a clip's first frame; measures and shows it on held-out clips.

    `held_out` are batches of one clip each (`pixels` (1, F, 3, H, W), `fps`, `motion`, `number`), of one or more sizes;
    some must have two frames or more, else DataError. A clip of one frame is an image: the temporal layers are
    bypassed, and the UNet is shown its embedding but not its latent, which would be the answer. `training` are such
    batches of clips that are trained on.

    `frames` says which frames a step encodes: all; the first alone, whose noise is on its pixels, where batches hold
    the clips' `latents` and `context` and the `first` frame; or none, where they also hold `image_latents` (B, K, ...)
    at the noise levels `augs` (B, K). An encoder that no step needs is on the device only while it works to look at the
    model. So many clips are measured `together`, at most: as many as a step has need no more memory than it.

    Beside an `adapter`, which is on the UNet, all else stays as it is, and the adapter alone is exported.
    """

    family: SVD

    def __init__(
        self,
        family: SVD,
        settings: ImageToVideo,
        held_out: list[Batch],
        sampling: Preview,
        lr: float,
        seed: int,
        training: Sequence[Batch] = (),
        frames: Frames = "all",
        adapter: Adapting | None = None,
        together: int = TOGETHER,
    ) -> None:
        family.objective = replace(family.objective, P_mean=settings.P_mean, P_std=settings.P_std)
        self.family, self.settings, self.sampling, self.seed = family, settings, sampling, seed
        self.adapter, self.together = adapter, together
        needed: dict[Frames, list[nn.Module]] = {"all": [family.vae, family.image_encoder], "first": [family.vae]}
        self.frozen = needed.get(frames, [])
        self.visiting = [one for one in needed["all"] if one not in self.frozen]
        self.held_out = held_out[: settings.held_out_clips]
        self.training = [*training[: settings.train_clips]]
        self.bands = self._bands()
        self.shown = [clip for clip in self.held_out if not is_image(clip)][: settings.preview_clips]
        if not self.shown:
            raise DataError("the held-out clips (data.held_out) are images: previews need clips of two frames or more")
        for module in needed["all"]:
            module.requires_grad_(False).eval()
        if adapter is None:
            choose_trainable(family.unet, settings.trainable)
        self.players = [Player("unet", family.unet, lr=lr, loss=self.loss, remedy=REMEDY)]

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Selected]]:
        """The EDM loss per sample (B,), fp32, of one batch; logged for each band of the noise level."""
        family, objective = self.family, self.family.objective
        clean = self.clean(batch, noise.device)  # (B, F, C, h, w)
        sigma = objective.sigma(noise.normal("sigma"))  # (B,)
        condition = self.obscured(self.condition(batch, noise), batch, sigma, noise).drop(
            noise.uniform("drop"), self.settings.drop_both, self.settings.drop_embedding, self.settings.drop_image
        )
        predict = family.predict(condition, self.players[0].network, is_image(batch))
        loss = objective.loss(predict, clean, sigma, noise.normal("noise", *clean.shape[1:]))  # (B,)
        return loss, {name: Selected(loss, (low <= sigma) & (sigma < high)) for name, (low, high) in self.bands.items()}

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The condition of each clip's first frame, noise-augmented by a draw of its own; of an image, without it."""
        family, device = self.family, noise.device
        known = batch.get("context")
        context = family.embed(first_frame(batch).to(device)) if known is None else known.to(device, family.vae.dtype)
        latent, aug = drawn(batch, noise) if "image_latents" in batch else self._noised(batch, noise)
        told = batch["fps"].to(device), family.motion.bucket(batch["motion"].to(device))
        condition = assemble(context, latent, *told, aug)
        return condition.without_image() if is_image(batch) else condition

    def obscured(self, condition: Condition, batch: Batch, sigma: Tensor, noise: Noise) -> Condition:
        """The condition with the noise on its latent that clips at noise levels (B,) are trained under.

        An image's latent is withheld and stays so.
        """
        if is_image(batch):
            return condition
        time, deviation = self.family.objective.time(sigma), 1.0 / self.family.vae.config.scaling_factor
        latent = self.settings.condition_noise.add(condition.image_latent, time, noise, deviation)
        return replace(condition, image_latent=latent)

    def _noised(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """The latent (B, C, h, w) of each clip's first frame with noise on its pixels, and the noise's level (B,)."""
        first = first_frame(batch).to(noise.device)  # (B, 3, H, W)
        aug = torch.exp(self.settings.noise_aug_mean + self.settings.noise_aug_std * noise.normal("aug"))  # (B,)
        return self.family.image_latent(first, aug, noise.normal("aug pixels", *first.shape[1:])), aug

    @cached_property
    def measured(self) -> tuple[list[Batch], list[Batch]]:
        """The held-out clips and those of training as a cache holds them, on the CPU: encoded once in a run.

        Each encoder is on the device while it works.
        """
        family, device, clips = self.family, self._device(), [*self.held_out, *self.training]
        with away(self._idle()), visiting([family.vae], device):
            encoded = [self._with_latents(clip, device) for clip in clips]
        with away(self._idle()), visiting([family.image_encoder], device):
            for clip, found in zip(clips, encoded, strict=True):
                if "context" not in found:
                    found["context"] = family.embed(first_frame(clip).to(device)).cpu()
        return encoded[: len(self.held_out)], encoded[len(self.held_out) :]

    def _with_latents(self, clip: Batch, device: torch.device) -> Batch:
        """A clip with its latents and its first frame's, noised by the draw that is fixed for it, without pixels."""
        found = {name: value for name, value in clip.items() if name not in ("pixels", "first")}
        if "image_latents" not in clip:
            latent, aug = self._noised(clip, Noise(self.seed, clip["number"], device))
            found |= {"image_latents": latent[:, None].cpu(), "augs": aug[:, None].cpu()}
        return {**found, "latents": self.clean(clip, device).cpu()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The loss on fixed noise: its mean, per noise level, per size, and with temporal layers bypassed.

        The means are over held-out clips, whatever their size; sizes are told apart where there are several. The mean
        over clips of the training set is told as well.
        """
        levels = self.levels()
        held_out, training = self.measured
        losses = self.fixed_losses(held_out, levels)  # (N, levels)
        bypassed = self.fixed_losses(held_out, levels, image_only=True)  # (N, levels)
        known = self.fixed_losses(training, levels)
        named = [f"sigma {sigma:.3g}" for sigma in levels]
        return named_losses(losses, bypassed, known, named, [size_of(clip) for clip in self.held_out])

    def levels(self) -> list[float]:
        """The noise levels of the held-out loss: the middles of the bands."""
        return [self._sigma((band + 0.5) / self.settings.bands) for band in range(self.settings.bands)]

    def _bands(self) -> dict[str, tuple[float, float]]:
        """Least noise level and limit of each band, by name; none where all are one."""
        edges = [self._sigma(band / self.settings.bands) for band in range(1, self.settings.bands)]
        limits = pairwise([0.0, *edges, math.inf]) if edges else ()
        return {f"loss at sigma {band_name(low, high)}": (low, high) for low, high in limits}

    def _sigma(self, share: float) -> float:
        """The noise level that a share of training is below."""
        return float(self.family.objective.sigma(torch.tensor([NormalDist().inv_cdf(share)])))

    def fixed_losses(self, clips: list[Batch], levels: list[float], image_only: bool = False) -> Tensor:
        """The loss of each clip at each noise level (N, levels), float64, on noise fixed by the seed and its number."""

        def measure(batch: Batch, noise: Noise) -> Tensor:
            clean = self.clean(batch, noise.device)
            predict = self.family.predict(
                self.condition(batch, noise), self.players[0].network, image_only or is_image(batch)
            )
            fixed, objective = noise.normal("held-out", *clean.shape[1:]), self.family.objective
            sigmas = torch.tensor(levels, device=clean.device)[:, None].expand(-1, len(clean))  # (levels, B)
            return torch.stack([objective.loss(predict, clean, sigma, fixed) for sigma in sigmas], dim=1)

        return fixed_losses(clips, len(levels), self.seed, self._device(), measure, self.together)

    def preview(self, folder: Path) -> None:
        """Animate the first held-out clips' first frames: an mp4 each, a contact sheet per size (truth above sample).

        `scores.json` holds the mean over all of them.
        """
        write_drawn(folder, self.shown, self.drawn())

    def drawn(self) -> Iterator[Drawn]:
        """What a preview shows, by size: places of clips, these and their animations (`animate`) by name, `score`."""
        for places in same_size(self.shown, len(self.shown)):
            truth, generated = self.animate([self.shown[place] for place in places], places)
            yield places, {"truth": truth, "sample": generated}, self.score(truth, generated)

    @torch.no_grad()
    def animate(self, batches: list[Batch], numbers: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Clips of one size and their animations from the first frame: both (N, F, 3, H, W) in [-1, 1].

        The seeds are fixed, by the clips' `numbers`, which are their places if not given.
        """
        truth = torch.cat([batch["pixels"] for batch in batches])
        if self.sampling.sigma_max is not None:
            self._keep_moments()
        generated = []
        for number, batch in zip(numbers or range(len(batches)), batches, strict=True):
            bucket = int(self.family.motion.bucket(batch["motion"])[0])
            settings = Sampling(
                **asdict(self.sampling), fps=float(batch["fps"][0]), motion_bucket=bucket, frames=truth.shape[1],
                seed=self.seed + number,
            )  # fmt: skip
            first = batch["pixels"][:, 0].to(self._device())
            generated.append(sample(self.family, first, settings, idle=self._idle()).cpu())
        return truth, torch.cat(generated)

    @torch.no_grad()
    def score(self, truth: Tensor, generated: Tensor) -> dict[str, float]:
        """How close animations come to their clips: PSNR in dB, flicker error in [0, 1] units, means over clips."""
        family, device = self.family, self._device()
        with visiting([family.vae], device):
            latents = [family.encode(clip.to(device)) for clip in truth.split(1)]  # (1, F, C, h, w) each
            given = torch.cat(
                [decoded(family, one, self.sampling.little_memory, self._idle()).cpu() for one in latents]
            )
        return scores(truth, generated, given)

    def export(self, folder: Path) -> None:
        """Write the adapter or, without one, the whole model as diffusers' StableVideoDiffusionPipeline loads it."""
        if self.adapter is None:
            self._keep_moments()
        super().export(folder)

    def _keep_moments(self) -> None:
        """Let the family know what the latents of the measured clips are like, for sampling from a lower level."""
        held_out, training = self.measured
        self.family.moments = LatentMoments.of(clip["latents"] for clip in [*held_out, *training])


def drawn(batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
    """One of each sample's cached condition frames: its latent (B, C, h, w) and the level of its noise (B,)."""
    latents, augs = (batch[name].to(noise.device) for name in ("image_latents", "augs"))  # (B, K, C, h, w), (B, K)
    taken, rows = (noise.uniform("cached draw") * augs.shape[1]).long(), torch.arange(len(augs), device=noise.device)
    return latents[rows, taken], augs[rows, taken]


def choose_trainable(unet: VideoUNet, trainable: Literal["all", "temporal"]) -> None:
    """Freeze what is not trained, and what gets no gradient while the context is one token.

    A softmax over one key is 1, so cross-attention's queries and keys are dead weights in Stable Video Diffusion: left
    trainable they drift by weight decay and hang distributed training. `temporal` trains what inflation created, and
    the input convolution, through which the image latent enters.
    """
    chosen = {**unet.created_parameters(), **dict(unet.conv_in.named_parameters(prefix="conv_in"))}
    inert = unet.inert_parameters()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name not in inert and (trainable == "all" or name in chosen))


def first_frame(batch: Batch) -> Tensor:
    """The clips' first frames (B, 3, H, W) in [-1, 1]."""
    frame: Tensor = batch["first"] if "first" in batch else batch["pixels"][:, 0]
    return frame
