"""The text-to-video family: what it loads, what it refuses, and that an export holds all of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from original_files import parts, write_whole_file
from safetensors.torch import load_file, save_file
from tiny_video_ldm import PROMPT, parents, write_text_model

from helpers import count_reads, randomise
from inflate.errors import CheckpointError
from inflate.families.video_ldm import Clips, Encoders, Model, VideoLDM
from inflate.models.original_video_names import with_fps
from inflate.models.unet import MODELSCOPE
from inflate.models.vae import VideoVAE, encoder_sha256
from inflate.objectives import DDPM

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def trained(folder: Path) -> VideoLDM:
    family = VideoLDM.load(folder)
    randomise(family.unet)
    family.clips = Clips(3, 7.0, 16, 24)
    return family


@pytest.fixture(scope="module")
def export(trained: VideoLDM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("runs") / "export"
    trained.save_pretrained(target)
    return target


def output(family: VideoLDM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return family.predict(family.embed([PROMPT, ""]))(latents, torch.tensor([10, 900]))


@pytest.mark.parametrize("linear", [False, True])
def test_a_newborn_predicts_what_the_image_model_does(tmp_path: Path, linear: bool) -> None:
    family = VideoLDM.load(write_text_model(tmp_path, linear))
    latents, context = torch.randn(2, 3, 4, 8, 8), family.embed([PROMPT, ""])
    steps = torch.tensor([[0, 10, 999], [5, 500, 900]])
    with torch.no_grad():
        ours = family.predict(context)(latents, steps).flatten(0, 1)
        flat = latents.flatten(0, 1), steps.flatten(), context.context.repeat_interleave(3, 0)
        theirs = parents(tmp_path)[0](*flat).sample
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_an_export_is_loaded_as_it_was(folder: Path, trained: VideoLDM, export: Path) -> None:
    loaded = VideoLDM.load(export)
    assert loaded.clips == Clips(3, 7.0, 16, 24)
    assert loaded.size == (16, 24)
    assert loaded.objective == trained.objective
    assert torch.equal(output(loaded), output(trained))
    assert not torch.allclose(output(loaded), output(VideoLDM.load(folder)))


def test_an_export_may_have_a_temporal_decoder(export: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(export)
    family.vae = VideoVAE.from_2d(family.vae)
    randomise(family.vae)
    family.save_pretrained(tmp_path / "export")
    loaded, latents = VideoLDM.load(tmp_path / "export"), torch.randn(2, 3, 4, 8, 8)
    assert torch.equal(loaded.decode(latents), family.decode(latents))
    alone = torch.cat([loaded.decode(latents[:, frame, None]) for frame in range(3)], 1)
    assert not torch.allclose(loaded.decode(latents), alone)


def test_temporal_layers_are_kept_alone_over_their_image_model(folder: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(folder)
    for parameter in family.unet.temporal_parameters().values():
        parameter.data.copy_((parameter + 0.05 * torch.randn(parameter.shape)).half())
    family.clips = Clips(3, 7.0, 16, 24)
    family.save_temporal(tmp_path / "alone", str(folder))
    loaded = VideoLDM.load(tmp_path / "alone")
    assert loaded.clips == family.clips
    assert torch.equal(output(loaded), output(family))
    assert torch.equal(Encoders.load(tmp_path / "alone").embed([PROMPT]).context, family.embed([PROMPT]).context)
    tensors = load_file(tmp_path / "alone" / "temporal.safetensors")
    assert all(".temporal." in name for name in tensors)
    name, _ = tensors.popitem()
    save_file(tensors, tmp_path / "alone" / "temporal.safetensors")
    with pytest.raises(CheckpointError, match=f"temporal layers: {name}"):
        VideoLDM.load(tmp_path / "alone")


def test_temporal_layers_are_not_kept_over_another_image_model(trained: VideoLDM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has other image layers"):
        trained.save_temporal(tmp_path / "alone", str(folder))
    assert not (tmp_path / "alone").exists()


def test_temporal_layers_change_their_image_model(
    folder: Path, trained: VideoLDM, export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which takes a whole export, or temporal layers alone, over what is named."""
    family = VideoLDM.load(folder)
    family.save_temporal(tmp_path / "alone", str(folder))
    other = write_text_model(tmp_path / "other")
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    randomise(unet, seed=7)
    unet.save_pretrained(other / "unet")
    vae = AutoencoderKL.from_pretrained(other / "vae")
    randomise(vae)
    vae.save_pretrained(other / "vae")
    VideoLDM.load(tmp_path / "alone", folder)
    assert not caplog.records
    for source, layers in ((export, trained), (tmp_path / "alone", VideoLDM.load(tmp_path / "alone"))):
        found = Model(str(source), str(other)).load().unet.state_dict()
        assert encoder_sha256(Encoders.load(source, image_model=other).vae) == encoder_sha256(vae)
        assert all(torch.equal(found[name], value) for name, value in unet.state_dict().items())
        assert all(torch.equal(found[name], value) for name, value in layers.unet.created_parameters().items())
    assert [f"go over {other}, which is another image model" in one.message for one in caplog.records] == [True] * 2
    family.save_temporal(tmp_path / "changed", str(folder))
    settings = json.loads((tmp_path / "changed" / "inflate.json").read_text())
    (tmp_path / "changed" / "inflate.json").write_text(json.dumps({**settings, "image_model": str(other)}))
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 2, "norm_eps": 1e-3}))
    for source in (export, tmp_path / "alone"):
        with pytest.raises(CheckpointError, match="other layers than this image model's: .*norm_eps 0.001 instead of"):
            VideoLDM.load(source, other)
    (other / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="belongs over other weights than .*other holds now"):
        VideoLDM.load(tmp_path / "changed")
    with pytest.raises(CheckpointError, match="is no image model"):
        VideoLDM.load(tmp_path / "alone", export)


