"""Stable Video Diffusion in the original's single file: which tensors are whose, read and written.

It holds an encoder twice: in the first stage, which has no quant convolution, and in the conditioner, whose whole image
autoencoder makes the latent that the UNet is given, and which diffusers' folders hold.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.families import svd_files, svd_keys
from inflate.models import exchange, open_clip, original_names
from inflate.models.original_names import as_convolution, tensor_of
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE

log = logging.getLogger(__name__)

UNET, FIRST_STAGE = "model.diffusion_model.", "first_stage_model."
AUTOENCODER = "conditioner.embedders.3.encoder."
OPEN_CLIP = "conditioner.embedders.0.open_clip.model."
IMAGE_ENCODER = f"{OPEN_CLIP}visual."
PARTS = (UNET, FIRST_STAGE, AUTOENCODER, IMAGE_ENCODER)
TEXT_ENCODER = ("token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale")
IDLE = (*(OPEN_CLIP + name for name in TEXT_ENCODER), f"{AUTOENCODER}decoder.", f"{AUTOENCODER}post_quant_conv.")
"""What the published files keep and nothing uses: the rest of OpenCLIP's text encoder, and an image decoder."""
SCALING_FACTOR = 0.18215
"""What the original's configuration multiplies latents by."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Original:
    """The tensors of a file by the network that they belong to, without the network's prefix, as precise as saved.

    The networks made of them are in float32.
    """

    origin: str
    """the file, for messages"""
    unet: Tensors
    first_stage: Tensors
    autoencoder: Tensors
    """of the conditioner; empty where the file has none"""
    image_encoder: Tensors
    """empty where the file has none"""
    idle: Tensors
    """what nothing uses, under its whole names"""

    @classmethod
    def read(cls, file: Path, read: exchange.Read = exchange.read_saved) -> Self:
        """The tensors of a file; CheckpointError, listing them, where some are of no known part."""
        tensors = read(file)
        surplus = [key for key in tensors if not key.startswith((*PARTS, *IDLE))]
        if surplus:
            listed = exchange.listing(surplus)
            raise CheckpointError(f"{file} holds tensors of no known part: {listed}; nothing was loaded")
        idle = {key: tensor for key, tensor in tensors.items() if key.startswith(IDLE)}
        used = {key: tensor for key, tensor in tensors.items() if key not in idle}
        unet, first_stage, autoencoder, image_encoder = (_part(used, prefix) for prefix in PARTS)
        return cls(str(file), unet, first_stage, autoencoder, image_encoder, idle)

    def load_unet(self, head_channels: int = svd_files.HEAD_CHANNELS) -> VideoUNet:
        """The UNet, whose heads are so many channels wide; CheckpointError, listing tensors, where it is not whole."""
        config = original_names.unet_config(self.unet, head_channels)
        return svd_files.sgm_unet(self.unet, config, self.origin)

    def load_vae(self) -> VideoVAE:
        """The first stage's decoder with the encoder of the conditioner or, where the file has none, its own.

        CheckpointError, listing tensors, where it is not whole.
        """
        if not self.autoencoder:
            return svd_files.sgm_vae(self.first_stage, self.origin)
        self._compare_encoders()
        decoder = {key: tensor for key, tensor in self.first_stage.items() if not key.startswith("encoder.")}
        return svd_files.sgm_vae({**decoder, **self.autoencoder}, self.origin)

    def load_image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder; CheckpointError where the file has none, or not a whole one of a known width."""
        if not self.image_encoder:
            raise CheckpointError(
                f"{self.origin} holds no image encoder ({IMAGE_ENCODER}*): give its folder as image_encoder"
            )
        return open_clip.load_image_encoder(exchange.in_float32(self.image_encoder), self.origin)

    def _compare_encoders(self) -> None:
        """Logs where the first stage's encoder, which is not kept, is another than the conditioner's."""
        encoder = {key: tensor for key, tensor in self.first_stage.items() if key.startswith("encoder.")}
        own, other = exchange.in_float32(encoder), folded_encoder(exchange.in_float32(self.autoencoder))
        if {key: t.shape for key, t in own.items()} != {key: t.shape for key, t in other.items()}:
            listed = exchange.listing(sorted(own.keys() ^ other.keys())) or "in shapes"
            raise CheckpointError(f"{self.origin}: {FIRST_STAGE} and {AUTOENCODER} hold unlike encoders: {listed}")
        known = {key: tensor for key, tensor in own.items() if not tensor.is_meta}
        unlike = [key for key, tensor in known.items() if not torch.allclose(tensor, other[key], rtol=1e-3, atol=1e-4)]
        if unlike:
            log.warning("%s: another encoder is in %s than in %s, which alone is read; they differ in %s",
                        self.origin, FIRST_STAGE, AUTOENCODER, exchange.listing(unlike))  # fmt: skip


