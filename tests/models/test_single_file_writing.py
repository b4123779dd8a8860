"""Stable Diffusion written into a single file: read back the same, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from original_files import LEVELS, VAE, equal

from helpers import tiny_unet, tiny_vae
from inflate.errors import CheckpointError
from inflate.models.single_file import SCALES, load_image_model
from inflate.models.single_file_writing import SCHEDULER, image_tensors, save_image_model, untold

TEXT_TIME = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1600,
    "transformer_layers_per_block": (2, 2),
}
KINDS: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {"linear": False, "attention_head_dim": 8},
    "Stable Diffusion 2": {"linear": True, "attention_head_dim": (1, 2)},
    "Stable Diffusion XL": {"linear": True, "attention_head_dim": (1, 2), **TEXT_TIME},
}
PUBLISHED_XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("generation", KINDS)
def test_what_is_written_is_what_is_read(generation: str, prediction: str, tmp_path: Path) -> None:
    unet, vae = tiny_unet(**LEVELS, **KINDS[generation]), tiny_vae(**VAE, scaling_factor=SCALES[generation])
    file = tmp_path / "model.safetensors"
    zero = prediction == "v_prediction"
    schedule = {**SCHEDULE, "prediction_type": prediction, "rescale_betas_zero_snr": zero}
    assert save_image_model(unet, vae, schedule, file) == generation
    untold = (generation, prediction) == ("Stable Diffusion 2", "epsilon")
    found = load_image_model(file, "epsilon" if untold else None)
    assert equal(found.unet.state_dict(), unet.state_dict())
    assert equal(found.vae.state_dict(), vae.state_dict())
    assert found.scheduler.items() >= {"prediction_type": prediction, "rescale_betas_zero_snr": zero}.items()


def test_a_prediction_that_a_file_cannot_tell_is_refused(tmp_path: Path) -> None:
    unet, vae = tiny_unet(**LEVELS, **KINDS["Stable Diffusion 1"]), tiny_vae(**VAE, scaling_factor=0.18215)
    schedule = {**SCHEDULE, "prediction_type": "sample", "num_train_timesteps": 500}
    with pytest.raises(CheckpointError, match="num_train_timesteps 500; scheduler prediction_type sample"):
        save_image_model(unet, vae, schedule, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_levels_narrower_than_a_head_are_refused(tmp_path: Path) -> None:
    unet, vae = tiny_unet(True), tiny_vae(**VAE, scaling_factor=0.18215)
    with pytest.raises(CheckpointError, match="narrower than a head of Stable Diffusion 2"):
        save_image_model(unet, vae, SCHEDULE, tmp_path / "model.safetensors")


def test_settings_that_change_nothing_are_no_reason_to_refuse() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED_XL, upcast_attention=True, sample_size=96)
    vae = tiny_vae(**VAE, scaling_factor=0.13025, force_upcast=False)
    tensors = image_tensors(unet, vae)
    read = load_image_model(Path("memory"), "epsilon", lambda _: tensors)
    assert untold(unet, vae, {**SCHEDULER, **SCHEDULE}, read) == []


def test_models_that_a_reader_would_take_for_others_are_refused(tmp_path: Path) -> None:
    unet = tiny_unet(True, **LEVELS, attention_head_dim=(2, 2), norm_eps=1e-6)
    vae = tiny_vae(**VAE, scaling_factor=0.5)
    schedule = {**SCHEDULE, "beta_end": 0.02}
    with pytest.raises(CheckpointError) as refusal:
        save_image_model(unet, vae, schedule, tmp_path / "model.safetensors")
    for wrong in (
        "a single file of Stable Diffusion 2 does not tell: ",
        "unet attention_head_dim (2, 2)",
        "unet norm_eps 1e-06",
        "vae scaling_factor 0.5",
        "scheduler beta_end 0.02",
    ):
        assert wrong in str(refusal.value)
    assert not list(tmp_path.iterdir())
