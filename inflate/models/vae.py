"""`VideoVAE`: a diffusers `AutoencoderKL` whose decoder sees the frames of a clip together.

The encoder stays frame by frame and unchanged. Source: Blattmann et al., Stable Video Diffusion (2023), appendix D;
Align your Latents (2023), section 3.1.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, UpDecoderBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from inflate.errors import ConfigError, InflateError, SurgeryError
from inflate.layers.clip import Clip, ClipState
from inflate.layers.recompute import Recompute, recomputes, run, set_recompute
from inflate.layers.temporal import VideoResnet, inflate_conv_out, inflate_resnet, inflate_upsample
from inflate.models import streaming
from inflate.models.unet import check_no_adapters, keep_signature, load_strictly, temporal_resnet
from inflate.models.weights import weights_sha256

TEMPORAL_EPS = 1e-5
"""Group norm epsilon of the temporal residual blocks; the 2D ones keep their 1e-6."""

ROWS = 32
"""Pixel rows of all frames that temporal layers are given together where clips are decoded frame by frame."""


class VideoDecoder(Decoder):
    """A 2D decoder with temporal children; under checkpointing each residual block and the head is one unit."""

    clip: Clip
    recompute: Recompute | None = None
    rows: int | None = None

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        """Latents (N,C,h,w) to pixels (N,3,H,W)."""
        if self.rows is None:
            return self._whole(sample, latent_embeds)
        state = self.clip.state
        if state.bypass:
            return torch.cat([self._whole(image, latent_embeds) for image in sample.split(1)])  # (N, 3, H, W)
        clips = sample.split(state.frames)
        return torch.cat([streaming.decode(self, clip, self.rows) for clip in clips])  # (N, 3, H, W)

    def _whole(self, sample: Tensor, latent_embeds: Tensor | None) -> Tensor:
        hidden = self.mid_block(self.conv_in(sample), latent_embeds)  # (N, C', h, w)
        for block in self.up_blocks:
            hidden = block(hidden, latent_embeds)  # (N, C', 2h, 2w), after the last (N, C', H, W)
        output: Tensor = run(self, self._head, hidden)  # (N, 3, H, W)
        return output

    def _head(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))  # (N, 3, H, W)
        return output


class VideoVAE(AutoencoderKL):
    """An image autoencoder that decodes clips with temporal layers, whose share of a mix is sigmoid(mix).

    Made by `from_2d` from an image autoencoder or by `from_pretrained` from a folder that `save_pretrained` wrote.
    Slicing and tiling are refused: the norms over time would change every frame.
    """

    _no_split_modules = [*AutoencoderKL._no_split_modules, VideoResnet.__name__]  # noqa: RUF012 -- read as a list

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        check_decoder(self)
        self._insert()

    @classmethod
    def from_2d(cls, vae: AutoencoderKL) -> VideoVAE:
        """A copy of `vae` with temporal layers in its decoder, born equal to it; `vae` is left as it was.

        Raises `SurgeryError` if it cannot be inflated.
        """
        check_vae(vae)
        video = copy.deepcopy(vae)
        video.__class__ = cls
        video.use_slicing = video.use_tiling = False
        video._insert()
        return video

    def stream(self, rows: int | None) -> None:
        """From now on decode frame by frame, temporal layers by that many pixel rows; None: whole clips at once.

        Exact, in a fraction of the memory, images too. With gradients, of clips nothing but the inputs of residual
        blocks is kept, whatever is recomputed otherwise. Raises `ConfigError`.
        """
        if rows is not None and rows < 1:
            raise ConfigError(f"cannot decode {rows} pixel rows at a time: 1 or more, or None for whole clips")
        self.decoder.rows = rows

    def temporal_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the temporal layers, by name."""
        return {name: value for name, value in self.named_parameters() if ".temporal." in name}

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: Any = None, image_only: bool = False
    ) -> DecoderOutput | tuple[Tensor]:
        """Decode clips (B,F,C,h,w) to (B,F,3,H,W), or images (N,C,h,w) to (N,3,H,W).

        Images, and clips with `image_only`, leave the temporal layers out. All frames of a clip are decoded at once.
        """
        if self.use_slicing or self.use_tiling:
            self._refuse_cutting()
        if z.ndim not in (4, 5):
            raise InflateError(
                f"z must be (batch, frames, channels, h, w) or (n, channels, h, w), not {tuple(z.shape)}"
            )
        clips = z.shape[: z.ndim - 3]
        frames = clips[-1] if len(clips) == 2 else 1
        with self.clip.during(ClipState(frames, bypass=image_only or z.ndim == 4)):
            pixels = super().decode(z.flatten(0, -4), return_dict=False)[0]  # (N, 3, H, W)
        pixels = pixels.unflatten(0, clips)  # (B, F, 3, H, W), or (N, 3, H, W)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> Any:
        """Load a folder that `save_pretrained` wrote; raises `CheckpointError` listing tensors missing or left over."""
        return load_strictly(super().from_pretrained, path, kwargs)

    def enable_slicing(self) -> NoReturn:
        """Refuse, by `ConfigError`."""
        self._refuse_cutting()

    def enable_tiling(self) -> NoReturn:
        """Refuse, by `ConfigError`."""
        self._refuse_cutting()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return recomputes(self)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = None) -> None:
        # The decoder's own switch stays off: it recomputes whole levels, of which the last needs most of the memory.
        set_recompute(self, gradient_checkpointing_func if enable else None)
        self.encoder.gradient_checkpointing = enable
        self.encoder._gradient_checkpointing_func = gradient_checkpointing_func

    @staticmethod
    def _refuse_cutting() -> NoReturn:
        raise ConfigError(
            "VideoVAE neither slices nor tiles: both change the decoded clip; use its stream(rows), which does not"
        )

    def _insert(self) -> None:
        """Give every residual block of the decoder, and its last convolution, a temporal child."""
        self.clip = Clip()
        for module in list(self.decoder.modules()):
            if isinstance(module, ResnetBlock2D):
                inflate_resnet(module, self.clip, temporal_resnet(module, TEMPORAL_EPS, reverse=True))
            elif isinstance(module, Upsample2D):
                inflate_upsample(module, self.clip)
        inflate_conv_out(self.decoder.conv_out, self.clip)
        self.decoder.__class__ = VideoDecoder
        self.decoder.clip = self.clip


