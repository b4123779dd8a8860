"""Fine-tuning a decoder on clips: reconstruction, perceptual distance and an adversarial video discriminator.

Source: Blattmann et al., Align your Latents (2023), section 3.1.1: temporal layers in the decoder only, a patch-wise
discriminator of 3D convolutions, the encoder and with it the latent space left as they are. The adaptive weight is
that of Esser et al., Taming Transformers (2021), section 3.1.

A video model's latents are not an encoder's: they carry noise of their own in each frame. Clips are therefore decoded
from latents with per-frame noise of a random level, some from clean ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from inflate.data.pixels import to_uint8, unit
from inflate.data.video import contact_sheet, write
from inflate.errors import ConfigError, TrainingError
from inflate.measures import TRAINING
from inflate.metrics.perceptual import framewise, perceptual_distance
from inflate.metrics.video import flicker_error, power_spectrum, psnr, sharpness, spectrum_distance, ssim
from inflate.models.discriminator import ImageDiscriminator, VideoDiscriminator
from inflate.models.streaming import requiring_gradient
from inflate.models.vae import VideoVAE, decode_clips, encode_clips, encoder_sha256, streams
from inflate.objectives import at_least_float32, hinge_discriminator_loss, hinge_generator_loss
from inflate.training.decoder_settings import Decoder, check
from inflate.training.noise import Noise
from inflate.training.player import Batch, Player

__all__ = ["Decoder", "DecoderTask", "adaptive_weight"]

Logs = dict[str, Tensor]


class LatentDecoder(nn.Module):
    """The trained network as the loop sees it: scaled latents (B, F, C, h, w) to pixels (B, F, 3, H, W)."""

    def __init__(self, vae: AutoencoderKL, temporal: bool) -> None:
        super().__init__()
        self.vae, self.temporal = vae, temporal

    def forward(self, latents: Tensor) -> Tensor:
        return decode_clips(self.vae, latents, temporal=self.temporal)


def add_noise(latents: Tensor, noise: Noise, settings: Decoder) -> Tensor:
    """Per-frame Gaussian noise on scaled latents (B, F, C, h, w), its level drawn per clip, none on a share of them."""
    low, high = settings.latent_noise
    level = low + (high - low) * noise.uniform("decoder noise level")  # (B,)
    level = level * (noise.uniform("decoder clean") >= settings.clean_share)
    draws = noise.normal("decoder noise", *latents.shape[1:])  # (B, F, C, h, w)
    return latents + (level.view(-1, 1, 1, 1, 1) * draws).to(latents)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, output: Tensor, last: nn.Parameter, bounds: tuple[float, float]
) -> Tensor:
    """|gradient of reconstruction| / |gradient of adversarial| at the weight `last`, per sample (B,), within `bounds`.

    One per sample, so that it does not depend on how samples fall into batches. `output` (B, F, 3, H, W) is what both
    losses (B,) were computed from, `last` a weight that it depends on. The gradients are those of the bare graph: no
    gradient is accumulated, no hook of a distributed wrapper runs.
    """
    towards_truth = _weight_gradient(reconstruction, output, last)  # (B,)
    towards_critic = _weight_gradient(adversarial, output, last)  # (B,)
    return (towards_truth / towards_critic.clamp(min=1e-12)).clamp(*bounds)  # (B,)


def _weight_gradient(loss: Tensor, output: Tensor, last: nn.Parameter) -> Tensor:
    """Norm of each sample's gradient at `last`, at least float32: (B,)."""
    pixels = torch.autograd.grad(loss.sum(), output, retain_graph=True)[0]  # (B, F, 3, H, W)
    norms = []
    for number in range(len(output)):
        own = torch.zeros_like(pixels)
        own[number] = pixels[number]
        norms.append(at_least_float32(torch.autograd.grad(output, last, own, retain_graph=True)[0]).norm())
    return torch.stack(norms)  # (B,)


