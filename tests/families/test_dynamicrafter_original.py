"""DynamiCrafter in the original's single file, written and read again, whole or refused."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import dynamicrafter, equal, parts, published_dynamicrafter, wide_encoder
from safetensors.torch import load_file, save_file
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.families import dynamicrafter_keys as keys
from inflate.families import dynamicrafter_original as original
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.dynamicrafter_original import Original
from inflate.models import exchange, schedule_buffers, single_file_text
from inflate.models.moments import LatentMoments
from inflate.models.text_encoders import TextEncoders
from inflate.models.unet import VIDEO_LDM
from inflate.objectives import DDPM

Changed = tuple[dict[str, Tensor], Path, Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("dynamicrafter")


@pytest.fixture(scope="module")
def family(place: Path) -> DynamiCrafter:
    torch.manual_seed(0)
    return dynamicrafter(place, base_scale=0.7)


@pytest.fixture(scope="module")
def written(family: DynamiCrafter, place: Path) -> Path:
    original.write(family, place / "model.safetensors")
    return place / "model.safetensors"


@pytest.fixture
def changed(written: Path, tmp_path: Path) -> Changed:
    """The tensors of a file, without its header, the file that they are to be saved in, and a tokenizer's folder."""
    return load_file(written), tmp_path / "model.ckpt", written.parent


def networks(family: DynamiCrafter) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in family.parts.items()}


def same(one: DynamiCrafter, other: DynamiCrafter) -> bool:
    ours, theirs = networks(one), networks(other)
    return ours.keys() == theirs.keys() and all(equal(ours[name], theirs[name]) for name in ours)