def streams(vae: AutoencoderKL) -> bool:
    """Whether a VAE has been told to decode in little memory: a video VAE frame by frame, another image by image."""
    return vae.decoder.rows is not None if isinstance(vae, VideoVAE) else bool(vae.use_slicing)


def encoder_sha256(vae: AutoencoderKL) -> str:
    """A hash of the encoder's weights, the quantisation convolution's included."""
    return weights_sha256(vae, "encoder.", "quant_conv.")


def encode_at_most(vae: AutoencoderKL, frames: int) -> None:
    """Let `encode_frames` and `encode_clips` give a VAE so many frames at once; 0 = as many as they would.

    It encodes each frame by itself, so this changes memory alone.
    """
    setattr(vae, "frames_at_once", frames)  # noqa: B010 -- a plain attribute, of a class that may be diffusers'


def decode_in_half(vae: AutoencoderKL, wanted: bool) -> None:
    """Let `decode_clips` compute in bfloat16 by autocast, which rounds, in about half the memory; weights stay."""
    setattr(vae, "halves", wanted)  # noqa: B010 -- a plain attribute, of a class that may be diffusers'


@torch.no_grad()
def encode_frames(vae: AutoencoderKL, frames: Tensor, together: int | None = None) -> Tensor:
    """Unscaled latents (N, C, h, w), the posterior's modes, of frames (N, 3, H, W) in [-1, 1]; without gradient.

    At most so many frames `together`, and no more than `encode_at_most` allows.
    """
    allowed = [size for size in (together, getattr(vae, "frames_at_once", 0), len(frames)) if size]
    parts = frames.to(vae.dtype).split(min(allowed))
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts])  # (N, C, h, w)


def encode_clips(vae: AutoencoderKL, pixels: Tensor, chunk: int | None = None) -> Tensor:
    """Scaled latents (B, F, C, h, w), the posterior's modes, of clips (B, F, 3, H, W) in [-1, 1]; without gradient.

    At most `chunk` frames at a time, by default those of one clip.
    """
    modes = encode_frames(vae, pixels.flatten(0, 1), chunk or pixels.shape[1])  # (B F, C, h, w)
    latents: Tensor = vae.config.scaling_factor * modes  # (B F, C, h, w)
    # The encoder leaves channels last, and PyTorch 2.13 on a CPU crashes in the backward pass of a group norm over such
    # an input that needs no gradient: that of the first temporal layer, when the 2D layers before it are frozen.
    return latents.contiguous().unflatten(0, pixels.shape[:2])


@contextmanager
def frame_by_frame(vae: AutoencoderKL, wanted: bool) -> Iterator[None]:
    """A VAE that, if `wanted`, decodes frame by frame meanwhile: the same result in a fraction of the memory."""
    if not wanted:
        yield
    elif isinstance(vae, VideoVAE):
        before = vae.decoder.rows
        vae.stream(before or ROWS)
        try:
            yield
        finally:
            vae.stream(before)
    else:
        sliced, vae.use_slicing = vae.use_slicing, True
        try:
            yield
        finally:
            vae.use_slicing = sliced


def decode_clips(vae: AutoencoderKL, latents: Tensor, chunk: int | None = None, temporal: bool = True) -> Tensor:
    """Clips (B, F, 3, H, W), about in [-1, 1], of scaled latents (B, F, C, h, w).

    With temporal layers `chunk` frames see each other, by default all; without, each frame stands alone.
    """
    unscaled = latents.to(vae.dtype) / vae.config.scaling_factor  # (B, F, C, h, w)
    parts = unscaled.split(chunk or latents.shape[1], dim=1) if temporal else (unscaled.flatten(0, 1),)
    made = [_decode(vae, part) for part in parts]
    return torch.cat(made, dim=1) if temporal else made[0].unflatten(0, latents.shape[:2])


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels of unscaled latents, of clips or of images."""
    if not getattr(vae, "halves", False):
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels
    with torch.autocast(latents.device.type, torch.bfloat16):
        return vae.decode(latents, return_dict=False)[0].to(latents.dtype)


def check_vae(vae: nn.Module) -> None:
    """Raise `SurgeryError` if `vae` cannot be inflated; nothing is changed."""
    if isinstance(vae, VideoVAE):
        raise SurgeryError("this VAE is inflated already: inflate the 2D model, or load this one by from_pretrained")
    if not isinstance(vae, AutoencoderKL):
        raise SurgeryError(f"cannot inflate a {type(vae).__name__}: only diffusers' AutoencoderKL is supported")
    check_no_adapters(vae)
    check_decoder(vae)


def check_decoder(vae: AutoencoderKL) -> None:
    """Raise `SurgeryError` naming the blocks of the decoder that inflation does not know."""
    blocks = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    strange = sorted({type(block).__name__ for block in blocks} - {UNetMidBlock2D.__name__, UpDecoderBlock2D.__name__})
    if strange:
        known = f"{UNetMidBlock2D.__name__} and {UpDecoderBlock2D.__name__}"
        raise SurgeryError(f"cannot inflate decoder blocks of type {', '.join(strange)}; known are {known}")


keep_signature(VideoVAE, AutoencoderKL)