def differing(unet: VideoUNet, vae: VideoVAE, image_encoder: CLIPVisionModelWithProjection) -> list[str]:
    """The settings of models that the original's file would not tell, and the tensors that it has no place for."""
    spec = unet.spec
    built_in = TemporalSpec(added_id_dim=spec.added_id_dim, cross_attention_resnet_eps=spec.cross_attention_resnet_eps)
    wrong = exchange.differing(unet, svd_files.UNET_FIXED) + exchange.differing_spec(spec, built_in)
    width, heads = unet.config.block_out_channels, unet.config.attention_head_dim
    own = [heads] * len(width) if isinstance(heads, int) else list(heads)
    if own != [channels // svd_files.HEAD_CHANNELS for channels in width]:
        wrong.append(f"unet attention heads not {svd_files.HEAD_CHANNELS} channels wide")
    wrong += svd_files.differing_vae(vae)
    if vae.config.scaling_factor != SCALING_FACTOR:
        wrong.append(f"vae scaling_factor {vae.config.scaling_factor}")
    wrong += [f"vae {key}" for key in vae.state_dict() if key.startswith("post_quant_conv.")]
    if image_encoder.config.image_size != svd_files.IMAGE_SIZE:
        wrong.append(f"image encoder of {image_encoder.config.image_size} pixels")
    return wrong + open_clip.differing(image_encoder)


def tensors_of(unet: VideoUNet, vae: VideoVAE, image_encoder: CLIPVisionModelWithProjection) -> dict[str, Tensor]:
    """The tensors of a file that holds these models, which are checked; most share the models' memory."""
    own = exchange.detached(unet)
    names = svd_keys.unet_to_sgm(own, original_names.UNetLayout.of(unet.config))
    first_stage, autoencoder = _autoencoders(vae)
    return {
        **{f"{UNET}{names[key]}": tensor for key, tensor in own.items()},
        **{f"{FIRST_STAGE}{key}": tensor for key, tensor in first_stage.items()},
        **{f"{AUTOENCODER}{key}": tensor for key, tensor in autoencoder.items()},
        **{f"{IMAGE_ENCODER}{key}": t for key, t in open_clip.image_encoder_tensors(image_encoder).items()},
    }


def folded_encoder(autoencoder: Tensors) -> dict[str, Tensor]:
    """The encoder of an image autoencoder with its quant convolution, which is 1x1, folded into its last convolution.

    Exact but for rounding; what is not changed is copied.
    """
    weight = tensor_of(autoencoder, "quant_conv.weight").double().flatten(1)  # (2 C, 2 C)
    bias = tensor_of(autoencoder, "quant_conv.bias").double()
    last, offset = (tensor_of(autoencoder, f"encoder.conv_out.{kind}") for kind in ("weight", "bias"))
    encoder = {key: tensor.clone() for key, tensor in autoencoder.items() if key.startswith("encoder.")}
    encoder["encoder.conv_out.weight"] = torch.einsum("om,mihw->oihw", weight, last.double()).to(last)
    encoder["encoder.conv_out.bias"] = (weight @ offset.double() + bias).to(offset)
    return encoder


def _autoencoders(vae: VideoVAE) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first stage, and the conditioner's encoder and quant convolution, in the original's names and shapes."""
    own = exchange.detached(vae)
    names = svd_keys.vae_to_sgm(own, len(vae.config.block_out_channels))
    renamed = {names[key]: as_convolution(names[key], tensor) for key, tensor in own.items()}
    decoder = {key: tensor for key, tensor in renamed.items() if key.startswith("decoder.")}
    autoencoder = {key: tensor for key, tensor in renamed.items() if key not in decoder}
    if "quant_conv.weight" not in autoencoder:
        autoencoder |= svd_files.identity_quant_conv(autoencoder["encoder.conv_out.bias"])
    return {**folded_encoder(autoencoder), **decoder}, autoencoder


def _part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
