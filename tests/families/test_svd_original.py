"""Stable Video Diffusion in the original's single file, written and read again, whole or refused."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from original_files import equal, published_like
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import LATENT, count_reads, write_image_model
from inflate.errors import CheckpointError, ConfigError
from inflate.families.svd import SVD, MotionBuckets
from inflate.families.svd_encoders import Encoders
from inflate.families.svd_model import Model
from inflate.families.svd_original import AUTOENCODER, FIRST_STAGE, IMAGE_ENCODER, Original
from inflate.models.moments import LatentMoments
from inflate.objectives import EDM

NETWORKS = ("unet", "vae", "image_encoder")


@pytest.fixture(scope="module")
def family() -> SVD:
    torch.manual_seed(0)
    return published_like()


@pytest.fixture(scope="module")
def written(family: SVD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("svd") / "svd.safetensors"
    assert family.save_sgm(file) == []
    return file


@pytest.fixture
def changed(written: Path, tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a file, to be saved under another name."""
    return load_file(written), tmp_path / "changed.safetensors"


def test_what_is_written_is_what_is_read(family: SVD, written: Path, tmp_path: Path) -> None:
    found = SVD.load(written)
    for name in NETWORKS:
        assert equal(getattr(found, name).state_dict(), getattr(family, name).state_dict())
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(found.embed(image), family.embed(image))
    found.save_sgm(tmp_path / "again.safetensors")
    assert equal(load_file(tmp_path / "again.safetensors"), load_file(written))


def test_the_length_of_clips_is_told_or_said_to_be_assumed(
    changed: tuple[dict[str, Tensor], Path], caplog: pytest.LogCaptureFixture
) -> None:
    tensors, file = changed
    save_file(tensors, file)
    told = Model(str(file), frames=25).load(frames=8)
    assert (told.frames, told.decode_chunk) == (25, 25)
    assert not caplog.records
    assumed = Model(str(file)).load(frames=8)
    assert assumed.unet.config.sample_size == 96
    assert (assumed.frames, assumed.decode_chunk) == (14, 14)
    assert [record.message.count("14 frames are assumed") for record in caplog.records] == [1]
    with pytest.raises(CheckpointError, match="which pocket is not: leave it out"):
        Model("pocket", frames=25).load(frames=8)
    with pytest.raises(ConfigError, match="model.frames=0: must be at least 1"):
        Model(str(file), frames=0)


def test_attention_of_the_autoencoder_is_of_convolutions(written: Path) -> None:
    tensors = load_file(written)
    for prefix in (f"{FIRST_STAGE}encoder", f"{FIRST_STAGE}decoder", f"{AUTOENCODER}encoder"):
        assert tensors[f"{prefix}.mid.attn_1.q.weight"].shape == (32, 32, 1, 1)


def test_the_first_stage_encodes_as_the_conditioner(family: SVD, written: Path) -> None:
    original = Original.read(written)
    alone = replace(original, autoencoder={}).load_vae()
    assert not alone.config.use_quant_conv
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = family.vae.encode(image).latent_dist.mode()
        torch.testing.assert_close(alone.encode(image).latent_dist.mode(), expected, atol=2e-5, rtol=1e-4)


def test_an_autoencoder_without_a_quant_convolution_gets_one_that_changes_nothing(tmp_path: Path) -> None:
    family = published_like(use_quant_conv=False)
    family.save_sgm(tmp_path / "svd.safetensors")
    tensors = load_file(tmp_path / "svd.safetensors")
    assert torch.equal(tensors[f"{AUTOENCODER}quant_conv.weight"].flatten(1), torch.eye(8))
    ours = {key.removeprefix(FIRST_STAGE): tensor for key, tensor in tensors.items() if key.startswith(FIRST_STAGE)}
    theirs = {key.removeprefix(AUTOENCODER): tensor for key, tensor in tensors.items() if key.startswith(AUTOENCODER)}
    assert all(torch.equal(tensor, ours[key]) for key, tensor in theirs.items() if key.startswith("encoder."))


def test_another_encoder_in_the_first_stage_is_told(
    family: SVD, changed: tuple[dict[str, Tensor], Path], caplog: pytest.LogCaptureFixture
) -> None:
    tensors, file = changed
    tensors[f"{FIRST_STAGE}encoder.conv_in.bias"] += 0.01
    save_file(tensors, file)
    with caplog.at_level(logging.WARNING):
        found = Original.read(file).load_vae()
    assert "which alone is read; they differ in encoder.conv_in.bias" in caplog.text
    assert equal(found.state_dict(), family.vae.state_dict())