def test_temporal_layers_know_what_they_predicted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_text_model(tmp_path / "image")
    VideoLDM.load(folder).save_temporal(tmp_path / "alone", str(folder))
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "prediction_type": "v_prediction"}))
    with pytest.raises(CheckpointError, match="trained with .*epsilon.*, but .*image has .*v_prediction"):
        VideoLDM.load(tmp_path / "alone")
    VideoLDM.load(tmp_path / "alone", folder)
    assert "its samples may fall apart" in caplog.text


def test_an_image_model_goes_over_no_other_one(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is an image model, without temporal layers"):
        VideoLDM.load(folder, folder)


def test_a_temporal_decoder_stays_with_its_own_autoencoder(folder: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(folder)
    family.vae = VideoVAE.from_2d(family.vae)
    with pytest.raises(CheckpointError, match=r"such as vae\.decoder\..*\.temporal\."):
        family.save_temporal(tmp_path / "alone", str(folder))
    with pytest.raises(CheckpointError, match="a temporal decoder belongs over its own"):
        family.over(folder)


def test_temporal_layers_over_a_single_file_know_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write_whole_file(file, "Stable Diffusion 1")
    family = VideoLDM.load(file, None, "pocket")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        family.save_temporal(tmp_path / "alone", str(file))
    family.save_temporal(tmp_path / "alone", str(file), "pocket")
    for kind in (VideoLDM, Encoders):
        alone = kind.load(tmp_path / "alone")
        assert torch.equal(alone.embed([PROMPT]).context, family.embed([PROMPT]).context)


def test_a_single_file_is_read_once_for_its_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    write_whole_file(file, "Stable Diffusion 1")
    save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
    whole, files = VideoLDM.load(file, None, "pocket"), count_reads(monkeypatch)
    alone = Encoders.load(file, "pocket")
    assert files == [file]
    assert encoder_sha256(alone.vae) == encoder_sha256(whole.vae)
    assert alone.embed([PROMPT]).context.dtype == torch.float32
    assert torch.equal(alone.embed([PROMPT]).context, whole.embed([PROMPT]).context)


def test_an_image_decoder_sees_one_frame_at_a_time(folder: Path) -> None:
    family, latents = VideoLDM.load(folder), torch.randn(2, 3, 4, 8, 8)
    theirs = parents(folder)[1].decode(latents[1, 2, None] / family.vae.config.scaling_factor).sample
    torch.testing.assert_close(family.decode(latents)[1, 2, None], theirs.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_tensors_that_do_not_match_are_named(export: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(export, copy)
    tensors = load_file(copy / "unet" / WEIGHTS)
    name = next(name for name in tensors if ".temporal." in name)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name := "another.weight"] = torch.zeros(1)
    save_file(tensors, copy / "unet" / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{change}: {name}"):
        VideoLDM.load(copy)


def test_prompts_are_padded_and_the_empty_one_has_its_own_states(folder: Path) -> None:
    encoders = Encoders.load(folder)
    states = encoders.embed([PROMPT, "", "over " * 100]).context
    assert states.shape == (3, encoders.text.tokenizers[0].model_max_length, 64)
    assert not torch.allclose(states[0], states[1])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "linear"}, "only Stable Diffusion's schedule"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts sample"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "is of class UNet3DConditionModel"),
    ],
)
def test_other_models_are_refused(tmp_path: Path, file: str, change: dict[str, Any], message: str) -> None:
    folder = write_text_model(tmp_path)
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        VideoLDM.load(folder)


def test_a_folder_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer is missing"):
        VideoLDM.load(folder)


def test_a_text_encoder_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    file = write_text_model(tmp_path) / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="text_encoder cannot be read"):
        VideoLDM.load(tmp_path)


