"""Folders that hold models in diffusers' layout: where a name points, and how one is read and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from inflate.errors import CheckpointError
from inflate.files import new_folder
from inflate.models.unet import load_strictly, without_bars

HALF_WEIGHTS_NAME = "diffusion_pytorch_model.fp16.safetensors"
SAFETENSORS = ".safetensors"
PARTS = (
    "unet", "vae", "image_encoder", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "feature_extractor",
    "scheduler",
)  # fmt: skip
SETTINGS_FILE = "inflate.json"
"""What an export of ours holds of settings that diffusers' layout has no place for."""
TENSORS_FILE = "inflate.safetensors"
"""What it holds of weights beside that layout."""
TEMPORAL_FILE = "temporal.safetensors"
"""Temporal layers alone."""
PIPELINE_FILES = ("*.json", TENSORS_FILE, TEMPORAL_FILE, *(f"{part}/*" for part in PARTS))
SHIPPED = {name: Path(__file__).parents[1] / name.replace("-", "_") for name in ("pocket", "pocket-t2v", "pocket-svd")}
"""The models that come with the package, by the names that stand for their folders."""

OUTLINES = {
    "stabilityai/stable-video-diffusion-img2vid": "svd",
    "stabilityai/stable-video-diffusion-img2vid-xt": "svd-xt",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd21",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
"""Published models whose configurations come with the package, and the folders of these."""
CONFIGURATIONS = ("*.json", "*/config.json", "*/scheduler_config.json", "*/preprocessor_config.json")


def resolve(path: str | Path, files: Sequence[str] = PIPELINE_FILES) -> Path:
    """The local folder of `path`, of a shipped model (`pocket`), or of a model owner/name on the Hub.

    Of the last, `files` are downloaded. CheckpointError where there is none.
    """
    folder = local_folder(path)
    if folder is not None:
        refuse_run(folder)
        return folder
    unwanted = ["*.bin", "*fp16*", "*non_ema*", "*.msgpack", "*.onnx*"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(files), ignore_patterns=unwanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{path} is neither a folder nor a model that can be downloaded: {error}") from error


def outline(path: str | Path) -> Path:
    """A folder with the configurations of a model's parts, and not always with its weights.

    That is its local folder, or what comes with the package of a published model; of another one on the Hub the
    configurations alone are downloaded. CheckpointError where there is none.
    """
    known = OUTLINES.get(str(path))
    if known is None or Path(path).is_dir():
        return resolve(path, CONFIGURATIONS)
    return Path(__file__).parents[1] / "outlines" / known


def family_of(path: str | Path) -> str | None:
    """The family that the settings of an export name; none: of a single file, and of a folder of diffusers' alone.

    Of a model on the Hub its configurations are downloaded. CheckpointError where there is no such model.
    """
    if str(path).endswith(SAFETENSORS):
        return None
    file = resolve(path, CONFIGURATIONS) / SETTINGS_FILE
    family = read_json(file).get("family") if file.is_file() else None
    return None if family is None else str(family)


def local_folder(path: str | Path) -> Path | None:
    """The folder that `path` or `pocket` names; None for owner/name on the Hub, CheckpointError for anything else."""
    folder = SHIPPED.get(str(path), Path(path).expanduser())
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(
            f"{path} is a file; give the folder of a model in diffusers' layout, which `inflate convert` makes of a "
            "published file"
        )
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        known = f"owner/name of a model on the Hugging Face Hub, or one that is shipped: {', '.join(SHIPPED)}"
        raise CheckpointError(f"{path} does not exist; give a folder, {known}")
    return None


def refuse_run(folder: Path) -> None:
    """CheckpointError for the folder of a run, whose model lies in a folder within."""
    if (folder / "export").is_dir() and (folder / "metrics.json").is_file() and not (folder / SETTINGS_FILE).is_file():
        raise CheckpointError(f"{folder} is the folder of a run; its model is {folder / 'export'}")


def place_of(path: str | Path) -> Path:
    """The .safetensors file that `path` is, or else the folder of `resolve`; CheckpointError as there."""
    return Path(path).expanduser() if str(path).endswith(SAFETENSORS) else resolve(path)


def check_place(path: str | Path) -> None:
    """Raise CheckpointError for a path of a model that does not exist; nothing is read or downloaded."""
    if not str(path).endswith(SAFETENSORS):
        local_folder(path)
    elif not Path(path).expanduser().is_file():
        raise CheckpointError(f"{path} does not exist; give a {SAFETENSORS} file, or a model's folder")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError where the file is missing or damaged."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return content


def unet_kind(folder: Path, *kinds: type[ConfigMixin]) -> type[ConfigMixin]:
    """The one of these classes that a UNet's folder names; CheckpointError, naming its class, where it is none."""
    if not (folder / "config.json").is_file():
        refuse_network(folder.parent)
    name = read_json(folder / "config.json").get("_class_name")
    for kind in kinds:
        if kind.__name__ == name:
            return kind
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise CheckpointError(f"{folder / 'config.json'} is of class {name}; give the folder of a model with a {wanted}")


def refuse_network(folder: Path) -> None:
    """Raise CheckpointError for the folder of a network alone, where that of a whole model is needed."""
    file = folder / "config.json"
    if file.is_file() and not (folder / "unet").is_dir():
        name = read_json(file).get("_class_name", "network")
        raise CheckpointError(f"{folder} holds a {name} alone; give the folder of the whole model, with unet and vae")


def holds(path: str | Path, kind: type[ConfigMixin]) -> bool:
    """Whether a model has a UNet of a class."""
    file = resolve(path) / "unet" / "config.json"
    return file.is_file() and bool(read_json(file).get("_class_name") == kind.__name__)


def is_image_model(path: str | Path) -> bool:
    """Whether a model draws images: a single file of Stable Diffusion, or a folder with its UNet."""
    return str(path).endswith(SAFETENSORS) or holds(path, UNet2DConditionModel)


def load_parent(kind: type[ConfigMixin], folder: Path) -> Any:
    """An image model from its folder, in float32; CheckpointError, listing the tensors, where it is not whole."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is not there: inflation needs a Stable Diffusion folder in diffusers' layout")
    half = (folder / HALF_WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file()
    settings: dict[str, Any] = {"torch_dtype": torch.float32, "variant": "fp16" if half else None}
    return load_strictly(kind.from_pretrained, folder, settings)


def write(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fills a folder anew; an export that stood there stays until the new one is whole.

    CheckpointError where the folder holds anything but an earlier export, or cannot be written.
    """
    if folder.exists() and any(folder.iterdir()) and not _is_export(folder):
        raise CheckpointError(f"{folder} holds other files; choose another folder for the export")
    try:
        with new_folder(folder) as aside, without_bars():
            fill(aside)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def _is_export(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("model_index.json", SETTINGS_FILE))
