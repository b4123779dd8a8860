"""Inflation: from a 2D model to a video model that equals it at birth, with a report of what was done.

For instance:

    video, report = inflate_unet(unet, TemporalSpec(), in_channels=8)
    report.table()                    what was copied, widened and created
    verify_identity(video, unet)      0.0, or the largest difference between the two over the frames of a clip
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE

Action = Literal["copied", "widened", "created"]

IDENTITY = 1e-5
"""Largest difference between an inflated model and its parent that still counts as rounding."""

CREATED = {
    r"^query_transformer\.": "query transformer",
    r"\.attn2\.image\.": "keys and values of an image",
    r"\.(position|pos_embed)\.": "frame positions",
    r"\.temporal\.(norm|proj_in|proj_out|transformer_blocks)\.": "transformers over frames",
    r"\.temporal\.conv\d\.\d\.": "temporal convolutions",
    r"resnets\.": "temporal residual blocks",
    r"transformer_blocks\.": "temporal transformer blocks",
    r"class_embedding\.": "embedding of added ids",
    r"conv_out\.": "temporal output convolution",
    r"\.mix$": "mixes",
}
"""What patterns in a new tensor's name say that it belongs to; the first that matches counts."""


@dataclass(frozen=True)
class Row:
    """One tensor of an inflated model."""

    action: Action
    name: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Number of values."""
        return torch.Size(self.shape).numel()

    @property
    def group(self) -> str:
        """What the tensor belongs to, in words."""
        if self.action != "created":
            return "2D model" if self.action == "copied" else self.name
        return next((words for pattern, words in CREATED.items() if re.search(pattern, self.name)), "other")


@dataclass(frozen=True)
class Report:
    """What inflation did with each tensor."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = field(default=())

    def count(self, action: Action) -> int:
        """Number of parameters that were copied, widened or created."""
        return sum(row.parameters for row in self.rows if row.action == action)

    def table(self) -> str:
        """The rows in groups, one line each, then the notes."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.action, row.group), []).append(row)
        lines = [f"{'':8} {'tensors':>8} {'parameters':>14}"]
        for (action, group), rows in groups.items():
            lines.append(f"{action:8} {len(rows):8,} {sum(row.parameters for row in rows):14,}  {group}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def inflate_unet(
    unet: UNet2DConditionModel, spec: TemporalSpec, in_channels: int | None = None
) -> tuple[VideoUNet, Report]:
    """A `VideoUNet` made from a 2D UNet, which is left as it was, and the report.

    With `in_channels`, the first convolution gets input channels of zero weight, for instance for the latent of a
    given image. Raises `SurgeryError` if the model cannot be inflated as asked.
    """
    video = VideoUNet.from_2d(unet, spec, in_channels)
    return video, Report(_rows(unet, video), _notes(unet, spec))


def inflate_vae(vae: AutoencoderKL) -> tuple[VideoVAE, Report]:
    """A `VideoVAE` made from an image autoencoder, which is left as it was, and the report; raises `SurgeryError`."""
    video = VideoVAE.from_2d(vae)
    return video, Report(_rows(vae, video))


@torch.no_grad()
def verify_identity(video: VideoUNet | VideoVAE, parent: UNet2DConditionModel | AutoencoderKL, seed: int = 0) -> float:
    """The largest absolute difference, over random inputs, between a newborn video model and its 2D parent per frame.

    Both run in evaluation mode and in their own precision. Input channels that the parent lacks are random too: their
    weights are zero.
    """
    generator = torch.Generator().manual_seed(seed)
    with evaluating(video, parent):
        pair = _vae_pair if isinstance(video, VideoVAE) else _unet_pair
        ours, theirs = pair(video, parent, generator)
    return (ours - theirs).abs().max().item()


def _rows(parent: nn.Module, video: nn.Module) -> tuple[Row, ...]:
    before = {name: tuple(value.shape) for name, value in parent.state_dict().items()}
    rows = []
    for name, value in video.state_dict().items():
        shape = tuple(value.shape)
        action: Action = "created" if name not in before else "copied" if before[name] == shape else "widened"
        rows.append(Row(action, name, shape))
    return tuple(rows)


def _notes(unet: UNet2DConditionModel, spec: TemporalSpec) -> tuple[str, ...]:
    """Warn where the spec makes the video model differ from its parent."""
    if unet.config.norm_eps == spec.cross_attention_resnet_eps:
        return ()
    return (
        f"cross_attention_resnet_eps={spec.cross_attention_resnet_eps} but the 2D UNet has {unet.config.norm_eps}: "
        "the two differ slightly",
    )


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode, and afterwards each of their modules in its own mode again."""
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _unet_pair(video: Any, parent: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Outputs of both UNets for 2 random clips of 3 frames: (B*F,C,h,w) each."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(video.device, video.dtype)

    batch, frames, side = 2, 3, 4 * 2 ** len(video.config.block_out_channels)
    sample = random(batch, frames, video.config.in_channels, side, side)  # (B, F, C, h, w)
    steps = random(batch, frames).abs() * 300  # (B, F)
    context = random(batch, 5, context_width(parent))  # (B, L, D)
    ids = random(batch, video.spec.added_ids).abs() if video.spec.added_ids else None  # (B, ids)
    added = added_conditions(parent, batch * frames, random)
    ours = video(sample, steps, context, ids, added_cond_kwargs=added).sample.flatten(0, 1)  # (B*F, C, h, w)
    flat = sample.flatten(0, 1)[:, : parent.config.in_channels]  # (B*F, C, h, w)
    theirs = parent(flat, steps.flatten(), context.repeat_interleave(frames, 0), added_cond_kwargs=added).sample
    return ours, theirs


def context_width(unet: Any) -> int:
    """Width of the context that a UNet takes."""
    width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
    return int(width if isinstance(width, int) else width[0])


def added_conditions(unet: Any, rows: int, random: Any) -> dict[str, Tensor] | None:
    """Random text embedding and sizes for Stable Diffusion XL, which adds them to the time embedding."""
    if unet.config.addition_embed_type != "text_time":
        return None
    ids = 6  # original size, crop and target size, two numbers each
    width = unet.config.projection_class_embeddings_input_dim - ids * unet.config.addition_time_embed_dim
    return {"text_embeds": random(rows, width), "time_ids": random(rows, ids).abs() * 100}


def _vae_pair(video: Any, parent: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Decoded pixels of both autoencoders for 2 random clips of 3 frames: (B*F,3,H,W) each."""
    latent = torch.randn(2, 3, video.config.latent_channels, 8, 8, generator=generator)  # (B, F, C, h, w)
    latent = latent.to(video.device, video.dtype)
    ours = video.decode(latent).sample.flatten(0, 1)  # (B*F, 3, H, W)
    theirs = parent.decode(latent.flatten(0, 1)).sample  # (B*F, 3, H, W)
    return ours, theirs