def test_another_familys_export_is_refused(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "copy")
    (tmp_path / "copy" / "inflate.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"inflate\.json is of family None"):
        VideoLDM.load(tmp_path / "copy")


def test_an_export_replaces_only_an_export(folder: Path, export: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(folder)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds other files"):
        family.save_pretrained(tmp_path)
    again = tmp_path / "again"
    for _ in range(2):
        family.save_pretrained(again)
    assert (again / "inflate.json").is_file()


@torch.no_grad()
def test_a_model_that_is_told_the_frame_rate_is_told_that_of_each_clip(tmp_path: Path) -> None:
    family = VideoLDM(**parts(tmp_path, with_fps(64)), clips=Clips(frames=2, fps=12.5, height=16, width=16))
    noisy, timestep = torch.randn(2, 2, 4, 8, 8), torch.tensor([3, 700])
    condition = family.embed([PROMPT, ""])
    for given, expected in ((None, [12.0, 12.0]), (torch.tensor([24.0, 29.97]), [24.0, 29.0])):
        found = family.predict(replace(condition, fps=given))(noisy, timestep)
        told = family.unet(noisy, timestep, condition.context, torch.tensor(expected)[:, None]).sample
        assert torch.equal(found, told)
    other = family.predict(replace(condition, fps=torch.tensor([24.0, 1.0])))(noisy, timestep)
    assert torch.equal(other[0], found[0])
    assert not torch.allclose(other[1], found[1])


def test_how_clean_latents_are_rescaled_stays_with_the_model(tmp_path: Path) -> None:
    found = {**parts(tmp_path, MODELSCOPE), "clips": Clips(frames=2, height=16, width=16), "base_scale": 0.7}
    VideoLDM(**found).save_pretrained(tmp_path / "export")
    assert VideoLDM.load(tmp_path / "export").objective == DDPM("epsilon", base_scale=0.7)


def test_the_schedule_is_the_image_models_whatever_its_scheduler(tmp_path: Path) -> None:
    settings = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    family = VideoLDM.load(write_text_model(tmp_path, scheduler=PNDMScheduler, **settings))
    assert family.objective == DDPM("epsilon", False)
    assert family.noise.config.steps_offset == 1
    assert not family.noise.config.clip_sample
    assert family.noise.config.timestep_spacing == "leading"


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_zero_terminal_snr_begins_at_pure_noise(tmp_path: Path, sampler: Any) -> None:
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler = VideoLDM.load(write_text_model(tmp_path, **settings)).scheduler(sampler)
    scheduler.set_timesteps(7)
    assert int(scheduler.timesteps[0]) == 999
