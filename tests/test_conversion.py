"""From format to format by the command: bit for bit there and back, or refused with nothing written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableVideoDiffusionPipeline, UNet2DConditionModel
from original_files import (
    IDLE,
    dynamicrafter,
    equal,
    original_names,
    parts,
    published_like,
    write_single_file,
    write_svd_file,
    write_videocrafter,
)
from safetensors.torch import load_file, save_file
from test_cli import inflate, refused
from tiny_video_ldm import parents, write_text_model

from helpers import randomise, tiny_unet_sd1, tiny_unet_sd2, write_image_model
from inflate.catalogue import unet_folder
from inflate.conversion import PIPELINES, READ_ONLY, READERS, TEMPORAL, WRITERS
from inflate.errors import ConfigError
from inflate.families import animatediff, dynamicrafter_original, modelscope
from inflate.families.dynamicrafter import DynamiCrafter, Told
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.formats import FILES, FORMATS, UNETS, WRITTEN
from inflate.models.folders import read_json
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VideoUNet
from inflate.objectives import DDPM, EDM
from inflate.sampling.text_to_video import Sampling, sample

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIP = replace(ANIMATEDIFF_V2, motion_norm="clip")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def converted(*arguments: object) -> str:
    result = inflate("convert", *arguments)
    assert result.exit_code == 0, result.output
    return result.stderr


def modelscope_unet() -> VideoUNet:
    unet = VideoUNet.from_2d(tiny_unet_sd2(attention_head_dim=(2, 4), norm_num_groups=32), MODELSCOPE)
    randomise(unet)
    return unet


@pytest.fixture
def unet3d(tmp_path: Path) -> Path:
    modelscope.to_diffusers(modelscope_unet()).save_pretrained(tmp_path / "unet3d")
    return tmp_path / "unet3d"


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The image model that motion modules belong over."""
    tiny_unet_sd1(norm_num_groups=32).save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def motion(parent: Path) -> VideoUNet:
    unet = VideoUNet.from_2d(UNet2DConditionModel.from_pretrained(parent), CLIP)
    for parameter in unet.temporal_parameters().values():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return unet


def same_folder(one: Path, other: Path) -> bool:
    private = ("_diffusers_version", "_name_or_path")
    configs = [{k: v for k, v in read_json(f / "config.json").items() if k not in private} for f in (one, other)]
    return configs[0] == configs[1] and equal(load_file(one / WEIGHTS), load_file(other / WEIGHTS))


def test_the_names_of_formats_are_those_of_the_code() -> None:
    assert set(UNETS) == set(WRITERS)
    assert READERS.keys() - WRITERS.keys() == {TEMPORAL, "i2vgen_xl", "i2vgen_xl_refiner"}
    assert {name for both in PIPELINES for name in both} <= set(FORMATS)
    assert set(WRITTEN) | set(READ_ONLY) == set(FORMATS)
    assert not set(WRITTEN) & set(READ_ONLY)
    assert set(FILES) < set(WRITTEN)
    text = inflate("convert", "--help").output
    assert all(name in text for name in WRITTEN)


def test_unet3d_goes_to_vgen_and_to_ours_and_back(unet3d: Path, tmp_path: Path) -> None:
    converted(unet3d, tmp_path / "unet.safetensors")
    assert "output_blocks.0.0.temopral_conv.conv1.2.weight" in load_file(tmp_path / "unet.safetensors")
    converted(tmp_path / "unet.safetensors", tmp_path / "again")
    converted(unet3d, tmp_path / "ours", "--to", "video-unet")
    converted(tmp_path / "ours", tmp_path / "from_ours", "--to", "unet3d")
    assert same_folder(tmp_path / "from_ours", unet3d)
    assert equal(load_file(tmp_path / "again" / WEIGHTS), load_file(unet3d / WEIGHTS))


