"""Do bfloat16 weights, moments in 8 bits and steps within the backward pass learn as float32 and AdamW do?

    python benchmarks/precision.py OUT

The pocket model learns to animate an image by recipes/svd_pocket.yaml, but all of its weights, at a constant order of
clips, noise and settings (SETTINGS), without clipping, which steps within the backward pass rule out:

float32        float32 weights and activations, AdamW
lean           training.precision=pure_bf16 training.optimizer=adamw8bit training.step_in_backward=true
nearest        as lean, but each update is rounded to the nearest bfloat16, which no setting does: what random rounding
               is for

Each arm's averaged weights are measured every 100 steps on held-out clips on fixed noise, in the arm's own precision,
and at the end as they were exported, in float32. Writes OUT/precision.json and OUT/precision.png.

To train arms side by side: first --only none, which renders and encodes the clips, then --only float32 beside --only
lean, and --only none again for the report. An arm that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from inflate import config as configuration
from inflate import sweep
from inflate.data.clips import ClipDataset, collate
from inflate.data.demo_clips import build
from inflate.families.svd import SVD
from inflate.training import adamw
from inflate.training.image_to_video import ImageToVideoTask
from record import command, record, write

RECIPE = Path(__file__).parents[1] / "recipes" / "svd_finetune.py"
POCKET = RECIPE.with_name("svd_pocket.yaml")
SETTINGS = [
    "image_to_video.trainable=all", "image_to_video.preview_clips=1", "sampling.steps=2", "training.steps=1000",
    "training.lr=3e-4", "training.gradient_clip=0", "training.precision=no", "training.evaluate_every=100",
    "training.preview_every=0", "training.tracker=none", "training.progress=false", "training.resume=latest",
]  # fmt: skip
LEAN = ["training.precision=pure_bf16", "training.optimizer=adamw8bit", "training.step_in_backward=true"]
ARMS = {"float32": [], "lean": LEAN, "nearest": LEAN}
COLOURS = {"float32": "tab:blue", "lean": "tab:orange", "nearest": "tab:red"}
LOSS = "held-out loss"
WITHIN = 0.01
"""Largest relative difference of the last held-out losses that is called equal."""


def data(output: Path) -> list[str]:
    """The settings of the clips, which are rendered and encoded if they are not there."""
    build(output / "clips", clips=2000)
    places = [f"data.path={output / 'clips'}", f"data.cache={output / 'cache'}"]
    subprocess.run([sys.executable, "-m", "inflate", "data", "cache", str(POCKET), *places], check=True)
    return places


def train(arm: str, output: Path, settings: list[str]) -> None:
    """Train an arm."""
    script: Any = sweep.load_script(RECIPE)
    if arm == "nearest":
        adamw.rounded_ = lambda wide, generator: wide  # written into bfloat16, it is rounded to the nearest
    config = configuration.load(script.Config, [*settings, *ARMS[arm], f"training.output={output / arm}"])
    script.train(config)


@torch.no_grad()
def exported(arm: str, output: Path, settings: list[str]) -> float | None:
    """The held-out loss of an arm's export, in float32; None where there is none yet."""
    folder = output / arm / "export"
    if not folder.is_dir():
        return None
    script: Any = sweep.load_script(RECIPE)
    config = configuration.load(script.Config, settings)
    clips = ClipDataset(config.data.evaluation(), shuffle=False)
    batches = [collate([clips[number]]) for number in range(config.image_to_video.held_out_clips)]
    family = SVD.from_pretrained(folder)
    task = ImageToVideoTask(family, config.image_to_video, batches, config.sampling, 0.0, config.training.seed)
    return task.evaluate()[LOSS]


def report(output: Path, settings: list[str], known: dict[str, float | None]) -> dict[str, Any]:
    """Curves, last losses and how far they are from float32's, of the arms that there are."""
    found: dict[str, Any] = {}
    for arm in ARMS:
        file = output / arm / "metrics.json"
        if not file.is_file():
            continue
        rows = json.loads(file.read_text())["held_out"]
        last = json.loads((output / arm / "metrics.json").read_text())["history"][-1]
        found[arm] = {
            "settings": ARMS[arm], "steps": rows[-1]["step"], LOSS: rows[-1][LOSS], f"{LOSS} of the export": known[arm],
            "training loss, last 50 steps": last["loss/unet"],
            "curve": [{"step": row["step"], LOSS: row[LOSS]} for row in rows],
        }  # fmt: skip
    reference = found.get("float32")
    for one in found.values() if reference else ():
        pairs = [(row[LOSS], other[LOSS]) for row, other in zip(one["curve"], reference["curve"], strict=False)]
        one["relative to float32"] = [round(mine / theirs - 1, 5) for mine, theirs in pairs]
        one["within 1 % at the end"] = abs(one["relative to float32"][-1]) <= WITHIN
    return {"settings": SETTINGS, "arms": found}


def draw(result: dict[str, Any], target: Path) -> None:
    """The held-out losses, and their ratios to float32's."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    losses, ratios = figure.subplots(1, 2)
    for arm, one in result["arms"].items():
        steps = [row["step"] for row in one["curve"]]
        losses.plot(steps, [row[LOSS] for row in one["curve"]], color=COLOURS[arm], marker=".", label=arm)
        shares = one.get("relative to float32", [])
        ratios.plot(steps[: len(shares)], [100 * share for share in shares], color=COLOURS[arm], marker=".")
    losses.set(xlabel="step", ylabel=LOSS, yscale="log")
    losses.legend()
    ratios.axhspan(-100 * WITHIN, 100 * WITHIN, color="0.9")
    ratios.set(xlabel="step", ylabel="held-out loss above float32's, %")
    figure.savefig(target, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", choices=[*ARMS, "none"], help="train only this arm, or none")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="settings of every arm, for a trial")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    output = arguments.output
    settings = [str(POCKET), *SETTINGS, *data(output), *arguments.set]
    for arm in ARMS:
        if arguments.only in (None, arm):
            train(arm, output, settings)
    result = report(output, settings, {arm: exported(arm, output, settings) for arm in ARMS})
    write(output / "precision.json", record(command("OUT"), result))
    draw(result, output / "precision.png")
    for arm, one in result["arms"].items():
        print(arm, one["steps"], one[LOSS], one[f"{LOSS} of the export"], one.get("relative to float32"))


if __name__ == "__main__":
    main()
