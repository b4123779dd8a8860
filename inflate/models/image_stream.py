"""The image stream alone: what a UNet has that makes tokens of an image and attends to them, without what is around it.

A folder of it holds `image_stream.safetensors` and `inflate.json`. It is trained on single images, with one group of
queries, and goes into a text-to-video model of the same image model's shape, where each frame begins with that group.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.layers.image_context import ImageContext
from inflate.models import exchange, folders
from inflate.models.unet import VideoUNet
from inflate.models.weights import weights_sha256

FILE = "image_stream.safetensors"
KIND = "image_stream"


def is_in(folder: Path) -> bool:
    """Whether a folder holds an image stream."""
    return (folder / FILE).is_file()


def check_place(path: str) -> None:
    """CheckpointError for a path that is no folder here: no stream is shipped or on the Hub."""
    if not Path(path).expanduser().is_dir():
        raise CheckpointError(
            f"model.image_stream={path} does not exist; name the folder `export` of a run of stage=context"
        )


def save(unet: VideoUNet, encoder: nn.Module, folder: Path) -> None:
    """Writes the image stream of a UNet, and a hash of the image encoder whose features it has learned to read."""
    context = unet.image_context
    assert context is not None
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in unet.image_parameters().items()}
    save_file(tensors, folder / FILE)
    told = {KIND: context.to_dict(), "image_encoder_sha256": weights_sha256(encoder)}
    (folder / folders.SETTINGS_FILE).write_text(json.dumps(told, indent=2) + "\n")


def load(unet: VideoUNet, encoder: nn.Module, folder: Path, frames: int) -> None:
    """Gives a UNet without an image context the stream of a folder, its queries for each of so many frames.

    CheckpointError, with the UNet as it was, where the folder holds none, or it belongs to an image model of another
    shape or to another image encoder.
    """
    told, context = _told(folder), context_of(folder)
    if told["image_encoder_sha256"] != weights_sha256(encoder):
        raise CheckpointError(
            f"{folder} reads the features of another image encoder (its weights differ): name the one of its training "
            "as model.image_encoder"
        )
    tensors = _fitting(unet, context, folder)
    unet.add_image_context(context)
    own = unet.image_parameters()
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    assert unet.query_transformer is not None
    unet.set_query_transformer(unet.query_transformer.with_groups(frames))


def context_of(folder: Path) -> ImageContext:
    """How the stream of a folder attends to an image; CheckpointError where the folder holds none."""
    return ImageContext.from_dict(_told(folder)[KIND])


def _told(folder: Path) -> dict[str, Any]:
    if not is_in(folder):
        raise CheckpointError(f"{folder} holds no image stream ({FILE}): name the export of a run of stage=context")
    file = folder / folders.SETTINGS_FILE
    told = folders.read_json(file)
    missing = [name for name in (KIND, "image_encoder_sha256") if name not in told]
    if missing:
        raise CheckpointError(f"{file} is not whole: {' and '.join(missing)} missing; export the run again")
    return told


def _fitting(unet: VideoUNet, context: ImageContext, folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's stream, which are those that a UNet of this shape would have."""
    with torch.device("meta"):
        outline = exchange.build_unet({**folders.plain(unet.config), "image_context": None}, unet.spec)
        outline.add_image_context(context)
    shapes = {name: value.shape for name, value in outline.image_parameters().items()}
    return exchange.convert(exchange.read_tensors(folder / FILE), {name: name for name in shapes}, shapes, str(folder))
