"""Proof that an adapter's file does what was trained: loaded by a new process on a fresh base, it gives the same.

    python -m inflate.adapters.verify FILE FAMILY MODEL

Where an adapter is made, the trained UNet's output for fixed noise goes into its file (`reference`), and a new process,
which is told the file and the base alone, repeats it. Both compute in float32 on the CPU, whatever the training ran on:
a trained UNet is brought there for the moment, and put back before the new process starts. None holds two UNets.
Anybody who has the file and its base can repeat the proof: `inflate adapter verify`.
"""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inflate import __version__
from inflate.adapters import attach, bases, file
from inflate.adapters.bases import on_cpu
from inflate.adapters.file import Adapter
from inflate.adapters.targets import inputs
from inflate.errors import CheckpointError, InflateError
from inflate.models.unet import VideoUNet
from inflate.surgery import evaluating

TOLERANCE = 1e-5
"""Largest absolute difference, in float32, of outputs of about unit variance."""
SEED, TOKENS = 0, 2
"""Of the noise; the length of the context, which is enough for each layer to take part."""
PACKAGES = ("torch", "diffusers", "peft")
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Outcome:
    """What a check found."""

    max_abs_diff: float
    """largest difference from the trained model's output"""
    effect: float
    """largest difference from the output of the base alone"""
    versions: dict[str, str]
    """of the packages that computed it"""


@torch.no_grad()
def output(unet: VideoUNet) -> Tensor:
    """What a UNet makes of fixed noise (1, 2, C, h, w), in float32 on the CPU; it is put back where it was."""
    with on_cpu(unet), evaluating(unet):
        made: Tensor = unet(**inputs(unet, TOKENS, seed=SEED)).sample.float()
    return made


def reference(unet: VideoUNet) -> dict[str, Any]:
    """The output of a trained UNet, as a file keeps it."""
    made = output(unet)
    return {"seed": SEED, "shape": list(made.shape), "output": base64.b64encode(made.numpy().tobytes()).decode()}


def difference(unet: VideoUNet, adapter: Adapter, origin: object) -> float:
    """How far a UNet with an adapter beside it is from what the file keeps; the UNet is left as it was."""
    wanted = _kept(adapter, origin)
    attach.load(unet, adapter, origin)
    try:
        made = output(unet)
    finally:
        attach.detach(unet)
    return _apart(made, wanted)


def check(path: Path, unet: VideoUNet, any_base: bool = False) -> Outcome:
    """Compare a file's adapter, on a base without one, with what was trained.

    CheckpointError for a file that cannot be read, keeps no output, does not fit, or belongs on another base.
    """
    adapter = file.read(path)
    if not any_base:
        bases.refuse_another(unet, adapter, path)
    alone = output(unet)
    found = difference(unet, adapter, path)
    attach.load(unet, adapter, path)
    effect = _apart(output(unet), alone)
    attach.detach(unet)
    return Outcome(found, effect, versions())


def versions() -> dict[str, str]:
    """Of what computes here, by name."""
    return {"inflate": __version__, **{name: version(name) for name in PACKAGES}}


def certify(path: Path, family: str, settings: Mapping[str, Any]) -> Outcome:
    """Have a new process check a file on the base that it loads afresh, and write what it found into the file.

    CheckpointError where the two differ by more than TOLERANCE; the file then says that it is not verified.
    """
    found = in_new_process(path, family, settings)
    refuse_difference(path, found.max_abs_diff)
    adapter = file.read(path)
    verified = {"max_abs_diff": found.max_abs_diff, "effect": found.effect, "seed": SEED, "versions": found.versions}
    file.write(path, replace(adapter, about={**adapter.about, "verified": verified}), overwrite=True)
    again = file.read(path).tensors
    if again.keys() != adapter.tensors.keys() or not all(torch.equal(again[n], t) for n, t in adapter.tensors.items()):
        raise CheckpointError(f"{path} does not hold what was written: the disk fails; write it elsewhere")
    return found


def refuse_difference(path: Path, difference: float) -> None:
    """CheckpointError for a difference above TOLERANCE."""
    if not difference <= TOLERANCE:  # also where it is not a number
        raise CheckpointError(
            f"{path}: loaded on its base, the adapter gives what is {difference:.1e} from the trained model's output "
            f"(allowed: {TOLERANCE:g}); the file is not to be relied on"
        )


def in_new_process(path: Path, family: str, settings: Mapping[str, Any]) -> Outcome:
    """What a new process, without the GPU, finds of a file; CheckpointError with its words where it fails."""
    command = [sys.executable, "-m", "inflate.adapters.verify", str(path), family, json.dumps(dict(settings))]
    kept = {k: v for k, v in os.environ.items() if k not in DISTRIBUTED and not k.startswith("ACCELERATE_")}
    environment = {**kept, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path()}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise CheckpointError(f"{path}: a new process cannot load it: {last[0].removeprefix('error: ')}")
    return Outcome(**json.loads(ended.stdout.splitlines()[-1]))


def python_path() -> str:
    """Where a new process is to look for packages, so that it finds this one first."""
    places = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.pathsep.join(places)


def _kept(adapter: Adapter, origin: object) -> Tensor:
    """The trained model's output that a file keeps; CheckpointError where there is none."""
    try:
        told = adapter.about["reference"]
        numbers = torch.frombuffer(bytearray(base64.b64decode(told["output"], validate=True)), dtype=torch.float32)
        return numbers.reshape(told["shape"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{origin} keeps no output of the trained model to compare it with") from error


def _apart(made: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite where the shapes differ."""
    return float((made - wanted).abs().max()) if made.shape == wanted.shape else math.inf


def main(arguments: list[str]) -> None:
    """Check FILE on the model of FAMILY with the settings MODEL (JSON), and print the outcome as JSON."""
    path, family, settings = arguments
    try:
        found = check(Path(path), bases.load(family, json.loads(settings)).unet)
    except InflateError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
