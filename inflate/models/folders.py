"""Folders that hold models in diffusers' layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.configuration_utils import ConfigMixin

from inflate.errors import CheckpointError

HALF_WEIGHTS_NAME = "diffusion_pytorch_model.fp16.safetensors"


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
    name = read_json(folder / "config.json").get("_class_name")
    for kind in kinds:
        if kind.__name__ == name:
            return kind
    wanted = " or ".join(kind.__name__ for kind in kinds)
    raise CheckpointError(f"{folder / 'config.json'} is of class {name}; give the folder of a model with a {wanted}")


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {key: value for key, value in config.items() if not key.startswith("_")}
