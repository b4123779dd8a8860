"""Stable Diffusion in a single file: against diffusers' own reading of the names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from original_files import LEVELS, VAE, original_names
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import CROSS, tiny_unet, tiny_vae
from inflate.errors import CheckpointError
from inflate.models.original_names import UNetLayout, unet_names
from inflate.models.single_file import ImageModel, is_single_image_model, load_image_model, load_vae

TEXT_TIME = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1600,
    "transformer_layers_per_block": (2, 2),
}  # fmt: skip
KINDS: dict[str, tuple[Callable[[], UNet2DConditionModel], float]] = {
    "Stable Diffusion 1": (lambda: tiny_unet(False, **LEVELS, attention_head_dim=8), 0.18215),
    "Stable Diffusion 2": (lambda: tiny_unet(True, **LEVELS, attention_head_dim=(1, 2)), 0.18215),
    "Stable Diffusion XL": (lambda: tiny_unet(True, **LEVELS, attention_head_dim=(1, 2), **TEXT_TIME), 0.13025),
}


def write(folder: Path, generation: str, **more: Tensor) -> tuple[Path, UNet2DConditionModel, AutoencoderKL]:
    unet, vae = KINDS[generation][0](), tiny_vae(**VAE)
    others = {"cond_stage_model.transformer.x": torch.zeros(1), "alphas_cumprod": torch.zeros(4)}
    save_file({**original_names(unet, vae), **others, **more}, folder / "model.safetensors")
    return folder / "model.safetensors", unet, vae


@pytest.mark.parametrize("generation", KINDS)
def test_our_names_are_those_that_diffusers_reads(generation: str) -> None:
    unet, vae = KINDS[generation][0](), tiny_vae(**VAE)
    tensors = original_names(unet, vae)
    converted = convert_ldm_unet_checkpoint(dict(tensors), dict(unet.config))
    assert converted.keys() == unet.state_dict().keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in unet.state_dict().items())
    converted = convert_ldm_vae_checkpoint(dict(tensors), dict(vae.config))
    assert converted.keys() == vae.state_dict().keys()
    assert all(torch.equal(converted[key].flatten(), tensor.flatten()) for key, tensor in vae.state_dict().items())


@pytest.mark.parametrize("generation", KINDS)
def test_a_file_gives_back_the_models_that_it_was_made_of(generation: str, tmp_path: Path) -> None:
    file, unet, vae = write(tmp_path, generation)
    assert is_single_image_model(file)
    found = load_image_model(file, "v_prediction" if generation == "Stable Diffusion 2" else None)
    assert found.generation == generation
    assert found.vae.config.scaling_factor == KINDS[generation][1]
    expected = "v_prediction" if generation == "Stable Diffusion 2" else "epsilon"
    assert found.scheduler["prediction_type"] == expected
    same_output(found, unet, vae)
    alone = load_vae(file).state_dict()
    assert all(torch.equal(alone[key], tensor) for key, tensor in vae.state_dict().items())


def same_output(found: ImageModel, unet: UNet2DConditionModel, vae: AutoencoderKL) -> None:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 3, CROSS, generator=generator)
    more: dict[str, Any] = {}
    if unet.config.addition_embed_type:
        more = {"added_cond_kwargs": {"text_embeds": torch.ones(1, 64), "time_ids": torch.ones(1, 6)}}
    with torch.no_grad():
        ours, theirs = (one(sample, 5, context, **more).sample for one in (found.unet, unet))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        torch.testing.assert_close(found.vae.decode(sample).sample, vae.decode(sample).sample, atol=1e-5, rtol=0)


REAL: dict[str, dict[str, Any]] = {
    "Stable Diffusion 1": {
        "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": 8, "cross_attention_dim": 768,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    },
    "Stable Diffusion 2": {
        "block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, "use_linear_projection": True,
    },
    "Stable Diffusion XL": {
        "block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip


@pytest.mark.parametrize("generation", REAL)
def test_real_sizes_are_told_by_their_tensors(generation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inflate.models import single_file

    with torch.device("meta"):
        unet = UNet2DConditionModel(**REAL[generation])
    names = unet_names(unet.state_dict(), UNetLayout.of(unet.config))
    tensors = {names[key]: tensor for key, tensor in unet.state_dict().items()}
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    assert single_file.generation_of(whole, tmp_path) == generation
    monkeypatch.setattr(single_file, "adopt", lambda model, adopted: None)
    found = single_file._unet(tensors, single_file.generation_of(whole, tmp_path), "here")
    assert {key: tensor.shape for key, tensor in found.state_dict().items()} == {
        key: tensor.shape for key, tensor in unet.state_dict().items()
    }
    heads = [block.attn1.heads for _, block in found.named_modules() if hasattr(block, "attn1")]
    assert heads == [block.attn1.heads for _, block in unet.named_modules() if hasattr(block, "attn1")]


def test_marks_of_a_v_predicting_model_are_heeded(tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion XL", v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    scheduler = load_image_model(file).scheduler
    assert scheduler["prediction_type"] == "v_prediction"
    assert scheduler["rescale_betas_zero_snr"] is True


def test_stable_diffusion_2_must_say_what_it_predicts(tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion 2")
    with pytest.raises(CheckpointError, match=r"do not tell what it predicts: .* in model\.prediction"):
        load_image_model(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet.alpha": torch.zeros(1)}, r"tensors of no known part: lora_unet\.alpha"),
        ({"model.diffusion_model.extra": torch.zeros(1)}, r"1 left over \(extra\)"),
        ({"first_stage_model.encoder.extra": torch.zeros(1)}, r"1 left over \(encoder\.extra\)"),
        ({"model.diffusion_model.out.2.bias": None}, r"1 missing \(out\.2\.bias\)"),
        ({"model.diffusion_model.out.2.bias": torch.zeros(9)}, r"tensors of another shape: out\.2\.bias \(9,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion 1")
    tensors = load_file(file) | change
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(CheckpointError, match=message):
        load_image_model(file)


def test_a_file_without_an_autoencoder_or_without_a_unet_is_named(tmp_path: Path) -> None:
    file, _, _ = write(tmp_path, "Stable Diffusion 1")
    tensors = load_file(file)
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith("first_stage_model.")}, file)
    with pytest.raises(CheckpointError, match="holds no autoencoder"):
        load_image_model(file)
    save_file({key: tensor for key, tensor in tensors.items() if key.startswith("first_stage_model.")}, file)
    assert not is_single_image_model(file)
    with pytest.raises(CheckpointError, match="not a whole Stable Diffusion checkpoint"):
        load_image_model(file)
    file.write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        is_single_image_model(file)