def test_what_is_written_is_what_is_read(family: DynamiCrafter, written: Path, tmp_path: Path) -> None:
    found = Original.read(written).load(written.parent)
    assert same(found, family)
    assert (found.clips, found.objective) == (family.clips, family.objective)
    assert found.objective == DDPM("v_prediction", True, 0.7)
    assert {**found.unet.config} == {**found.unet.config, **{"temporal": family.unet.config.temporal}}
    assert found.unet.image_context == family.unet.image_context
    prompts = ["a red disc", ""]
    assert torch.equal(found.embed(prompts).context, family.embed(prompts).context)
    image = torch.rand(1, 3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(found.embed_image(image), family.embed_image(image))
    original.write(found, tmp_path / "again.safetensors")
    assert equal(load_file(tmp_path / "again.safetensors"), load_file(written))
    found.save_pretrained(tmp_path / "folder")
    again = DynamiCrafter.load(tmp_path / "folder")
    assert same(again, family)
    assert (again.clips, again.objective) == (family.clips, family.objective)


def test_a_foreign_file_tells_its_model_by_its_schedule(changed: Changed, family: DynamiCrafter) -> None:
    tensors, file, tokenizer = changed
    torch.save({"state_dict": tensors, "epoch": 3}, file)
    found = Original.read(file).load(tokenizer)
    assert same(found, family)
    assert found.objective == family.objective
    assert (found.noise.config.timestep_spacing, found.noise.config.rescale_betas_zero_snr) == ("trailing", True)
    assert found.clips == replace(original.PUBLISHED["512"][1], frames=3)


def test_deepspeeds_checkpoint_and_half_precision_are_read(changed: Changed, family: DynamiCrafter) -> None:
    tensors, file, tokenizer = changed
    half = {f"_forward_module.{key}": tensor.bfloat16() for key, tensor in tensors.items()}
    torch.save({"module": half}, file)
    found = Original.read(file).load(tokenizer)
    assert found.objective == family.objective
    expected = {key: tensor.bfloat16().float() for key, tensor in family.unet.state_dict().items()}
    assert equal(found.unet.state_dict(), expected)


def test_the_model_of_a_stride_predicts_noise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = dynamicrafter(tmp_path, "stride", gate=True)
    tensors = original.tensors_of(family)
    assert schedule_buffers.SCALES not in tensors
    assert tensors["model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.alpha"].shape == ()
    old = {key.replace(keys.FPS, keys.STRIDE): tensor.contiguous() for key, tensor in tensors.items()}
    save_file(old, tmp_path / "model.safetensors")
    found = Original.read(tmp_path / "model.safetensors").load(tmp_path)
    assert same(found, family)
    assert found.objective == family.objective == DDPM("epsilon")
    assert (found.clips.told, found.clips.number, found.clips.height) == ("stride", 3.0, 256)
    assert not caplog.records


def test_a_schedule_that_is_odd_or_missing_is_warned_of(changed: Changed, caplog: pytest.LogCaptureFixture) -> None:
    tensors, file, _ = changed
    odd = {**tensors, "betas": schedule_buffers.buffers(DDPM("epsilon"))["betas"]}
    torch.save(odd, file)
    assert Original.read(file).objective == DDPM("v_prediction", True, 0.7)
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{file}: its betas is up to 9.9e-01 from that of DDPM(prediction='v_prediction'" in record.getMessage()
    caplog.clear()
    torch.save({key: tensor for key, tensor in tensors.items() if key not in schedule_buffers.NAMES}, file)
    assert Original.read(file).objective == DDPM("v_prediction", True, 0.7)
    assert "holds no noise schedule (alphas_cumprod)" in caplog.text
    assert "; --published names another" in caplog.text
    large = Original.read(file, published="1024")
    assert (large.objective.base_scale, large.clips.width, large.clips.number) == (0.3, 1024, 10.0)


def test_what_training_left_is_passed_over(changed: Changed) -> None:
    tensors, file, _ = changed
    torch.save({**tensors, "model_ema.decay": torch.zeros(()), "logvar": torch.zeros(1000)}, file)
    found = Original.read(file)
    assert {"model_ema.decay", "logvar"} <= found.idle.keys()
    assert not {"model_ema.decay", "logvar"} & found.tensors.keys()


def test_what_no_schedule_tells_stands_in_our_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = dynamicrafter(tmp_path, other_lengths="share")
    family.noise.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=False)
    family.further, family.clips = {"stage": "joint"}, replace(family.clips, height=None, width=None)
    family.moments = LatentMoments((0.0, 1.0, 2.0, 3.0), (1.0, 1.0, 1.0, 2.0))
    family.unet.register_to_config(sample_size=(5, 8))
    original.write(family, tmp_path / "model.safetensors")
    found = Original.read(tmp_path / "model.safetensors").load(tmp_path)
    assert found.objective == DDPM("v_prediction")
    assert found.unet.image_context == family.unet.image_context
    assert (found.clips, found.further) == (family.clips, family.further)
    assert (found.moments, found.size) == (family.moments, family.size)
    assert not caplog.records


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("cond_stage_model.", r"holds no text encoder \(cond_stage_model\.model\.\*\)"),
        ("embedder.model.visual.", r"holds no image encoder \(embedder\.model\.visual\.\*\): give its folder"),
        ("first_stage_model.", "holds no autoencoder"),
        ("image_proj_model.", r"image_proj_model\.latents is missing"),
        ("cond_stage_model.model.ln_final", r"2 missing \(final_layer_norm"),
        ("first_stage_model.decoder.conv_in.bias", r"1 missing \(decoder\.conv_in\.bias\)"),
    ],
)
def test_a_missing_part_is_named(changed: Changed, part: str, message: str) -> None:
    tensors, file, tokenizer = changed
    torch.save({key: tensor for key, tensor in tensors.items() if not key.startswith(part)}, file)
    with pytest.raises(CheckpointError, match=message):
        Original.read(file).load(tokenizer)


def test_an_image_encoder_of_its_own_can_be_named(changed: Changed, tmp_path: Path) -> None:
    tensors, file, tokenizer = changed
    torch.save({key: tensor for key, tensor in tensors.items() if not key.startswith("embedder.")}, file)
    encoder = wide_encoder()
    encoder.save_pretrained(tmp_path / "image_encoder")
    found = Original.read(file).load(tokenizer, tmp_path)
    assert equal(found.image_encoder.state_dict(), encoder.state_dict())


def test_a_text_encoder_of_its_own_can_be_named(changed: Changed, family: DynamiCrafter, tmp_path: Path) -> None:
    tensors, file, tokenizer = changed
    torch.save({key: tensor for key, tensor in tensors.items() if not key.startswith("cond_stage_model.")}, file)
    with pytest.raises(
        CheckpointError, match="holds no text encoder .*name a folder that has one beside its tokenizer"
    ):
        Original.read(file).load(tokenizer)
    family.text.save_pretrained(tmp_path)
    assert same(Original.read(file).load(tmp_path), family)


