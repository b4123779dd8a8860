"""Both stages of I2VGen-XL from format to format by the command: VGen's and ModelScope's files, diffusers' folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, I2VGenXLPipeline, I2VGenXLUNet, UNet3DConditionModel
from original_files import (
    CLIP_ALONE,
    HIERARCHY,
    equal,
    i2vgen_xl,
    parts,
    write_open_clip,
    write_tokenizer,
    write_vgen,
    write_whole_file,
)
from safetensors.torch import load_file, save_file
from test_cli import inflate, refused
from test_conversion import converted

from inflate.families import modelscope
from inflate.families.i2vgen_xl import Clips, I2VGenXL
from inflate.families.i2vgen_xl_original import MODELSCOPE, REFINER, VGEN, Trained
from inflate.families.i2vgen_xl_refiner import Clips as RefinerClips
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.layers.hierarchy import Hierarchy
from inflate.models import unet as unets
from inflate.models.folders import read_json
from inflate.models.stable_diffusion import noise_for
from inflate.models.unet import VideoUNet
from inflate.objectives import DDPM

Options = tuple[object, ...]
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def beside(tmp_path: Path) -> Options:
    """The options that name what VGen's file lacks: Stable Diffusion's checkpoint, OpenCLIP's file and a tokenizer."""
    place = tmp_path / "beside"
    place.mkdir()
    write_whole_file(place / "sd.safetensors", "Stable Diffusion 2")
    torch.save({"state_dict": load_file(place / "sd.safetensors")}, place / "v2-1_512-ema-pruned.ckpt")
    write_tokenizer(place)
    return "--image-model", place / "v2-1_512-ema-pruned.ckpt", "--tokenizer", place


@pytest.fixture
def vision(tmp_path: Path) -> Options:
    """The option that names OpenCLIP's file."""
    file = write_open_clip(i2vgen_xl(tmp_path).image_encoder, tmp_path / "open_clip_pytorch_model.bin")
    return "--image-encoder", file


@pytest.mark.parametrize(("hierarchy", "published"), [(HIERARCHY, VGEN), (CLIP_ALONE, MODELSCOPE)])
def test_the_originals_unet_becomes_a_whole_model_and_comes_back(
    hierarchy: Hierarchy, published: Trained, beside: Options, tmp_path: Path
) -> None:
    own = i2vgen_xl(tmp_path, hierarchy)
    vision = "--image-encoder", write_open_clip(own.image_encoder, tmp_path / "open_clip_pytorch_model.bin")
    file = write_vgen(own.unet, tmp_path / "i2vgen_xl_00854500.pth")
    said = converted(file, tmp_path / "folder", *beside, *vision)
    family = I2VGenXL.load(tmp_path / "folder")
    assert "is i2vgen_xl, as published, with DDPM(prediction='v_prediction'" in said
    assert (family.objective, family.clips) == published
    assert family.hierarchy == own.hierarchy
    assert equal(family.unet.state_dict(), own.unet.state_dict())
    assert equal(family.image_encoder.state_dict(), own.image_encoder.state_dict())
    assert family.text.networks[0].config.num_hidden_layers == 2  # of three
    again = tmp_path / "again.safetensors"
    assert "its header tells the noise schedule and clips" in converted(tmp_path / "folder", again)
    assert equal(load_file(again), torch.load(file)["state_dict"])
    settings = tmp_path / "folder" / "inflate.json"
    settings.write_text(json.dumps({**read_json(settings), "clips": {"frames": 5, "fps": 4.0}}))
    converted(tmp_path / "folder", again, "--overwrite")
    converted(again, tmp_path / "told", *beside, *vision)
    assert I2VGenXL.load(tmp_path / "told").clips == Clips(5, 4.0)


