"""What every recorded result says about itself: the command, the versions, the machine."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def record(command: str, result: dict[str, Any]) -> dict[str, Any]:
    """The result below its command and the versions of what it ran on."""
    packages = {name: version(name) for name in PACKAGES}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = packages | {"python": platform.python_version(), "device": device}
    return {"command": command, "versions": versions, **result}


def command(*places: str) -> str:
    """This command line with its paths, the first arguments, named as in the script's own help."""
    script = Path(sys.argv[0]).name
    return " ".join(["python", f"benchmarks/{script}", *places, *sys.argv[1 + len(places) :]])


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
