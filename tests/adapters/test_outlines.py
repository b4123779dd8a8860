from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from original_files import dynamicrafter, equal, i2vgen_xl, write_single_file, write_svd_file, write_videocrafter
from tiny_i2vgen_xl import refiner

from helpers import tiny_unet, tiny_unet_sd2, write_image_model
from inflate import catalogue
from inflate.adapters import outlines
from inflate.errors import CheckpointError
from inflate.families import animatediff, dynamicrafter_original, modelscope
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.models.unet import ANIMATEDIFF_V2, MODELSCOPE, VIDEO_LDM, TemporalSpec, VideoUNet

Written = tuple[Path, UNet2DConditionModel]


def image_model(folder: Path) -> Written:
    unet = tiny_unet()
    unet.save_pretrained(folder / "model" / "unet")
    return folder / "model", unet


def image_file(folder: Path) -> Written:
    return folder / "a.safetensors", write_single_file(folder / "a.safetensors")[0]


def svd(folder: Path) -> Written:
    family = SVD.load(write_image_model(folder / "parent"))
    family.save_pretrained(folder / "export")
    return folder / "export", family.unet


def svd_file(folder: Path) -> Written:
    file, _, unet, _ = write_svd_file(folder)
    return file, unet


def video_unet(folder: Path) -> Written:
    unet = VideoUNet.from_2d(tiny_unet(), VIDEO_LDM)
    unet.save_pretrained(folder / "unet")
    return folder, unet


def _modelscope() -> VideoUNet:
    return VideoUNet.from_2d(tiny_unet_sd2(attention_head_dim=(2, 4), norm_num_groups=32), MODELSCOPE)


def unet3d(folder: Path) -> Written:
    unet = _modelscope()
    modelscope.to_diffusers(unet).save_pretrained(folder)
    return folder, unet


def vgen(folder: Path) -> Written:
    unet = _modelscope()
    modelscope.save_vgen(unet, folder / "a.safetensors")
    return folder / "a.safetensors", unet


def i2vgen_xl_file(folder: Path) -> Written:
    unet = i2vgen_xl(folder).unet
    modelscope.save_vgen(unet, folder / "a.safetensors")
    return folder / "a.safetensors", unet


def i2vgen_xl_folder(folder: Path) -> Written:
    family = i2vgen_xl(folder)
    family.save_pretrained(folder / "export")
    return folder / "export", family.unet


def i2vgen_xl_refiner(folder: Path) -> Written:
    family = refiner(folder / "image")
    family.save_pretrained(folder / "export")
    return folder / "export", family.unet


def unet_i2vgen(folder: Path) -> Written:
    unet = i2vgen_xl(folder).unet
    modelscope.to_i2vgen(unet).save_pretrained(folder / "unet")
    return folder, unet


def unet_motion(folder: Path) -> Written:
    unet = VideoUNet.from_2d(tiny_unet(norm_num_groups=32), replace(ANIMATEDIFF_V2, motion_norm="clip"))
    animatediff.to_diffusers(unet).save_pretrained(folder)
    return folder, unet


def dynamicrafter_folder(folder: Path) -> Written:
    family = dynamicrafter(folder)
    family.save_pretrained(folder / "export")
    return folder / "export", family.unet


def dynamicrafter_file(folder: Path) -> Written:
    family = dynamicrafter(folder, "stride", gate=True)
    dynamicrafter_original.write(family, folder / "a.safetensors")
    return folder / "a.safetensors", family.unet


WRITERS: dict[str, Callable[[Path], Written]] = {
    "stable-diffusion": image_model,
    "stable-diffusion-file": image_file,
    "svd": svd,
    "svd-file": svd_file,
    "dynamicrafter": dynamicrafter_folder,
    "dynamicrafter-file": dynamicrafter_file,
    "videocrafter-file": write_videocrafter,
    "video-unet": video_unet,
    "unet3d": unet3d,
    "vgen": vgen,
    "i2vgen_xl-file": i2vgen_xl_file,
    "i2vgen_xl": i2vgen_xl_folder,
    "i2vgen_xl_refiner": i2vgen_xl_refiner,
    "unet-i2vgen": unet_i2vgen,
    "unet-motion": unet_motion,
}


@pytest.mark.parametrize("format", WRITERS)
def test_the_unet_of_every_format_is_read(format: str, tmp_path: Path) -> None:
    path, unet = WRITERS[format](tmp_path)
    assert catalogue.recognise(path)[0] == format
    assert equal(outlines.load_unet(str(path)).state_dict(), unet.state_dict())
    outline = outlines.outline(str(path))
    assert {key: value.shape for key, value in outline.state_dict().items()} == {
        key: value.shape for key, value in unet.state_dict().items()
    }
    assert {value.device.type for value in outline.state_dict().values()} == {"meta"}


def test_an_image_model_is_outlined_as_its_family_inflates_it(tmp_path: Path) -> None:
    path, _ = image_model(tmp_path)
    for family, spec, channels in (("svd", TemporalSpec(), 8), ("video_ldm", VIDEO_LDM, 4)):
        born = VideoUNet.from_2d(tiny_unet(), spec, channels)
        outline = outlines.outline(str(path), family)
        assert {key: value.shape for key, value in outline.state_dict().items()} == {
            key: value.shape for key, value in born.state_dict().items()
        }
    with pytest.raises(CheckpointError, match="family dit is not made"):
        outlines.outline(str(path), "dit")


def test_motion_modules_alone_are_no_unet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = VideoUNet.from_2d(tiny_unet(norm_num_groups=32), replace(ANIMATEDIFF_V2, motion_norm="clip"))
    animatediff.save_adapter(unet, tmp_path / "motion")
    with pytest.raises(CheckpointError, match="is motion-adapter, which holds no whole UNet"):
        outlines.load_unet(str(tmp_path / "motion"))


@pytest.mark.parametrize(("model", "family"), [("pocket-svd", SVD), ("pocket-t2v", VideoLDM)])
def test_temporal_layers_alone_are_read_over_their_image_model(model: str, family: type[SVD | VideoLDM]) -> None:
    expected = family.load(model).unet.state_dict()
    assert equal(outlines.load_unet(model).state_dict(), expected)
    outline = outlines.outline(model).state_dict()
    assert all(value.is_meta for value in outline.values())
    assert {key: value.shape for key, value in outline.items()} == {key: value.shape for key, value in expected.items()}
