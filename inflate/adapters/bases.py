"""The model that an adapter belongs on: told by a hash of its UNet, loaded by its family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from inflate.adapters.file import Adapter
from inflate.adapters.targets import inputs
from inflate.errors import CheckpointError
from inflate.families import (
    dynamicrafter,
    dynamicrafter_model,
    i2vgen_xl,
    i2vgen_xl_model,
    i2vgen_xl_refiner,
    svd,
    svd_model,
    video_ldm,
)
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.models import folders
from inflate.models.unet import VideoUNet
from inflate.models.weights import tensors_sha256
from inflate.surgery import evaluating

Family = SVD | VideoLDM | DynamiCrafter | I2VGenXL | Refiner
TOKENS = {
    svd.FAMILY: 1, video_ldm.FAMILY: 77, dynamicrafter.FAMILY: 77, i2vgen_xl.FAMILY: 77, i2vgen_xl_refiner.FAMILY: 77
}  # fmt: skip
"""Length of each family's contexts."""


def sha256(unet: VideoUNet) -> str:
    """SHA-256 of the tensors of a UNet that carries no adapter.

    Temporal layers that do nothing yet are left out: inflation draws them at random, and the same image model inflated
    again is the same base.
    """
    born = unet.created_parameters().keys() if is_newborn(unet) else ()
    tensors = unet.state_dict()
    return tensors_sha256((name, tensors[name]) for name in sorted(tensors) if name not in born)


@torch.no_grad()
def is_newborn(unet: VideoUNet) -> bool:
    """Whether what inflation created changes nothing.

    A clip's output is then, to the bit, that of its frames as images, told nothing of an image to attend to.
    """
    ids = unet.class_embedding.linear_2 if unet.spec.added_ids else None
    if ids is not None and any(bool(parameter.any()) for parameter in ids.parameters()):
        return False
    with on_cpu(unet), evaluating(unet):  # where equal sums are equal to the bit
        alone = {name: value for name, value in inputs(unet, 2, True).items() if name != "image_features"}
        alone |= {"left_out": unet.hierarchy.parts} if unet.hierarchy else {}
        return torch.equal(unet(**inputs(unet, 2)).sample, unet(**alone).sample)


@contextmanager
def on_cpu(unet: VideoUNet) -> Iterator[None]:
    """The UNet on the CPU in float32; its own tensors are put back, whatever is computed meanwhile."""
    tensors = [*unet.parameters(), *unet.buffers()]
    own = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        yield
    finally:
        for tensor, data in zip(tensors, own, strict=True):
            tensor.data = data


def load(family: str, settings: Mapping[str, Any]) -> Family:
    """The model of a family by its recipe's settings `model`; CheckpointError."""
    if family == svd.FAMILY:
        return svd_model.Model(**settings).load(frames=1)
    if family == video_ldm.FAMILY:
        return video_ldm.Model(**settings).load()
    if family == dynamicrafter.FAMILY:
        return dynamicrafter_model.Model(**settings).load()
    if family == i2vgen_xl.FAMILY:
        return i2vgen_xl_model.Model(**settings).load()
    if family == i2vgen_xl_refiner.FAMILY:
        return i2vgen_xl_model.Model(**settings).load_refiner()
    raise CheckpointError(f"adapters of family {family} are not known, only of {' and '.join(TOKENS)}")


def family_of(path: str | Path, adapter: Adapter) -> str:
    """The family that a model is to be loaded as: the adapter's or, where it does not tell, the export's own."""
    told = adapter.about.get("family")
    if isinstance(told, str):
        return told
    family = folders.family_of(path)
    if family is None or family not in TOKENS:
        raise CheckpointError(f"neither the adapter nor {path} tells of which family they are ({' or '.join(TOKENS)})")
    return family


def settings_of(adapter: Adapter, origin: object, base: str | None) -> dict[str, str | None]:
    """The settings `model` of the base that is named or, where none is, that an adapter names, if it is here.

    What a stranger's file names is not downloaded: CheckpointError.
    """
    if base is not None:
        return {"path": base, "image_model": None}
    name, image_model = _told(adapter, "name"), _told(adapter, "image_model")
    if name is None:
        raise CheckpointError(f"{origin} does not name its base: name it by --base")
    for place in filter(None, (name, image_model)):
        if not is_here(place):
            whole = f", as `inflate convert {name} OUT --image-model {image_model}` makes it" if image_model else ""
            raise CheckpointError(f"{origin} belongs on {place}, which is not on this disk: name it by --base{whole}")
    return {"path": name, "image_model": image_model}


def is_here(place: str) -> bool:
    """Whether a model is on this disk, and not to be downloaded; CheckpointError where it can be nowhere else."""
    return Path(place).expanduser().is_file() or folders.local_folder(place) is not None


def refuse_another(
    unet: VideoUNet, adapter: Adapter, origin: object, remedy: str = "add --any-base to use it all the same"
) -> None:
    """CheckpointError unless a UNet without an adapter is the one that the adapter was made on, to the bit."""
    told = _told(adapter, "sha256")
    if told is None:
        raise CheckpointError(f"{origin} does not say which model it was made on; {remedy}")
    if told != sha256(unet):
        raise CheckpointError(
            f"{origin} was made on {adapter.base} ({told[:12]}), and this model's weights are others "
            f"({sha256(unet)[:12]}); load that one, or {remedy}"
        )


def _told(adapter: Adapter, name: str) -> str | None:
    base = adapter.about.get("base")
    value = base.get(name) if isinstance(base, dict) else None
    return value if isinstance(value, str) else None