def test_encoders_alone_are_the_files_own(family: SVD, written: Path) -> None:
    alone = Encoders.load(written)
    assert equal(alone.vae.state_dict(), family.vae.state_dict())
    assert equal(alone.image_encoder.state_dict(), family.image_encoder.state_dict())


def test_a_file_in_half_precision_is_read_once_and_stays_so_until_it_is_used(
    changed: tuple[dict[str, Tensor], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, file = changed
    save_file({key: tensor.half() for key, tensor in tensors.items()}, file)
    whole, files = SVD.load(file, frames=14), count_reads(monkeypatch)
    alone = Encoders.load(file)
    assert files == [file]
    for name in ("vae", "image_encoder"):
        found = getattr(alone, name).state_dict()
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        assert equal(found, getattr(whole, name).state_dict())
    assert {tensor.dtype for tensor in Original.read(file).unet.values()} == {torch.float16}


def test_a_named_image_encoder_takes_the_place_of_the_files_own(written: Path, tmp_path: Path) -> None:
    write_image_model(tmp_path)
    assert SVD.load(written, tmp_path / "image_encoder").image_encoder.config.hidden_size == 16


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (f"{AUTOENCODER}quant_conv.weight", r"quant_conv\.weight is missing"),
        (f"{AUTOENCODER}encoder.conv_in.bias", r"hold unlike encoders: encoder\.conv_in\.bias"),
        (f"{FIRST_STAGE}decoder.conv_in.bias", r"1 missing \(decoder\.conv_in\.bias\)"),
        (f"{IMAGE_ENCODER}ln_pre.bias", r"1 missing \(ln_pre\.bias\)"),
    ],
)
def test_a_file_that_is_not_whole_is_refused(key: str, message: str, changed: tuple[dict[str, Tensor], Path]) -> None:
    tensors, file = changed
    del tensors[key]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        SVD.load(file)


def test_tensors_of_no_known_part_are_listed(changed: tuple[dict[str, Tensor], Path]) -> None:
    tensors, file = changed
    save_file({**tensors, "conditioner.embedders.5.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match=r"no known part: conditioner\.embedders\.5\.weight"):
        SVD.load(file)


def test_models_that_the_file_cannot_hold_are_refused(family: SVD, tmp_path: Path) -> None:
    other = copy.copy(family)
    other.vae = published_like(use_post_quant_conv=True).vae
    other.objective, other.image_mean = EDM(noise_condition="discrete"), (0.5, 0.5, 0.5)
    with pytest.raises(CheckpointError) as refusal:
        other.save_sgm(tmp_path / "svd.safetensors")
    for wrong in (
        "vae post_quant_conv.weight; vae post_quant_conv.bias",
        "noise_condition discrete, of the image model that it was made of",
        "image_mean (0.5, 0.5, 0.5)",
    ):
        assert wrong in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_an_inflated_model_is_refused_with_the_reasons(tmp_path: Path) -> None:
    model = SVD.from_image_model(write_image_model(tmp_path / "image"))
    with pytest.raises(
        CheckpointError, match="unet attention heads not 64 channels wide; image encoder hidden_size 16"
    ):
        model.save_sgm(tmp_path / "svd.safetensors")


def test_the_header_tells_settings_and_those_that_the_file_does_not_tell_are_returned(
    family: SVD, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = replace(family, fps=8.0, frames=25, decode_chunk=5, motion=MotionBuckets.fit([0.1, 0.2, 0.5]))
    file = tmp_path / "svd.safetensors"
    assert told.save_sgm(file) == ["motion_quantiles"]
    told.moments = LatentMoments((0.0,) * 4, (1.0,) * 4)
    assert told.save_sgm(file) == ["motion_quantiles", "latent_moments"]
    found = SVD.load(file)
    assert (found.fps, found.frames, found.decode_chunk) == (8.0, 25, 5)
    assert found.unet.config.sample_size == family.unet.config.sample_size == LATENT
    assert not caplog.records
    shorter = SVD.load(file, frames=3)
    assert (shorter.frames, shorter.decode_chunk) == (3, 5)
    save_file(load_file(file), file, {"inflate": "[1]"})
    with pytest.raises(CheckpointError, match="damaged header"):
        SVD.load(file)