class DecoderTask:
    """A decoder and its discriminators as a task of the training loop.

    vae: a `VideoVAE`, or any AutoencoderKL where `settings.temporal` is off; its decoder is trained in place, all else
    is frozen. held_out: clips (N, F, 3, H, W) in [-1, 1] of the training length. export: writes the result into a new
    folder. training: clips (F, 3, H, W) of one size that are trained on. Make the task before training begins, with the
    VAE on the device it will run on: the VAE's frame-wise path at that moment is the parent that results are compared
    with. Raises ConfigError.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        settings: Decoder,
        held_out: Tensor,
        export: Callable[[Path], None],
        seed: int = 0,
        fps: float = 8.0,
        training: Sequence[Tensor] = (),
    ) -> None:
        check(settings)
        if settings.temporal and not isinstance(vae, VideoVAE):
            raise ConfigError("decoder.temporal=true needs an inflated VAE; a 2D one needs decoder.temporal=false")
        if held_out.ndim != 5 or not len(held_out) or held_out.shape[1] < 2:
            raise ConfigError(f"held-out clips must be (N >= 1, F >= 2, 3, H, W), got {tuple(held_out.shape)}")
        self.vae, self.settings, self.fps, self._export = vae, settings, fps, export
        self.perceptual = self._perceptual()
        _select_trainable(vae, settings)
        self.critics = _critics(settings, seed)
        self.decoder = Player("decoder", LatentDecoder(vae, settings.temporal), self._decoder_loss, settings.lr)
        self.players = [self.decoder, *(self._critic(name, network) for name, network in self.critics.items())]
        self.frozen: list[nn.Module] = [self.perceptual] if settings.perceptual else []
        self.visiting: list[nn.Module] = []
        self.encoder_sha256 = encoder_sha256(vae)
        self.held_out = HeldOut(vae, held_out, settings.held_out_noise, seed)
        shown = training[: settings.train_clips]
        self.training = FixedClips(vae, torch.stack([*shown]), settings.held_out_noise, seed) if shown else None
        self._left: tuple[Batch, Tensor] | None = None

    def _decoder_loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, Logs]:
        """Reconstruction and, from `adversarial_start` on, deceiving the discriminators: (B,).

        Leaves its output for the discriminators' turns on the same batch.
        """
        settings, last = self.settings, self.vae.decoder.conv_out.weight
        acting = [*self.critics.values()] if step >= settings.adversarial_start else []
        real, latents = self._corrupt(batch, noise)
        with requiring_gradient([last] if acting else []):  # frozen again before gradients accumulate
            fake = at_least_float32(self.decoder.network(latents))  # (B, F, 3, H, W)
            self._left = batch, fake.detach()
            loss, logs = self._reconstruction(fake, real)  # (B,)
            if acting:
                deceived = torch.stack([_per_clip(hinge_generator_loss, critic(fake)) for critic in acting])
                adversarial = deceived.mean(0)  # (B,)
                weight = adaptive_weight(loss, adversarial, fake, last, settings.adaptive_bounds)  # (B,)
                loss = loss + settings.adversarial * weight * adversarial
                logs |= {"adversarial": adversarial.detach(), "adaptive_weight": weight}
        return loss, logs

    def _critic(self, name: str, network: nn.Module) -> Player:
        """A discriminator as a player: hinge loss on a batch's clips and the decoder's reconstructions of them."""

        def loss(batch: Batch, noise: Noise, step: int) -> tuple[Tensor, Logs]:
            both = torch.cat([batch["pixels"], self._reconstructed(batch, noise)])  # (2B, F, 3, H, W)
            real, fake = at_least_float32(player.network(both)).chunk(2)  # (B, ...) each
            logs = {"real": real.detach().flatten(1).mean(1), "fake": fake.detach().flatten(1).mean(1)}  # (B,) each
            return _per_clip(hinge_discriminator_loss, real, fake), logs

        start = self.settings.adversarial_start - self.settings.discriminator_lead
        player = Player(name, network, loss, self.settings.discriminator_lr, start)
        return player

    def _corrupt(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """A batch's clips (B, F, 3, H, W) and their noisy scaled latents (B, F, C, h, w)."""
        real: Tensor = batch["pixels"]
        latents = batch["latents"].to(self.vae.dtype) if "latents" in batch else encode_clips(self.vae, real)
        return real, add_noise(latents, noise, self.settings)

    def _reconstruction(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Logs]:
        """Pixel and perceptual loss per clip (B,)."""
        settings, difference = self.settings, fake - real
        l1, l2 = difference.abs().flatten(1).mean(1), difference.square().flatten(1).mean(1)  # (B,)
        loss, logs = settings.l1 * l1 + settings.l2 * l2, {"l1": l1.detach()}
        if settings.perceptual:
            images = fake.flatten(0, 1), real.flatten(0, 1)  # (B*F, 3, H, W) each
            distance = framewise(self.perceptual, *images) if streams(self.vae) else self.perceptual(*images)  # (B*F,)
            distance = distance.unflatten(0, real.shape[:2]).mean(1)  # (B,)
            loss, logs["perceptual"] = loss + settings.perceptual * distance, distance.detach()
        return loss, logs

    def _reconstructed(self, batch: Batch, noise: Noise) -> Tensor:
        """The reconstruction left for this batch, without gradient; decoded anew if another batch's was left."""
        if self._left is not None and self._left[0] is batch:
            return self._left[1]
        with torch.no_grad():
            latents = self._corrupt(batch, noise)[1]
            return at_least_float32(decode_clips(self.vae, latents, temporal=self.settings.temporal))

    def evaluate(self) -> dict[str, float]:
        """Held-out measures of the present decoder and of its parent (`parent/...`), on clean and on noisy latents; the
        PSNR on training clips (`training-clip ...`).

        PSNR (dB), SSIM, flicker error, and over the upper half of the frequencies the sharpness (1 = as real) and the
        spectrum distance (decades), as `inflate.metrics.video` defines them. Raises TrainingError if the encoder has
        changed.
        """
        self.check_encoder()
        now = self.held_out.measure(self.vae, self.settings.temporal)
        known = self.training.measure(self.vae, self.settings.temporal) if self.training else {}
        now |= {TRAINING[name]: value for name, value in known.items() if name in TRAINING}
        return now | {f"parent/{name}": value for name, value in self.held_out.parent.items()}

    def preview(self, folder: Path) -> None:
        """An mp4 and a contact sheet per held-out clip: truth, frame-wise parent and present, from noisy latents."""
        for number, drawn in enumerate(self.drawn()):
            clips = {label: to_uint8(clip[0]) for label, clip in drawn.items()}
            write(folder / f"decoder-{number:02d}.mp4", np.concatenate(list(clips.values()), axis=2), self.fps)
            contact_sheet(folder / f"decoder-{number:02d}.png", list(clips.values()), list(clips))

    def drawn(self) -> Iterator[dict[str, Tensor]]:
        """What a preview shows of each clip, from noisy latents, by label: (1, F, 3, H, W) in [0, 1]."""
        for number in range(min(self.settings.previews, len(self.held_out.pixels))):
            yield self.held_out.shown(self.vae, self.settings.temporal, number)

    def export(self, folder: Path) -> None:
        """Write the result by the recipe's own exporter, and into it `decoder.json`, the record of the training."""
        self.check_encoder()
        self._export(folder)
        (folder / "decoder.json").write_text(json.dumps(self.record(), indent=2) + "\n", encoding="utf-8")

    def record(self) -> dict[str, Any]:
        """What the result rests on: the encoder's hash before and after, the clip length, what was trained."""
        trained = [p.numel() for p in self.vae.parameters() if p.requires_grad]
        return {
            "encoder_sha256_before": self.encoder_sha256,
            "encoder_sha256_after": encoder_sha256(self.vae),
            "decode_chunk": self.held_out.pixels.shape[1],
            "temporal": self.settings.temporal,
            "trainable": self.settings.trainable,
            "trained_parameters": sum(trained),
            "perceptual_distance": type(self.perceptual).__name__ if self.settings.perceptual else "none",
        }

    def check_encoder(self) -> None:
        """Raise TrainingError if the encoder is no longer the one that the run began with."""
        if encoder_sha256(self.vae) != self.encoder_sha256:
            raise TrainingError(
                "the encoder has changed while the decoder was trained: load the VAE anew and start again"
            )

    def _perceptual(self) -> nn.Module:
        if not self.settings.perceptual:
            return nn.Identity()
        return perceptual_distance(self.settings.vgg_weights, self.settings.lpips_heads, self.vae)