def test_the_unet_alone_becomes_diffusers_and_ours_and_comes_back(tmp_path: Path) -> None:
    own = i2vgen_xl(tmp_path).unet
    file = write_vgen(own, tmp_path / "unet.pth")
    converted(file, tmp_path / "theirs", "--to", "unet-i2vgen")
    converted(tmp_path / "theirs", tmp_path / "ours", "--to", "video-unet")
    assert equal(VideoUNet.from_pretrained(tmp_path / "ours").state_dict(), own.state_dict())
    converted(tmp_path / "ours", tmp_path / "again.safetensors", "--to", "i2vgen_xl-file")
    assert equal(load_file(tmp_path / "again.safetensors"), torch.load(file)["state_dict"])
    for to, message in (
        ("unet3d", "UNet3DConditionModel has no place for: what encodes first frames"),
        ("vgen", "is told first frames: its format of VGen's names is i2vgen_xl-file"),
    ):
        target = tmp_path / "x.safetensors" if to == "vgen" else tmp_path / "x"
        assert message in refused("convert", tmp_path / "ours", target, "--to", to)


def test_what_a_unets_file_lacks_must_be_named(beside: Options, vision: Options, tmp_path: Path) -> None:
    file, target = write_vgen(i2vgen_xl(tmp_path).unet, tmp_path / "unet.pth"), tmp_path / "target"
    sd, folder = beside[1], i2vgen_xl(tmp_path)
    folder.save_pretrained(tmp_path / "whole")
    modelscope.to_i2vgen(folder.unet).save_pretrained(tmp_path / "pipeline" / "unet")
    for options, message in (
        ((), "holds no image encoder: name the folder of CLIP ViT-H/14"),
        (vision, "no autoencoder and no text encoder: name the Stable Diffusion that they are of"),
        ((*vision, "--image-model", sd), "v2-1_512-ema-pruned.ckpt holds no tokenizer: name the folder of one"),
        ((*beside, "--image-encoder", sd), "v2-1_512-ema-pruned.ckpt holds no image encoder (visual.*)"),
        ((*vision, "--image-model", tmp_path / "whole", "--tokenizer", tmp_path), "which holds its tokenizer: leave"),
        (
            (*vision, "--image-model", tmp_path / "pipeline"),
            "is of class I2VGenXLUNet; give the folder of a mod",
        ),
        ((*vision, "--image-model", tmp_path / "nowhere"), "nowhere does not exist; give a folder"),
        ((*vision, *beside, "--double-detail"), "--double-detail is for unet-i2vgen, not for i2vgen_xl-file to i2vg"),
        (("--to", "video-unet", *vision), "not for i2vgen_xl-file to video-unet: leave it out"),
    ):
        assert message in refused("convert", file, target, *options)
    assert not target.exists()
    converted(file, target, *vision, "--image-model", tmp_path / "whole")
    assert equal(I2VGenXL.load(target).vae.state_dict(), folder.vae.state_dict())


def test_a_file_that_is_not_whole_or_pickles_code_is_refused(tmp_path: Path) -> None:
    tensors = modelscope.to_vgen(i2vgen_xl(tmp_path).unet)
    into = (tmp_path / "target", "--to", "video-unet")
    for key in ("local_temporal_encoder.layers.0.0.fn.to_qkv.weight", "fps_embedding.2.bias"):
        torch.save({"state_dict": {**{name: tensors[name] for name in tensors if name != key}}}, tmp_path / "a.pth")
        assert f"a.pth does not fit the model: 1 missing ({key})" in refused("convert", tmp_path / "a.pth", *into)
    torch.save({"state_dict": {**tensors, "odd": torch.zeros(1)}}, tmp_path / "a.pth")
    assert "1 left over (odd)" in refused("convert", tmp_path / "a.pth", *into)
    torch.save({"state_dict": tensors, "step": Path("code")}, tmp_path / "a.pth")
    assert "pickles more than tensors, which is never run" in refused("convert", tmp_path / "a.pth", *into)
    torch.save({"config": 1}, tmp_path / "a.pth")
    assert "a.pth holds no state dict" in refused("convert", tmp_path / "a.pth", *into)
    assert not (tmp_path / "target").exists()


