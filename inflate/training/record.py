"""What a run leaves to be trusted by: environment.json, beside the resolved config.yaml.

started, step     UTC time of the start, and the steps that were done before it (0, or where it was resumed)
command           the command line; relative paths in it are below `directory`
versions          of Python, PyTorch, CUDA and the libraries that the numbers depend on
platform, devices, processes
git               revision of the repository that the recipe lies in, and whether it was dirty; null outside one
data              samples of an epoch, and the digest of their clips (`inflate.data.digest`; null without one)
changed           settings that are others than at the start before, in words
memory            bytes in use at most, by phase: as predicted (training.fit) and as measured, where they were
ended             how, when and at which step the run ended, once its model is exported or a signal stopped it; else
                  null: a run that was killed or failed, or is at work
earlier           the records of the starts before a resumed one, oldest first
"""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import gather_object

from inflate import __version__
from inflate.errors import TrainingError
from inflate.files import write_text
from inflate.training.checkpoint import writing
from inflate.training.processes import together

NAME = "environment.json"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")


@runtime_checkable
class Digested(Protocol):
    """A dataset that can tell itself from another."""

    def digest(self) -> str:
        """A hash of what it holds."""


def begin(output: Path, samples: int, clips: str | None, accelerator: Any, step: int, changed: Sequence[str]) -> None:
    """Record a start of the run in OUTPUT/environment.json; every process calls it, the main one writes.

    `clips` is their digest, `changed` what settings became since the start before. Raises TrainingError for a record
    of an earlier start that cannot be read.
    """
    devices = gather_object([device_name(accelerator.device)])
    with together():
        if not accelerator.is_main_process:
            return
        earlier = starts(output / NAME)
        now = {"started": utc_now(), "step": step, **command(), "versions": versions(), "platform": platform.platform()}
        place = {"devices": devices, "processes": accelerator.num_processes, "git": git_state(Path(sys.argv[0]))}
        data = {"samples": samples, "digest": clips}
        found = {"data": data, "changed": [*changed], "memory": None, "ended": None, "earlier": earlier}
        _write(output / NAME, now | place | found)


def end(
    output: Path,
    accelerator: Any,
    step: int,
    reason: str,
    predicted: Mapping[str, int],
    measured: Mapping[str, int],
) -> None:
    """Record that the run ended: `finished`, `max_seconds` or the name of a signal, after `step` steps in all; and its
    memory.
    """
    if accelerator.is_main_process:
        *earlier, now = starts(output / NAME)
        memory = {"predicted": dict(predicted), "measured": dict(measured)}
        ended = {"memory": memory, "ended": {"reason": reason, "step": step, "at": utc_now()}, "earlier": earlier}
        _write(output / NAME, now | ended)


def starts(path: Path) -> list[dict[str, Any]]:
    """The records of all starts of a run, oldest first; none where there is no file."""
    if not path.is_file():
        return []
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
        return [*last.pop("earlier"), last]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise TrainingError(f"{path}: not a run's record ({error!r}); move it away or name another output") from error


def digest(dataset: Any) -> str | None:
    """The hash of a dataset's clips, where it has one."""
    return dataset.digest() if isinstance(dataset, Digested) else None


def command() -> dict[str, str]:
    """The command line of this process and the folder that it was given in."""
    return {"command": shlex.join(sys.argv), "directory": str(Path.cwd())}


def versions() -> dict[str, str | None]:
    """Versions by name; None for what is not installed."""
    own = {"python": platform.python_version(), "inflate": __version__, "cuda": torch.version.cuda}
    return own | {name: _installed(name) for name in PACKAGES}


def git_state(file: Path) -> dict[str, Any] | None:
    """The revision checked out where `file` lies, and whether tracked files differ from it or `file` is not tracked.

    None for no file, outside a repository, before its first commit, and without git.
    """
    revision = _git(file, "rev-parse", "HEAD") if file.is_file() else None
    if not revision:
        return None
    changed = _git(file, "status", "--porcelain", "--untracked-files=no")
    return {"revision": revision, "dirty": changed != "" or not _git(file, "ls-files", "--", file.name)}


def device_name(device: torch.device) -> str:
    """What a device is called by its maker, or which kind of processor it is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type.upper()}"


def utc_now() -> str:
    """The time, as 2025-11-22T21:35:08Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _git(file: Path, *words: str) -> str | None:
    """What git answers in the file's folder; None where it has no answer."""
    command = ["git", "-C", str(file.absolute().parent), *words]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(path: Path, record: dict[str, Any]) -> None:
    with writing(path, path.parent):
        write_text(path, json.dumps(record, indent=1) + "\n")
