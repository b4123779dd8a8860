"""Kill training with SIGKILL at random moments, resume it each time, and compare the weights with an undisturbed run.

    python benchmarks/kill_and_resume.py OUT --kills 20

For both stages of recipes/svd_finetune.py, on the pocket model, on a CPU, and for image-to-video by two processes, with
whole weights (ddp), shared ones (fsdp2) and checkpoints in shares (shares): the undisturbed run first; then runs that
are killed after a random time, mid-save included, and go on with training.resume=latest, until they are through. Of two
processes one is killed, either, and the other must end by itself. Every tensor of the last checkpoint (weights,
averages, optimiser states) and of the export must be equal, bit for bit. Writes OUT/kill_and_resume.json; the exit
status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from inflate import config as configuration
from inflate.data.demo_clips import build
from record import command, record, write

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import svd_finetune as recipe  # noqa: E402 -- a script, not a package

COMMON = (
    "data.split=train", "data.held_out=held_out", "data.frames=4", "data.height=64", "data.width=64",
    "training.batch=1", "training.accumulate=2", "training.ema=0.9", "training.workers=1", "training.schedule=cosine",
    "training.checkpoint_every=2", "training.evaluate_every=5", "training.preview_every=0", "training.log_every=1",
    "training.tracker=none", "training.progress=false", "training.resume=latest", "sampling.steps=2",
)  # fmt: skip
STAGES = {
    "decoder": (
        "decoder.adversarial_start=4", "decoder.discriminator_lead=2", "decoder.discriminator_channels=8",
        "decoder.held_out_clips=1", "decoder.previews=1", "decoder.perceptual=0",
    ),
    "image_to_video": ("image_to_video.held_out_clips=1", "image_to_video.preview_clips=1"),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to train: a stage, by how many processes, launched how."""

    stage: str
    processes: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
"""What accelerate's launcher sets for recipes/accelerate/fsdp2.yaml."""
WAYS = {
    "decoder": Way("decoder"),
    "image_to_video": Way("image_to_video"),
    "ddp": Way("image_to_video", 2),
    "fsdp2": Way("image_to_video", 2, FSDP2),
    "shares": Way("image_to_video", 2, FSDP2, ("training.sharded_checkpoints=true",)),
}
PATIENCE = 300.0
"""Seconds after which a process must have noticed that the other is gone."""


def run(way: Way, clips: Path, output: Path, steps: int, rank: int, port: int) -> None:
    """The recipe, in a process group of its own with the processes that read clips."""
    os.setpgid(0, 0)
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if way.processes > 1:
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        launched |= {"WORLD_SIZE": way.processes, "LOCAL_WORLD_SIZE": way.processes, "ACCELERATE_USE_CPU": "true"}
        os.environ.update({name: str(value) for name, value in launched.items()} | way.environment)
    settings = [f"stage={way.stage}", f"data.path={clips}", f"training.output={output}", f"training.steps={steps}"]
    settings += [f"training.accumulate={2 // way.processes}", *way.settings]
    recipe.main(configuration.load(recipe.Config, [*COMMON, *STAGES[way.stage], *settings]), [])