def test_motion_modules_go_out_of_a_unet_and_onto_it_again(motion: VideoUNet, parent: Path, tmp_path: Path) -> None:
    whole, adapter = tmp_path / "whole", tmp_path / "adapter"
    animatediff.to_diffusers(motion).save_pretrained(whole)
    converted(whole, adapter)
    converted(adapter, tmp_path / "again", "--image-model", parent)
    assert equal(load_file(tmp_path / "again" / WEIGHTS), load_file(whole / WEIGHTS))
    original = tmp_path / "motion.safetensors"
    assert "AnimateDiff's files have no place for: temporal motion_norm clip" in refused(
        "convert", adapter, original, "--to", "motion-module", "--image-model", parent
    )
    assert not original.exists()
    converted(adapter, original, "--to", "motion-module", "--image-model", parent, "--norm-per-frame")
    found = animatediff.load_original(UNet2DConditionModel.from_pretrained(parent), original)
    assert equal(animatediff.motion_modules(found), animatediff.motion_modules(motion))
    again = ("convert", original, tmp_path / "back", "--to", "motion-adapter", "--image-model", parent)
    assert "MotionAdapter has no place for: temporal motion_norm frame" in refused(*again)
    converted(original, tmp_path / "ours", "--to", "video-unet", "--image-model", parent)
    converted(tmp_path / "ours", tmp_path / "second.safetensors", "--to", "motion-module")
    assert equal(load_file(tmp_path / "second.safetensors"), load_file(original))


def test_motion_modules_go_over_a_single_file(tmp_path: Path) -> None:
    parent, _ = write_single_file(tmp_path / "sd.safetensors")
    animatediff.save_adapter(VideoUNet.from_2d(parent, CLIP), tmp_path / "adapter")
    converted(
        tmp_path / "adapter", tmp_path / "ours", "--to", "video-unet", "--image-model", tmp_path / "sd.safetensors"
    )
    found = VideoUNet.from_pretrained(tmp_path / "ours").state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in parent.state_dict().items())


def test_temporal_layers_alone_become_a_whole_export_over_another_image_model(tmp_path: Path) -> None:
    image, other = (write_text_model(tmp_path / name) for name in ("image", "other"))
    look, _ = parents(other)
    look.conv_out.bias.data.add_(1)
    look.save_pretrained(other / "unet")
    VideoLDM.load(image).save_temporal(tmp_path / "alone", str(image))
    assert "which `inflate generate` draws with" in converted(tmp_path / "alone", tmp_path / "own")
    converted(tmp_path / "alone", tmp_path / "ours", "--image-model", other)
    shutil.rmtree(other)
    found, expected = VideoLDM.load(tmp_path / "ours"), VideoLDM.load(tmp_path / "alone")
    assert torch.equal(found.unet.conv_out.bias, expected.unet.conv_out.bias + 1)
    temporal = [family.unet.created_parameters() for family in (found, expected)]
    assert equal(*temporal)
    assert found.clips == expected.clips
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        "inflate.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["text-to-video", "image-to-video"])
def test_an_export_leaves_its_image_model_out(tmp_path: Path, kind: str) -> None:
    if kind == "text-to-video":
        image, load = write_text_model(tmp_path / "image"), VideoLDM.load
    else:
        image, load = write_image_model(tmp_path / "image"), SVD.load
    family = load(image)
    for name, parameter in family.unet.created_parameters().items():
        parameter.data.copy_(torch.randn(parameter.shape).half() if name.endswith("mix") else parameter.half())
    family.save_pretrained(tmp_path / "export")
    assert "name the image model" in refused("convert", tmp_path / "export", tmp_path / "alone", "--to", TEMPORAL)
    said = converted(tmp_path / "export", tmp_path / "alone", "--to", TEMPORAL, "--image-model", image)
    assert "in half precision" in said
    assert "is a video model already" in refused("verify", tmp_path / "alone")
    assert str(image) in inflate("show", tmp_path / "alone").output
    found, expected = load(tmp_path / "alone").unet.state_dict(), load(tmp_path / "export").unet.state_dict()
    said = converted(tmp_path / "alone", tmp_path / "unet", "--to", "video-unet")
    assert ("the UNet alone" in said) == (kind == "image-to-video")
    assert equal(VideoUNet.from_pretrained(unet_folder(tmp_path / "unet")).state_dict(), found)
    if kind == "image-to-video":
        useless = refused("convert", tmp_path / "export", tmp_path / "x.safetensors", "--image-model", image)
        assert "svd to temporal-layers and video-unet to temporal-layers, not for svd to svd-file" in useless
        converted(tmp_path / "alone", tmp_path / "whole", "--image-model", image)
        assert equal(SVD.load(tmp_path / "whole").unet.state_dict(), found)
    else:
        useless = refused("convert", tmp_path / "alone", tmp_path / "whole", "--image-encoder", image)
        assert "not for temporal-layers of video-unet: leave it out" in useless
        said = refused("convert", tmp_path / "alone", tmp_path / "whole", "--to", "svd")
        assert "is of family video_ldm" in said
        assert "`inflate generate` with video_ldm" in said
    halved = [name for name in found if not torch.equal(found[name], expected[name])]
    assert set(halved) <= {*family.unet.created_parameters(), "conv_in.weight", "conv_in.bias"}
    assert all(torch.equal(found[name], expected[name].half().float()) for name in halved)


