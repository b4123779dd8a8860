"""Kill training with SIGKILL at random moments, resume it each time, and compare the weights with an undisturbed run.

    python benchmarks/kill_and_resume.py OUT --kills 20

For both stages of recipes/svd_finetune.py, on the pocket model, on a CPU: the undisturbed run first; then runs that are
killed after a random time, mid-save included, and go on with training.resume=latest, until they are through. Every
tensor of the last checkpoint (weights, averages, optimiser states) and of the export must be equal, bit for bit. Writes
OUT/kill_and_resume.json; the exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
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


def run(stage: str, clips: Path, output: Path, steps: int) -> None:
    """The recipe, in a process group of its own with the processes that read clips."""
    os.setpgid(0, 0)
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    settings = [f"stage={stage}", f"data.path={clips}", f"training.output={output}", f"training.steps={steps}"]
    recipe.main(configuration.load(recipe.Config, [*COMMON, *STAGES[stage], *settings]), [])


def start(*arguments: Any) -> BaseProcess:
    """Begin `run` in a forked process, which shares the imports but no state."""
    process = multiprocessing.get_context("fork").Process(target=run, args=arguments)
    process.start()
    return process


def wait(process: BaseProcess, seconds: float, output: Path | None = None) -> int | None:
    """The exit status of a process, or None if it was killed after so many seconds.

    With `output`, it is then killed as soon as it is seen writing there.
    """
    process.join(seconds)
    while output and process.exitcode is None and not being_written(output, process):
        time.sleep(0.001)
    if process.exitcode is None:
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return None
    return process.exitcode


def being_written(output: Path, process: BaseProcess) -> list[str]:
    """What a process has begun to write in the output folder, or had when it was killed."""
    end = f".{process.pid}.partial"
    return [path.name[1:].removesuffix(end) for path in output.glob(f".*{end}")]


def disturbed(
    stage: str, arguments: argparse.Namespace, output: Path, longest: float, dice: random.Random
) -> list[str]:
    """Kill and resume until the run is through; what each kill hit. Every second one waits for a write."""
    hit: list[str] = []
    while True:
        process = start(stage, arguments.clips, output, arguments.steps)
        if len(hit) < arguments.kills:
            status = wait(process, dice.uniform(0, longest), output if len(hit) % 2 else None)
        else:
            status = wait(process, 600)
        if status == 0:
            return hit
        if status is not None:
            sys.exit(f"a resumed run failed; see {output.with_suffix('.log')}")
        hit += being_written(output, process)[:1] or ["between writes"]


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


def examine(stage: str, arguments: argparse.Namespace, dice: random.Random) -> dict[str, Any]:
    """One stage: the undisturbed run, then disturbed ones until there were enough kills."""
    reference = arguments.output / f"{stage}-undisturbed"
    began = time.monotonic()
    if wait(start(stage, arguments.clips, reference, arguments.steps), 3600) != 0:
        sys.exit(f"the undisturbed run failed; see {reference.with_suffix('.log')}")
    seconds = time.monotonic() - began
    expected = tensors(reference, arguments.steps)
    hits: list[str] = []
    faults: list[str] = []
    trial = 0
    while len(hits) < arguments.kills:
        output = arguments.output / f"{stage}-{trial}"
        hits += disturbed(stage, arguments, output, 1.1 * seconds, dice)
        faults += different(expected, tensors(output, arguments.steps))
        trial += 1
    return {
        "stage": stage, "steps": arguments.steps, "seconds undisturbed": round(seconds, 1), "kills": len(hits),
        "runs": trial, "hit": dict(Counter(hits)), "tensors compared per run": len(expected), "different": faults,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.clips = build(arguments.output / "clips", clips=6, held_out=2)
    dice = random.Random(arguments.seed)
    results = [examine(stage, arguments, dice) for stage in STAGES]
    write(arguments.output / "kill_and_resume.json", record(command("OUT"), {"stages": results}))
    print(json.dumps(results, indent=1))
    sys.exit(any(stage["different"] for stage in results))


if __name__ == "__main__":
    main()
