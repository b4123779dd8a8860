"""Every format is told by what it holds, and each of its tensors is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import (
    CLIP_ALONE,
    IDLE,
    dynamicrafter,
    i2vgen_xl,
    published_like,
    write_single_file,
    write_svd_file,
    write_videocrafter,
)
from safetensors.torch import load_file, save_file
from test_cli import inflate, refused
from tiny_i2vgen_xl import refiner
from tiny_video_ldm import write_text_model

from helpers import tiny_unet_sd1, tiny_unet_sd2, tiny_unet_sdxl
from inflate import catalogue, formats
from inflate.errors import CheckpointError
from inflate.families import animatediff, dynamicrafter_original, modelscope
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.models import image_stream
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, TemporalSpec, VideoUNet

CLIP = replace(ANIMATEDIFF_V2, motion_norm="clip")
FPS = replace(MODELSCOPE, added_ids=1, added_id_dim=32)
HEADS = {"attention_head_dim": (2, 4)}
EPSILON = "cross_attention_resnet_eps=1e-05"


def single_file(folder: Path) -> Path:
    write_single_file(folder / "sd.safetensors")
    return folder / "sd.safetensors"


def svd_file(folder: Path) -> Path:
    file = folder / "svd.safetensors"
    published_like().save_sgm(file)
    save_file({**load_file(file), **IDLE}, file)
    return file


def svd(folder: Path) -> Path:
    file, encoder, _, _ = write_svd_file(folder)
    SVD.load(file, encoder).save_pretrained(folder / "export")
    return folder / "export"


def text_to_video(folder: Path) -> Path:
    VideoLDM.load(write_text_model(folder / "image")).save_pretrained(folder / "export")
    return folder / "export"


def temporal_layers(folder: Path) -> Path:
    image = write_text_model(folder / "image")
    VideoLDM.load(image).save_temporal(folder / "export", str(image))
    return folder / "export"


def dynamicrafter_file(folder: Path) -> Path:
    file = folder / "model.safetensors"
    dynamicrafter_original.write(dynamicrafter(folder, base_scale=0.7), file)
    return file


def dynamicrafter_folder(folder: Path) -> Path:
    dynamicrafter(folder, "stride", gate=True).save_pretrained(folder / "export")
    return folder / "export"


def videocrafter_file(folder: Path) -> Path:
    file, _ = write_videocrafter(folder)
    save_file(torch.load(file)["state_dict"], folder / "videocrafter.safetensors")
    return folder / "videocrafter.safetensors"


def sdxl(folder: Path) -> Path:
    tiny_unet_sdxl().save_pretrained(folder)
    return folder


def unet3d(folder: Path) -> Path:
    modelscope.to_diffusers(VideoUNet.from_2d(tiny_unet_sd2(**HEADS), MODELSCOPE)).save_pretrained(folder)
    return folder


def vgen(folder: Path) -> Path:
    unet = VideoUNet.from_2d(tiny_unet_sd2(**HEADS, norm_num_groups=32), FPS)
    modelscope.save_vgen(unet, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def i2vgen_xl_file(folder: Path) -> Path:
    modelscope.save_vgen(i2vgen_xl(folder, CLIP_ALONE).unet, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def i2vgen_xl_folder(folder: Path) -> Path:
    i2vgen_xl(folder).save_pretrained(folder / "export")
    return folder / "export"


def i2vgen_xl_refiner(folder: Path) -> Path:
    refiner(folder / "image").save_pretrained(folder / "export")
    return folder / "export"


def unet_i2vgen(folder: Path) -> Path:
    modelscope.to_i2vgen(i2vgen_xl(folder).unet).save_pretrained(folder / "unet")
    return folder


def unet_motion(folder: Path) -> Path:
    animatediff.to_diffusers(VideoUNet.from_2d(tiny_unet_sd1(), CLIP)).save_pretrained(folder / "unet")
    return folder


def motion_adapter(folder: Path) -> Path:
    animatediff.save_adapter(VideoUNet.from_2d(tiny_unet_sd1(), CLIP), folder)
    return folder


def motion_module(folder: Path) -> Path:
    animatediff.save_original(VideoUNet.from_2d(tiny_unet_sd1(), ANIMATEDIFF_V2), folder / "motion.safetensors")
    return folder / "motion.safetensors"


def stream(folder: Path) -> Path:
    made = dynamicrafter(folder)
    (folder / "export").mkdir()
    image_stream.save(made.unet, made.image_encoder, folder / "export")
    return folder / "export"


def checkpoint(folder: Path) -> Path:
    (folder / "state.json").write_text(json.dumps({"step": 7}))
    save_file({"a": torch.zeros(3)}, folder / "unet.safetensors")
    return folder


BLOCKS = {"2D", "temporal: resnet", "temporal: block"}
SLOTS = {"2D", "temporal: conv", "temporal: transformer", "temporal: input"}
FORMATS: dict[str, tuple[Callable[[Path], Path], dict[str, str], set[str]]] = {
    "stable-diffusion-file": (
        single_file,
        {"model": "Stable Diffusion 1", "prediction": "epsilon", "context width": "32"},
        {"2D", "VAE", "cond_stage_model"},
    ),
    "stable-diffusion": (sdxl, {"model": "Stable Diffusion XL", "context width": "32"}, {"2D"}),
    "svd-file": (
        svd_file,
        {"context width": "32"},
        BLOCKS | {"conditioning", "VAE", "VAE's encoder again", "image encoder", "idle"},
    ),
    "svd": (
        svd,
        {"written as": "an export of ours (inflate.json)", "prediction": "v_prediction"},
        BLOCKS | {"conditioning", "vae", "image_encoder"},
    ),
    "video-unet": (
        text_to_video,
        {"context width": "64", "temporal layers": f"resnet=True, block=True, each_up_to=2, added_ids=0, {EPSILON}"},
        BLOCKS | {"vae", "text_encoder"},
    ),
    "dynamicrafter-file": (
        dynamicrafter_file,
        {
            "objective": "prediction=v_prediction, zero_terminal_snr=True, base_scale=0.7, schedule=scaled_linear",
            "clips": "frames=3, fps=8.0, height=16, width=16, told=fps, number=5.0",
            "image": "embedding=1280, width=32, depth=2, heads=2, head_width=64, queries=16, frames=3, "
            "other_lengths=interpolate",
        },
        SLOTS | {"conditioning", "image", "VAE", "text encoder", "image encoder", "schedule", "idle"},
    ),
    "dynamicrafter": (
        dynamicrafter_folder,
        {
            "objective": "prediction=epsilon, base_scale=1.0, schedule=scaled_linear",
            "clips": "frames=3, fps=8.0, height=16, width=16, told=stride, number=5.0",
            "prediction": "epsilon",
        },
        SLOTS | {"conditioning", "image", "vae", "text_encoder", "image_encoder"},
    ),
    "videocrafter-file": (
        videocrafter_file,
        {"objective": "prediction=epsilon, base_scale=0.7, schedule=scaled_linear", "context width": "64"},
        SLOTS | {"conditioning", "VAE", "text encoder", "schedule"},
    ),
    "temporal-layers": (temporal_layers, {}, BLOCKS - {"2D"}),
    "unet3d": (unet3d, {"context width": "32"}, SLOTS),
    "vgen": (vgen, {"model": "text-to-video", "context width": "32"}, SLOTS | {"conditioning"}),
    "i2vgen_xl-file": (
        i2vgen_xl_file,
        {
            "objective": "prediction=v_prediction, base_scale=1.0, schedule=scaled_linear",
            "clips": "frames=32, fps=8.0, height=256, width=448",
            "image": "channels=4, embedding=64, clip_tokens=4, dropout=0.05",
        },
        SLOTS | {"conditioning", "image"},
    ),
    "i2vgen_xl": (
        i2vgen_xl_folder,
        {
            "objective": "prediction=v_prediction, zero_terminal_snr=True, base_scale=1.0, schedule=cosine",
            "clips": "frames=3, fps=8.0, height=16, width=16, prompts=True",
            "image": "channels=4, clip_tokens=4, detail_encoder=True, dropout=0.05, embedding=64, global_encoder=True",
        },
        SLOTS | {"conditioning", "image", "vae", "text_encoder", "image_encoder"},
    ),
    "i2vgen_xl_refiner": (
        i2vgen_xl_refiner,
        {"clips": "frames=3, fps=8.0, height=32, width=32, levels=600"},
        BLOCKS | {"vae", "text_encoder"},
    ),
    "unet-i2vgen": (unet_i2vgen, {"detail": "as VGen's"}, SLOTS | {"conditioning", "image"}),
    "unet-motion": (unet_motion, {"context width": "32"}, {"2D", "temporal: motion"}),
    "motion-adapter": (motion_adapter, {}, {"temporal: motion"}),
    "motion-module": (motion_module, {}, {"temporal: motion"}),
    "image-stream": (
        stream,
        {
            "image": "embedding=1280, width=32, depth=2, heads=2, head_width=64, queries=16, frames=3, "
            "other_lengths=interpolate"
        },
        {"image"},
    ),
    "checkpoint": (checkpoint, {"step": "7"}, {"unet"}),
}


def test_every_known_format_is_tried() -> None:
    assert FORMATS.keys() == formats.FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_told_and_every_tensor_counted(name: str, tmp_path: Path) -> None:
    write, facts, groups = FORMATS[name]
    path = write(tmp_path)
    found = catalogue.describe(path)
    assert found.format == name
    assert found.facts.items() >= facts.items()
    assert {group for group, tensors in found.groups.items() if tensors} == groups
    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    held = [tensor for file in files for tensor in load_file(file).values()]
    told = [tensor for group in found.groups.values() for tensor in group]
    assert {tensor.device.type for tensor in told} == {"meta"}
    assert (len(told), sum(map(torch.numel, told))) == (len(held), sum(map(torch.numel, held)))
    last = found.table().splitlines()[-1].split()
    assert last[:3] == ["all", str(len(held)), f"{sum(map(torch.numel, held)):,}"]


def test_the_command_prints_the_table_and_refuses_in_a_line(tmp_path: Path) -> None:
    result = inflate("show", "pocket")
    assert result.exit_code == 0, result.output
    assert result.stdout == catalogue.describe("pocket").table() + "\n"
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:2] == ["format: stable-diffusion: Stable Diffusion, diffusers' folder", "model: Stable Diffusion 2"]
    assert "2D 246 3,433,988 6.55 float16" in lines
    assert "is of no known format" in refused("show", tmp_path)


@pytest.mark.parametrize("told", [{}, {"unet": {}}, {"spec": {}}, {"unet": None}])
def test_temporal_layers_that_do_not_tell_which_they_are_are_refused(told: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "inflate.json").write_text(json.dumps({"family": "svd", **told}))
    save_file({"unet.mix": torch.zeros(1)}, tmp_path / "temporal.safetensors")
    assert "inflate.json does not tell which temporal layers it is of" in refused("show", tmp_path)


def test_half_precision_is_counted_as_saved(tmp_path: Path) -> None:
    tiny_unet_sd2().half().save_pretrained(tmp_path)
    assert catalogue.describe(tmp_path).table().splitlines()[-1].split()[-1] == "float16"


def test_settings_of_layers_that_a_model_lacks_are_not_told(tmp_path: Path) -> None:
    VideoUNet.from_2d(tiny_unet_sd2(), TemporalSpec(added_ids=0)).save_pretrained(tmp_path)
    assert "motion" not in catalogue.describe(tmp_path).facts["temporal layers"]


@pytest.mark.parametrize("change", ["missing", "left over"])
def test_a_model_that_is_not_whole_is_refused(change: str, tmp_path: Path) -> None:
    file = unet3d(tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    odd = tensors.pop("transformer_in.proj_in.weight")
    save_file(tensors if change == "missing" else {**load_file(file), "transformer_in.odd": odd}, file)
    with pytest.raises(CheckpointError, match=rf"1 {change} \(transformer_in\."):
        catalogue.describe(tmp_path)


def test_what_is_not_known_says_what_was_looked_for(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor's name has \.pos_encoder\.pe, .*; it holds a\.weight"):
        catalogue.describe(tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"has no unet/config\.json, .*; it holds odd\.safetensors"):
        catalogue.describe(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CheckpointError, match="is of class AutoencoderKL, which is not known; known are UNet2DCondit"):
        catalogue.describe(tmp_path)
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"notes\.txt is no file of weights, whose names end in \.safetensors"):
        catalogue.describe(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"\./nowhere does not exist"):
        catalogue.describe("./nowhere")