def test_a_single_file_becomes_a_folder(tmp_path: Path) -> None:
    unet, vae = write_single_file(tmp_path / "sd.safetensors")
    said = converted(tmp_path / "sd.safetensors", tmp_path / "sd")
    assert "Stable Diffusion 1 that predicts epsilon, without text encoders" in said
    for name, kind, expected in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)):
        assert equal(kind.from_pretrained(tmp_path / "sd" / name).state_dict(), expected.state_dict())
    assert read_json(tmp_path / "sd" / "scheduler" / "scheduler_config.json")["prediction_type"] == "epsilon"


def test_a_single_file_comes_back_of_its_folder(tmp_path: Path) -> None:
    unet, vae = write_single_file(tmp_path / "sd.safetensors")
    converted(tmp_path / "sd.safetensors", tmp_path / "sd")
    config = tmp_path / "sd" / "unet" / "config.json"
    assert read_json(config)["sample_size"] == 64
    config.write_text(json.dumps({**read_json(config), "sample_size": 40}))
    said = converted(tmp_path / "sd", tmp_path / "again.safetensors")
    assert "again.safetensors is a Stable Diffusion 1, without text encoders" in said
    assert equal(load_file(tmp_path / "again.safetensors"), original_names(unet, vae))
    converted(tmp_path / "again.safetensors", tmp_path / "back")
    assert read_json(tmp_path / "back" / "unet" / "config.json")["sample_size"] == 40


def test_the_originals_svd_becomes_a_folder(tmp_path: Path) -> None:
    file, encoder, unet, vae = write_svd_file(tmp_path)
    assert "image_encoder" in refused("convert", file, tmp_path / "svd")
    assert not (tmp_path / "svd").exists()
    assert "UNet " in converted(file, tmp_path / "svd", "--image-encoder", encoder, "--frames", "3")
    found = SVD.from_pretrained(tmp_path / "svd")
    assert (found.frames, found.decode_chunk) == (3, 3)
    assert equal(found.unet.state_dict(), unet.state_dict())
    assert equal(found.vae.state_dict(), vae.state_dict())
    assert found.objective == EDM()


def test_the_originals_svd_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    family, file, again = published_like(), tmp_path / "svd.safetensors", tmp_path / "again.safetensors"
    family.save_sgm(file)
    held = load_file(file)
    save_file({**held, **IDLE}, file)
    left_out = "left out, as nothing uses them: conditioner.embedders.0.open_clip.model.logit_scale"
    assert left_out in converted(file, tmp_path / "svd")
    pipeline = StableVideoDiffusionPipeline.from_pretrained(tmp_path / "svd")
    assert equal(pipeline.image_encoder.state_dict(), family.image_encoder.state_dict())
    assert torch.equal(pipeline.vae.quant_conv.weight, family.vae.quant_conv.weight)
    (tmp_path / "svd" / "inflate.json").unlink()  # as published, without what an export of ours says beside
    assert "it does not tell: cross_attention_resnet_eps 1e-06" in converted(tmp_path / "svd", again)
    assert equal(load_file(again), held)


