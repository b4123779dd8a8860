"""The UNet that an adapter is for, of a model in any format, by our names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from inflate import catalogue
from inflate.errors import CheckpointError
from inflate.families import animatediff, modelscope, svd, svd_files, video_ldm
from inflate.families.dynamicrafter_original import Original as DynamiCrafterFile
from inflate.families.svd_original import Original
from inflate.models import exchange, folders
from inflate.models.exchange import Read
from inflate.models.single_file import load_image_model
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet

FAMILIES = {svd.FAMILY: (TemporalSpec(), 2), video_ldm.FAMILY: (VIDEO_LDM, 1)}
"""What families inflate an image model's UNet by, and to how many times its input channels."""


def load_unet(path: str, read: Read = exchange.read_tensors) -> UNet2DConditionModel:
    """The UNet of a model in any format: of an image model or of a video model; `read` is how tensors are read.

    CheckpointError where there is none, or it is not whole.
    """
    format, place = catalogue.recognise(path)
    if format not in _READERS:
        raise CheckpointError(f"{path} is {format}, which holds no whole UNet; give one of {', '.join(_READERS)}")
    return _READERS[format](place, read)


def outline(path: str, family: str | None = None) -> UNet2DConditionModel:
    """The same without memory, and of an image model, where a family is named, what that family inflates it to."""
    unet = load_unet(path, exchange.read_headers)
    if family is None or isinstance(unet, VideoUNet):
        return unet
    if family not in FAMILIES:
        raise CheckpointError(f"{path} is an image model, of which family {family} is not made: give the video model")
    spec, times = FAMILIES[family]
    config = folders.plain(unet.config)
    return exchange.build_unet({**config, "in_channels": times * config["in_channels"]}, spec)


def _image_model(folder: Path, read: Read) -> UNet2DConditionModel:
    inside = catalogue.unet_folder(folder)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(exchange.with_defaults(UNet2DConditionModel, inside))
    return _filled(unet, inside, read)


def _our_unet(folder: Path, read: Read) -> VideoUNet:
    inside = catalogue.unet_folder(folder)
    config = folders.plain(folders.read_json(inside / "config.json"))
    return _filled(exchange.build_unet(config, TemporalSpec.from_dict(config.get("temporal") or {})), inside, read)


def _svd(folder: Path, read: Read) -> VideoUNet:
    own = folder / folders.SETTINGS_FILE
    settings = folders.read_json(own) if own.is_file() else {}
    return svd_files.load_diffusers_unet(catalogue.unet_folder(folder), settings.get("unet"), read)


def _filled(unet: Any, folder: Path, read: Read) -> Any:
    """A model without memory with the tensors of a folder that has its names."""
    wanted = exchange.shapes(unet)
    same = {key: key for key in wanted}
    exchange.adopt(unet, exchange.convert(exchange.read_weights(folder, read), same, wanted, str(folder)))
    return unet


def _temporal_layers(folder: Path, read: Read) -> VideoUNet:
    """The UNet over the image model that it names; read whole, as the hash of that model is of its weights."""
    is_svd = folders.read_json(folder / folders.SETTINGS_FILE).get("family") == svd.FAMILY
    unet = (svd.SVD if is_svd else video_ldm.VideoLDM).load(folder).unet
    return unet.to("meta") if read is exchange.read_headers else unet


_READERS: dict[str, Callable[[Path, Read], UNet2DConditionModel]] = {
    "stable-diffusion-file": lambda file, read: load_image_model(file, "epsilon", read).unet,
    "stable-diffusion": _image_model,
    "svd-file": lambda file, read: Original.read(file, read).load_unet(),
    "svd": _svd,
    "dynamicrafter-file": lambda file, read: DynamiCrafterFile.read(file, read).load_unet(),
    "dynamicrafter": _our_unet,
    "videocrafter-file": lambda file, read: DynamiCrafterFile.read(file, read).load_unet(),
    "temporal-layers": _temporal_layers,
    "video-unet": _our_unet,
    "unet3d": lambda folder, read: modelscope.load_diffusers(catalogue.unet_folder(folder), read),
    "unet-i2vgen": lambda folder, read: modelscope.load_diffusers(catalogue.unet_folder(folder), read),
    "vgen": modelscope.load_vgen,
    "i2vgen_xl-file": modelscope.load_vgen,
    "i2vgen_xl": _our_unet,
    "i2vgen_xl_refiner": _our_unet,
    "unet-motion": lambda folder, read: animatediff.load_diffusers(catalogue.unet_folder(folder), read=read),
}
"""How the UNet of each format that has a whole one is read."""