class FixedClips:
    """Fixed clips (N, F, 3, H, W) with noise fixed by the seed and their places.

    Everything is kept on the CPU and decoded one clip at a time on the VAE's device.
    """

    def __init__(self, vae: AutoencoderKL, pixels: Tensor, noise: float, seed: int) -> None:
        self.pixels = pixels.detach().float().cpu()
        device = _device(vae)
        self.latents = torch.cat(
            [encode_clips(vae, clip[None].to(device)).cpu() for clip in self.pixels]
        )  # (N, F, C, h, w)
        draws = Noise(seed, torch.arange(len(pixels))).normal("held-out noise", *self.latents.shape[1:])
        self.noise = noise * draws  # (N, F, C, h, w)

    @torch.no_grad()
    def decoded(self, vae: AutoencoderKL, temporal: bool, number: int, noisy: bool) -> Tensor:
        """One clip as the decoder gives it back: (1, F, 3, H, W) in [0, 1]."""
        latents = self.latents[number] + (self.noise[number] if noisy else 0.0)  # (F, C, h, w)
        return unit(decode_clips(vae, latents[None].to(_device(vae)), temporal=temporal).float().cpu())

    def measure(self, vae: AutoencoderKL, temporal: bool) -> dict[str, float]:
        """Means over clips, by `clean/...` and `noisy/...`."""
        return self._measure(vae, temporal, False) | self._measure(vae, temporal, True)

    def _measure(self, vae: AutoencoderKL, temporal: bool, noisy: bool) -> dict[str, float]:
        sums: dict[str, float] = {}
        spectra = []
        for number, pixels in enumerate(self.pixels):
            truth, output = unit(pixels[None]), self.decoded(vae, temporal, number, noisy)
            for name, metric in (("psnr", psnr), ("ssim", ssim), ("flicker", flicker_error)):
                sums[name] = sums.get(name, 0.0) + float(metric(output, truth)) / len(self.pixels)
            spectra.append(torch.cat([power_spectrum(output), power_spectrum(truth)]))  # (2, rings)
        spectrum, true_spectrum = torch.stack(spectra).sum(0)  # (rings,) each
        sums["sharpness"] = float(sharpness(spectrum, true_spectrum))
        sums["spectrum_distance"] = float(spectrum_distance(spectrum, true_spectrum))
        return {f"{'noisy' if noisy else 'clean'}/{name}": value for name, value in sums.items()}