@pytest.mark.parametrize("told", ["fps", "stride"])
def test_the_originals_dynamicrafter_goes_to_a_folder_and_back(told: Told, tmp_path: Path) -> None:
    family = dynamicrafter(tmp_path, told, 0.7 if told == "fps" else 1.0, gate=told == "stride")
    file, again = tmp_path / "model.ckpt", tmp_path / "again.safetensors"
    tensors = dynamicrafter_original.tensors_of(family)
    torch.save({"state_dict": tensors}, file)
    assert "holds no tokenizer" in refused("convert", file, tmp_path / "folder")
    said = converted(file, tmp_path / "folder", "--tokenizer", tmp_path)
    assert f"is dynamicrafter, trained with {family.objective}, its clips those of the published" in said
    assert "; left out, as nothing uses them: embedder.model." in said
    assert equal(DynamiCrafter.load(tmp_path / "folder").unet.state_dict(), family.unet.state_dict())
    assert not DynamiCrafter.load(tmp_path / "folder").clips.interpolation
    if told == "fps":
        converted(file, tmp_path / "folder", "--tokenizer", tmp_path, "--published", "512_interp", "--overwrite")
        clips = DynamiCrafter.load(tmp_path / "folder").clips
        assert (clips.interpolation, clips.number, clips.height, clips.width) == (True, 5.0, 320, 512)
        assert "is not the published 256" in refused(
            "convert", file, tmp_path / "x", "--tokenizer", tmp_path, "--published", "256"
        )
    assert "zeros are where" in converted(tmp_path / "folder", again)
    assert equal(load_file(again), tensors)
    assert "of which no unet3d is made" in refused("convert", tmp_path / "folder", tmp_path / "x", "--to", "unet3d")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "again.safetensors", "folder", "model.ckpt", "tokenizer",
    ]  # fmt: skip


@pytest.mark.parametrize("told", [True, False])
def test_videocrafter_becomes_text_to_video(told: bool, tmp_path: Path) -> None:
    file, unet = write_videocrafter(tmp_path, told)
    said = converted(file, tmp_path / "folder", "--tokenizer", tmp_path)
    assert "is a whole export of text-to-video" in said
    found = VideoLDM.load(tmp_path / "folder")
    assert equal(found.unet.state_dict(), unet.state_dict())
    assert found.unet.spec == unet.spec
    assert found.objective == DDPM("epsilon", base_scale=0.7)
    assert (found.size, found.clips.frames) == ((320, 512), 16)
    assert (found.clips.fps, found.clips.number) == (8.0, 28.0 if told else None)
    settings = Sampling(steps=2, frames=2, height=16, width=16)
    slow = sample(found, ["a red disc"], [0], settings)
    found.clips = replace(found.clips, number=24.0)
    assert torch.equal(sample(found, ["a red disc"], [0], settings), slow) != told
    assert slow.isfinite().all()
    with pytest.raises(ConfigError, match="ddim alone knows this model's rescaled latents"):
        sample(found, ["a red disc"], [0], replace(settings, sampler="euler"))
    assert "is read, not written" in refused("convert", tmp_path / "folder", file, "--to", "videocrafter-file")


def test_a_whole_modelscope_becomes_text_to_video(tmp_path: Path) -> None:
    found = parts(tmp_path / "ms", MODELSCOPE, sample_size=4)
    for name, part in (("vae", found["vae"]), ("scheduler", found["noise"])):
        part.save_pretrained(tmp_path / "ms" / name)
    modelscope.to_diffusers(found["unet"]).save_pretrained(tmp_path / "ms" / "unet")
    found["text"].save_pretrained(tmp_path / "ms")
    said = converted(tmp_path / "ms", tmp_path / "folder", "--to", "video-unet")
    assert "is a whole export of text-to-video" in said
    family = VideoLDM.load(tmp_path / "folder")
    assert equal(family.unet.state_dict(), found["unet"].state_dict())
    assert (family.unet.spec, family.size, family.objective) == (found["unet"].spec, (8, 8), DDPM("epsilon"))
    converted(tmp_path / "ms", tmp_path / "unet.safetensors")
    assert "input_blocks.0.1.proj_in.weight" in load_file(tmp_path / "unet.safetensors")