def test_the_refinement_is_told_apart_by_what_it_is_to_become(beside: Options, tmp_path: Path) -> None:
    own = parts(tmp_path, unets.MODELSCOPE)["unet"]
    own.pad_rows()
    file = write_vgen(own, tmp_path / "sr_step_110000_ema.pth")
    said = converted(file, tmp_path / "text", "--to", "unet3d")
    assert "was taken for text-to-video, whose tensors VGen's sr600 and ModelScope's Video-to-Video share" in said
    assert "as no tensor tells, the refinement" in inflate("show", file).output
    assert UNet3DConditionModel.from_pretrained(tmp_path / "text").config.downsample_padding == 1
    converted(file, tmp_path / "folder", "--to", "i2vgen_xl_refiner", *beside)
    family = Refiner.load(tmp_path / "folder")
    assert (family.objective, family.clips) == REFINER
    assert family.unet.config.downsample_padding == [2, 1]
    assert equal(family.unet.state_dict(), own.state_dict())
    again = tmp_path / "again.safetensors"
    converted(tmp_path / "folder", again)
    assert equal(load_file(again), torch.load(file)["state_dict"])
    assert "refinement" in inflate("show", again).output
    assert "whose spare rows it does not take off" in refused("convert", again, tmp_path / "x", "--to", "unet3d")
    converted(tmp_path / "text", tmp_path / "t2v.safetensors", "--to", "vgen")
    assert "taken for" not in converted(tmp_path / "t2v.safetensors", tmp_path / "text", "--overwrite")
    told = ("convert", tmp_path / "t2v.safetensors", tmp_path / "x", "--to", "i2vgen_xl_refiner", *beside)
    assert "tells that it is text-to-video" in refused(*told)


@pytest.mark.parametrize("padded", [True, False])
def test_a_refinement_of_ours_keeps_its_schedule_and_clips(padded: bool, beside: Options, tmp_path: Path) -> None:
    own, clips = parts(tmp_path, unets.MODELSCOPE), RefinerClips(5, 4.0, 24, 32, levels=300, negative="a blue box")
    if padded:
        own["unet"].pad_rows()
    family = Refiner(own["unet"], own["vae"], own["text"], noise_for(DDPM("epsilon")), clips)
    family.save_pretrained(tmp_path / "ours")
    assert "tells the noise schedule and clips" in converted(tmp_path / "ours", tmp_path / "unet.safetensors")
    said = converted(tmp_path / "unet.safetensors", tmp_path / "again", "--to", "i2vgen_xl_refiner", *beside)
    assert "as published" not in said
    again = Refiner.load(tmp_path / "again")
    assert (again.objective, again.clips) == (family.objective, clips)
    assert again.unet.config.downsample_padding == ([2, 1] if padded else 1)
    assert equal(again.unet.state_dict(), family.unet.state_dict())


