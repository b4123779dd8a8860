"""Stable Diffusion 1, 2 and XL in a single file, as community checkpoints are shared: read without network.

The configurations follow from the tensors' shapes; what shapes cannot tell (the number of heads, the autoencoder's
scale) follows from the generation, which they do tell.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models import original_names
from inflate.models.exchange import (
    Read,
    adopt,
    convert,
    in_float32,
    inverse,
    listing,
    opened,
    read_saved,
    shapes,
    told_by,
)

Generation = Literal["Stable Diffusion 1", "Stable Diffusion 2", "Stable Diffusion XL"]
Prediction = Literal["epsilon", "v_prediction"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OTHERS = ("cond_stage_model.", "conditioner.", "model_ema.")
"""Parts that are not read here: text encoders (see `single_file_text`), and averages beside the weights."""
OF_VIDEO = (".time_stack.", ".init_attn.")
"""What is in the names of a video model's tensors alone."""
BUFFERS = frozenset({
    "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
    "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    "denoiser.sigmas", "scale_factor", "v_pred", "ztsnr",
})  # fmt: skip
"""What training left beside the networks: schedules, and two marks by which a model says how it predicts."""
SCALES: dict[Generation, float] = {
    "Stable Diffusion 1": 0.18215, "Stable Diffusion 2": 0.18215, "Stable Diffusion XL": 0.13025
}  # fmt: skip
"""What the autoencoder's latents are multiplied by."""
SIDES: dict[Generation, int] = {"Stable Diffusion 1": 64, "Stable Diffusion 2": 64, "Stable Diffusion XL": 128}
"""Height and width of the latents of training, where no header tells; 96 of a Stable Diffusion 2 that predicts v."""
HEADS = 8
"""Attention heads of Stable Diffusion 1 at every level; later ones have heads of 64 channels."""


@dataclass(frozen=True)
class ImageModel:
    """The networks of an image model, in float32, and its scheduler's settings as diffusers names them."""

    generation: Generation
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: dict[str, Any]

    @property
    def noise(self) -> DDIMScheduler:
        """The noise schedule, as a DDIM sampler's settings: its steps begin where those of published models do."""
        return DDIMScheduler(**self.scheduler, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def is_single_image_model(file: Path) -> bool:
    """Whether a .safetensors file holds a 2D UNet in the original names, and no video model; CheckpointError."""
    with opened(file) as found:
        keys = list(found.keys())
    return any(key.startswith(UNET) for key in keys) and not any(mark in key for key in keys for mark in OF_VIDEO)


def load_image_model(file: Path, prediction: Prediction | None = None, read: Read = read_saved) -> ImageModel:
    """The networks of a single file. CheckpointError, listing tensors, where it is not whole or holds something else.

    `prediction` says what the UNet predicts; without it a file's own mark counts, else noise is assumed, but of
    Stable Diffusion 2, whose two kinds look alike, it must be given.
    """
    image = image_model_of(read(file), file, prediction)
    image.unet.register_to_config(sample_size=told_by(file).get("sample_size") or image.unet.config.sample_size)
    return image


def image_model_of(tensors: Mapping[str, Tensor], file: Path, prediction: Prediction | None = None) -> ImageModel:
    """The networks of the tensors of a file, as `load_image_model`, but for what its header tells."""
    _refuse_surplus(tensors, file)
    parts = {prefix: _strip(tensors, prefix) for prefix in (UNET, VAE)}
    generation = generation_of(tensors, file)
    predicted = _prediction(tensors, generation, prediction, file)
    unet = _unet(parts[UNET], generation, str(file))
    larger = generation == "Stable Diffusion 2" and predicted == "v_prediction"
    unet.register_to_config(sample_size=96 if larger else SIDES[generation])
    scheduler = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": predicted,
        "rescale_betas_zero_snr": "ztsnr" in tensors,
    }  # fmt: skip
    return ImageModel(generation, unet, _vae(parts[VAE], SCALES[generation], str(file)), scheduler)


def load_vae(file: Path, read: Read = read_saved) -> AutoencoderKL:
    """The autoencoder alone, in float32."""
    tensors = read(file)
    return _vae(_strip(tensors, VAE), SCALES[generation_of(tensors, file)], str(file))


def _refuse_surplus(tensors: Iterable[str], file: Path) -> None:
    surplus = [key for key in tensors if not key.startswith((UNET, VAE, *OTHERS)) and key not in BUFFERS]
    if surplus:
        raise CheckpointError(f"{file} holds tensors of no known part: {listing(surplus)}; nothing was loaded")


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def generation_of(tensors: Mapping[str, Tensor], file: Path) -> Generation:
    """Which Stable Diffusion a file's tensors are of; CheckpointError where it has no UNet."""
    unet = _strip(tensors, UNET)
    if not unet:
        raise CheckpointError(f"{file} holds no {UNET}*: it is not a whole Stable Diffusion checkpoint")
    if "label_emb.0.0.weight" in unet:
        return "Stable Diffusion XL"
    linear = original_names.unet_config(unet)["use_linear_projection"]
    return "Stable Diffusion 2" if linear else "Stable Diffusion 1"


def told_prediction(tensors: Collection[str], generation: Generation) -> Prediction | None:
    """What a file's tensors say that its UNet predicts; None where two kinds of models look alike."""
    if "v_pred" in tensors:
        return "v_prediction"
    return None if generation == "Stable Diffusion 2" else "epsilon"


def _prediction(
    tensors: Mapping[str, Tensor], generation: Generation, wanted: Prediction | None, file: Path
) -> Prediction:
    predicted = wanted or told_prediction(tensors, generation)
    if predicted is None:
        raise CheckpointError(
            f"{file} is a Stable Diffusion 2, whose tensors do not tell what it predicts: say so, v_prediction (768 "
            "pixels: 2.0, 2.1) or epsilon (512 pixels: the -base models), in model.prediction or by --prediction"
        )
    return predicted


def _unet(tensors: Mapping[str, Tensor], generation: Generation, origin: str) -> UNet2DConditionModel:
    config = original_names.unet_config(tensors)
    if generation == "Stable Diffusion 1":
        config["attention_head_dim"] = HEADS  # which diffusers takes for their number
    elif 0 in config["attention_head_dim"]:
        raise CheckpointError(f"{origin} has levels narrower than a head of {generation}, which has 64 channels")
    if generation == "Stable Diffusion XL":
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": original_names.size_of(tensors, "label_emb.0.0.weight", 1),
        }  # fmt: skip
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    wanted = shapes(unet)
    names = inverse(original_names.unet_names(wanted, original_names.UNetLayout.of(config)))
    adopt(unet, in_float32(convert(tensors, names, wanted, origin)))
    return unet


def _vae(tensors: Mapping[str, Tensor], scale: float, origin: str) -> AutoencoderKL:
    if not tensors:
        raise CheckpointError(f"{origin} holds no autoencoder ({VAE}*): use a checkpoint with one baked in")
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith("loss.")}
    config = original_names.vae_config(kept)
    with torch.device("meta"):
        vae = AutoencoderKL(**config, scaling_factor=scale)
    wanted = shapes(vae)
    names = inverse(original_names.vae_names(wanted, len(config["block_out_channels"])))
    adopt(vae, in_float32(convert(kept, names, wanted, origin)))
    return vae