def test_an_inflated_svd_cannot_become_the_originals_file(tmp_path: Path) -> None:
    family = published_like(use_post_quant_conv=True)
    family.save_pretrained(tmp_path / "svd")
    assert "has no place for: vae post_quant_conv.weight" in refused(
        "convert", tmp_path / "svd", tmp_path / "svd.safetensors"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["svd"]


def test_what_exists_is_kept_unless_asked_and_unless_it_is_no_model(unet3d: Path, tmp_path: Path) -> None:
    file, ours, mine = tmp_path / "unet.safetensors", tmp_path / "ours", tmp_path / "mine"
    file.write_bytes(b"old")
    assert "exists already; choose another name or add --overwrite" in refused("convert", unet3d, file)
    assert file.read_bytes() == b"old"
    converted(unet3d, file, "--overwrite")
    assert "input_blocks.0.1.proj_in.weight" in load_file(file)
    converted(unet3d, ours, "--to", "video-unet")
    converted(unet3d, ours, "--to", "video-unet", "--overwrite")
    mine.mkdir()
    (mine / "thesis.txt").write_text("dear")
    into = ("--to", "video-unet", "--overwrite")
    assert "it holds thesis.txt" in refused("convert", unet3d, mine, *into)
    assert [entry.name for entry in mine.iterdir()] == ["thesis.txt"]
    assert "is or holds the model that is to be converted" in refused("convert", unet3d, unet3d, *into)
    assert "is no video-unet that could be replaced" in refused("convert", unet3d, file, *into)
    converted(ours, tmp_path / "other", "--to", "unet3d")
    assert "is no video-unet that could be replaced" in refused("convert", unet3d, tmp_path / "other", *into)
    assert "ends in .safetensors, or say with --to which folder it is to be: video-unet, " in refused(
        "convert", unet3d, tmp_path / "folder"
    )
    assert "cannot be written" in refused("convert", unet3d, file / "below", "--to", "video-unet")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["mine", "other", "ours", "unet.safetensors", "unet3d"]


def test_what_cannot_be_is_refused_with_the_reason(unet3d: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    for arguments, message in (
        (("--to", "unet-motion"), "UNetMotionModel has no place for: temporal conv True"),
        (("--to", "svd"), "is unet3d, of which no svd is made; what it can become: video-unet, vgen, "),
        (("--to", "unet3d"), "is unet3d, of which no unet3d is made"),
        (("--to", "checkpoint"), "--to checkpoint: is read, not written: only a run writes its checkpoints"),
        (("--to", "ckpt"), "--to ckpt: is no format that is written; known are stable-diffusion, "),
        (
            ("--to", "video-unet", "--image-encoder", "x"),
            "--image-encoder is for svd-file and dynamicrafter-file and i2vgen_xl-file to i2vgen_xl and "
            "temporal-layers of svd and svd to temporal-layers, not for unet3d",
        ),
        (
            ("--to", "video-unet", "--tokenizer", "x"),
            "--tokenizer is for dynamicrafter-file and videocrafter-file and i2vgen_xl-file to i2vgen_xl and vgen to ",
        ),
    ):
        assert message in refused("convert", unet3d, target, *arguments)
    assert "what it can become: stable-diffusion-file" in refused("convert", "pocket", target, "--to", "svd")
    converted(unet3d, tmp_path / "ours", "--to", "video-unet")
    assert "say with --to which format it is to be: unet3d, " in refused("convert", tmp_path / "ours", target)
    assert "does not tell: unet attention_head_dim" in refused("convert", "pocket", tmp_path / "pocket.safetensors")
    assert inflate("convert", unet3d, target, "--prediction", "sample").exit_code == 2
    assert not target.exists()


def test_a_missing_parent_is_refused(motion: VideoUNet, tmp_path: Path) -> None:
    animatediff.save_adapter(motion, tmp_path / "adapter")
    assert "name its folder or file as --image-model" in refused("convert", tmp_path / "adapter", tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_tensor_left_over_is_listed_and_nothing_written(unet3d: Path, tmp_path: Path) -> None:
    save_file({**load_file(unet3d / WEIGHTS), "odd.weight": torch.zeros(1)}, unet3d / WEIGHTS)
    assert "1 left over (odd.weight)" in refused("convert", unet3d, tmp_path / "unet.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["unet3d"]