def test_our_folder_becomes_diffusers_pipeline_and_comes_back(tmp_path: Path) -> None:
    family = i2vgen_xl(tmp_path)
    family.save_pretrained(tmp_path / "ours")
    said = converted(tmp_path / "ours", tmp_path / "theirs", "--to", "unet-i2vgen")
    assert "whose text encoder ends in a layer that changes nothing: where" in said
    assert "clip_skip=None draws the same" in said
    pipeline = I2VGenXLPipeline.from_pretrained(tmp_path / "theirs")
    assert equal(pipeline.unet.state_dict(), modelscope.to_i2vgen(family.unet).state_dict())
    assert pipeline.feature_extractor.crop_size == {"height": 224, "width": 224}
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    pipeline.scheduler.set_timesteps(50)
    assert pipeline.scheduler.timesteps[[0, 1, -1]].tolist() == [981, 961, 1]
    assert pipeline.scheduler.final_alpha_cumprod == pipeline.scheduler.alphas_cumprod[0] < 1
    tokens = pipeline.tokenizer(["a red disc"], padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(tokens, output_hidden_states=True)
    expected = family.embed(["a red disc"]).context
    torch.testing.assert_close(states.last_hidden_state, expected, atol=1e-6, rtol=0)
    assert torch.equal(states.hidden_states[-1], states.hidden_states[-2])
    pipeline._guidance_scale = 1.0  # which a call of the pipeline sets: no negative prompt
    told, _ = pipeline.encode_prompt("a red disc", torch.device("cpu"), 1, clip_skip=None)
    torch.testing.assert_close(told, expected, atol=1e-6, rtol=0)
    said = converted(tmp_path / "theirs", tmp_path / "again")
    assert "pads with" not in said
    again = I2VGenXL.load(tmp_path / "again")
    assert (again.clips, again.objective) == (family.clips, family.objective)
    assert again.parts.keys() == family.parts.keys()
    for name, part in again.parts.items():
        assert equal(part.state_dict(), family.parts[name].state_dict()), name


def test_rescaled_latents_are_told_in_a_file_and_have_no_place_in_diffusers_pipeline(
    beside: Options, vision: Options, tmp_path: Path
) -> None:
    family = i2vgen_xl(tmp_path)
    family.base_scale = 0.7
    family.save_pretrained(tmp_path / "ours")
    assert "no place for: rescaled latents" in refused(
        "convert", tmp_path / "ours", tmp_path / "x", "--to", "unet-i2vgen"
    )
    converted(tmp_path / "ours", tmp_path / "unet.safetensors")
    converted(tmp_path / "unet.safetensors", tmp_path / "again", *beside, *vision)
    assert I2VGenXL.load(tmp_path / "again").objective == family.objective


def as_published(folder: Path) -> Path:
    """A pipeline's folder, of ours, as it was if its UNet had been converted by its names alone."""
    config, weights = folder / "unet" / "config.json", folder / "unet" / WEIGHTS
    told = {name: value for name, value in read_json(config).items() if name != modelscope.DOUBLED}
    config.write_text(json.dumps(told))
    tensors = load_file(weights)
    tensors["conv_in.weight"][:, 4:] /= 2
    save_file(tensors, weights)
    (folder / "inflate.json").unlink()
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(json.dumps({**read_json(schedule), "set_alpha_to_one": True}))
    return folder


def test_a_published_folder_is_read_as_it_is_or_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    family = i2vgen_xl(tmp_path)
    family.save_pretrained(tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "whole", "--to", "unet-i2vgen")
    assert caplog.messages == []
    assert "do not double it" in refused("convert", tmp_path / "whole", tmp_path / "x", "--double-detail")
    published = as_published(tmp_path / "whole")
    assert "half of VGen's, as far as is known" in inflate("show", published).output
    caplog.clear()
    converted(published, tmp_path / "as_it_is")
    assert len(caplog.messages) == 1
    assert "detail half of its strength" in caplog.messages[0]
    found = I2VGenXL.load(tmp_path / "as_it_is")
    assert (found.clips, found.noise.config.set_alpha_to_one) == (VGEN.clips, False)
    assert torch.equal(2 * found.unet.conv_in.weight[:, 4:], family.unet.conv_in.weight[:, 4:])
    caplog.clear()
    converted(published, tmp_path / "mended", "--double-detail")
    assert caplog.messages == []
    assert equal(I2VGenXL.load(tmp_path / "mended").unet.state_dict(), family.unet.state_dict())


def test_what_a_pipeline_has_no_place_for_is_refused(tmp_path: Path) -> None:
    i2vgen_xl(tmp_path, replace(HIERARCHY, global_encoder=False)).save_pretrained(tmp_path / "ours")
    assert "I2VGenXLUNet has no place for: hierarchy global_encoder False" in refused(
        "convert", tmp_path / "ours", tmp_path / "theirs", "--to", "unet-i2vgen"
    )
    I2VGenXLUNet(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock3D",), up_block_types=("CrossAttnUpBlock3D",),
        layers_per_block=1, cross_attention_dim=32, attention_head_dim=16,
    ).save_pretrained(tmp_path / "alone")  # fmt: skip
    assert "holds a I2VGenXLUNet alone; give the folder of the whole model" in refused(
        "convert", tmp_path / "alone", tmp_path / "x"
    )
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["alone", "ours", "tokenizer"]