def start(way: Way, clips: Path, output: Path, steps: int) -> list[BaseProcess]:
    """Begin `run` in forked processes, which share the imports but no state; the main one is the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    found = [fork.Process(target=run, args=(way, clips, output, steps, n, port)) for n in range(way.processes)]
    for process in found:
        process.start()
    return found


def wait(processes: list[BaseProcess], seconds: float, victim: int = 0, output: Path | None = None) -> int | None:
    """The exit status of a run, or None if one of its processes was killed after so many seconds.

    With `output`, it is then killed as soon as the main one is seen writing there.
    """
    main, other = processes[0], processes[victim]
    other.join(seconds)
    while output and main.exitcode is None and other.exitcode is None and not being_written(output, main):
        time.sleep(0.001)
    if other.exitcode is None:
        os.killpg(other.pid or 0, signal.SIGKILL)
    for process in processes:
        process.join(PATIENCE)
        if process.exitcode is None:
            sys.exit(f"process {processes.index(process)} never noticed that process {victim} was gone")
    return None if other.exitcode == -signal.SIGKILL else max(process.exitcode or 0 for process in processes)


def being_written(output: Path, process: BaseProcess) -> list[str]:
    """What a process has begun to write in the output folder, or had when it was killed."""
    end = f".{process.pid}.partial"
    return [path.name[1:].removesuffix(end) for path in output.glob(f".*{end}")]


def disturbed(way: Way, arguments: argparse.Namespace, output: Path, longest: float, dice: random.Random) -> list[str]:
    """Kill and resume until the run is through; what each kill hit. Every second one waits for a write."""
    hit: list[str] = []
    while True:
        processes = start(way, arguments.clips, output, arguments.steps)
        victim = dice.randrange(way.processes)
        if len(hit) < arguments.kills:
            status = wait(processes, dice.uniform(0, longest), victim, output if len(hit) % 2 else None)
        else:
            status = wait(processes, 3600)
        if status == 0:
            return hit
        if status is not None:
            sys.exit(f"a resumed run failed; see {output.with_suffix('.log')}")
        written = being_written(output, processes[0])[:1] or ["between writes"]
        hit += [f"{written[0]}, process {victim}" if way.processes > 1 else written[0]]


def tensors(output: Path, steps: int) -> dict[str, Any]:
    """Every tensor of the last checkpoint and the export, by file and name."""
    files = [*(output / f"checkpoint-{steps}").glob("*"), *(output / "export").rglob("*.safetensors")]
    found: dict[str, Any] = {}
    for path in files:
        name = path.relative_to(output).as_posix()
        if path.suffix == ".safetensors":
            found |= {f"{name}: {key}": value for key, value in load_file(path).items()}
        elif path.suffix == ".pt":
            states = torch.load(path, weights_only=True)
            found |= {f"{name}: {at}.{key}": v for at, state in states.items() for key, v in state.items()}
    return found


def different(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of tensors that are not equal bit for bit, or that only one side has."""
    return [
        name for name in sorted(one.keys() | other.keys())
        if name not in one or name not in other or not torch.equal(one[name], other[name])
    ]  # fmt: skip


def examine(name: str, arguments: argparse.Namespace, dice: random.Random) -> dict[str, Any]:
    """One way: the undisturbed run, then disturbed ones until there were enough kills."""
    way, reference = WAYS[name], arguments.output / f"{name}-undisturbed"
    began = time.monotonic()
    if wait(start(way, arguments.clips, reference, arguments.steps), 3600) != 0:
        sys.exit(f"the undisturbed run failed; see {reference.with_suffix('.log')}")
    seconds = time.monotonic() - began
    expected = tensors(reference, arguments.steps)
    hits: list[str] = []
    faults: list[str] = []
    trial = 0
    while len(hits) < arguments.kills:
        output = arguments.output / f"{name}-{trial}"
        hits += disturbed(way, arguments, output, 1.1 * seconds, dice)
        faults += different(expected, tensors(output, arguments.steps))
        trial += 1
    return {
        "way": name, "processes": way.processes, "steps": arguments.steps, "seconds undisturbed": round(seconds, 1),
        "kills": len(hits), "runs": trial, "hit": dict(Counter(hits)), "tensors compared per run": len(expected),
        "different": faults,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS])
    arguments = parser.parse_args()
    arguments.clips = build(arguments.output / "clips", clips=6, held_out=2)
    dice = random.Random(arguments.seed)
    results = [examine(name, arguments, dice) for name in arguments.ways]
    write(arguments.output / "kill_and_resume.json", record(command("OUT"), {"ways": results}))
    print(json.dumps(results, indent=1))
    sys.exit(any(way["different"] for way in results))


if __name__ == "__main__":
    main()