class HeldOut(FixedClips):
    """Clips that are not trained on, and what the parent decoder, frame by frame, makes of them."""

    def __init__(self, vae: AutoencoderKL, pixels: Tensor, noise: float, seed: int) -> None:
        super().__init__(vae, pixels, noise, seed)
        self.parent = self.measure(vae, False)
        self.parent_clips = [self.decoded(vae, False, number, noisy=True) for number in range(len(self.pixels))]

    def shown(self, vae: AutoencoderKL, temporal: bool, number: int) -> dict[str, Tensor]:
        """Rows to look at, by label: (1, F, 3, H, W) in [0, 1], the reconstructions from noisy latents."""
        now = self.decoded(vae, temporal, number, noisy=True)
        return {"truth": unit(self.pixels[number][None]), "frame-wise": self.parent_clips[number], "now": now}


def _select_trainable(vae: AutoencoderKL, settings: Decoder) -> None:
    temporal = vae.temporal_parameters() if isinstance(vae, VideoVAE) else {}
    chosen = dict(temporal)
    if settings.trainable == "decoder":
        chosen = {f"decoder.{name}": parameter for name, parameter in vae.decoder.named_parameters()}
    if not settings.temporal:  # they take no part: distributed training would wait for their gradients for ever
        chosen = {name: parameter for name, parameter in chosen.items() if name not in temporal}
    vae.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)


def _critics(settings: Decoder, seed: int) -> dict[str, nn.Module]:
    if not settings.adversarial:
        return {}
    shape = (settings.discriminator_channels, settings.discriminator_layers, settings.discriminator_norm)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critics: dict[str, nn.Module] = {"discriminator": VideoDiscriminator(*shape, settings.temporal_stride)}
        if settings.image_adversarial:
            critics["image_discriminator"] = ImageDiscriminator(*shape)
    return critics


def _per_clip(loss: Callable[..., Tensor], *logits: Tensor) -> Tensor:
    """A loss that reduces to a scalar, for each clip alone: (B,)."""
    return torch.stack([loss(*clips) for clips in zip(*logits, strict=True)])


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