def test_tensors_of_no_known_part_are_listed(changed: Changed) -> None:
    tensors, file, _ = changed
    torch.save({**tensors, "model_odd.ema": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"tensors of no known part: model_odd\.ema; nothing was loaded"):
        Original.read(file)


@pytest.mark.parametrize("header", [{"clips": {"length": 3}}, {"objective": {"sigma": 1}}])
def test_a_damaged_header_is_refused(changed: Changed, tmp_path: Path, header: dict[str, Any]) -> None:
    file = tmp_path / "model.safetensors"
    exchange.save_file_telling(changed[0], file, header)
    with pytest.raises(CheckpointError, match=rf"has a damaged header: {next(iter(header))}: .*write it again"):
        Original.read(file).load(changed[2])


def test_tensors_that_share_a_name_are_refused(changed: Changed) -> None:
    tensors, file, _ = changed
    torch.save({**tensors, "_forward_module.betas": tensors["betas"]}, file)
    with pytest.raises(CheckpointError, match="share a name with another: betas"):
        Original.read(file)


def test_videocrafters_first_version_is_refused_by_name(changed: Changed) -> None:
    tensors, file, _ = changed
    block = "model.diffusion_model.init_attn.0.transformer_blocks.0.attn1"
    torch.save({**tensors, f"{block}.relative_position_k.embeddings_table": torch.zeros(33, 64)}, file)
    with pytest.raises(CheckpointError, match=r"is VideoCrafter 1, whose temporal layers .*; VideoCrafter 2 has those"):
        Original.read(file)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch owned",)


def test_a_pickle_with_code_is_refused_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": Payload()}, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=r"model\.ckpt cannot be read: .* pickles more than tensors, .*never run"):
        Original.read(tmp_path / "model.ckpt")
    assert not (tmp_path / "owned").exists()


def test_a_file_cut_short_is_refused(written: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save(load_file(written), whole)
    for file in (whole, written):
        cut = tmp_path / f"cut{file.suffix}"
        cut.write_bytes(file.read_bytes()[:100_000])
        with pytest.raises(CheckpointError, match=rf"cut\{file.suffix} cannot be read"):
            Original.read(cut)


def test_what_a_file_would_not_tell_is_refused(family: DynamiCrafter, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    narrow = dynamicrafter(tmp_path, head_width=32)
    with pytest.raises(CheckpointError, match=r"file does not tell: unet image_context .*'head_width': 32"):
        original.write(narrow, file)
    with pytest.raises(CheckpointError, match=r"does not tell: image_mean \(0\.5, 0\.5, 0\.5\)"):
        original.write(replace(family, image_mean=(0.5, 0.5, 0.5)), file)
    other = parts(tmp_path, VIDEO_LDM, in_channels=8)["unet"]
    other.add_image_context(family.unet.image_context)
    with pytest.raises(CheckpointError, match=r"keep the folder of this one, .* has no place for: .*temporal resnet"):
        original.write(replace(family, unet=other), file)
    assert not file.exists()


def test_all_tensors_of_the_published_checkpoint_are_accounted_for() -> None:
    published = published_dynamicrafter()
    file = Path("published.ckpt")
    tensors = {key: torch.empty(shape, device="meta") for key, shape in published.items()}
    found = Original.read(file, lambda _: {**tensors, **schedule_buffers.buffers(DDPM("v_prediction", True, 0.7))})
    assert sorted(found.idle) == sorted(key for key in published if key.startswith(keys.IDLE))
    assert len(found.tensors) + len(found.idle) == 2520
    text_encoder = single_file_text.encoder_of(found.tensors, single_file_text.PLACES["Stable Diffusion 2"][0], file)
    text = TextEncoders((text_encoder,), ())
    family = DynamiCrafter(
        found.load_unet(), found.load_vae(), text, found.noise, found.clips, found.load_image_encoder(), base_scale=0.7
    )
    back = original.tensors_of(family)
    assert {key: list(tensor.shape) for key, tensor in back.items()} == published
