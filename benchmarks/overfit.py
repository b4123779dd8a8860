"""Does a run that learns a few clips by heart say so? The pocket model on eight training clips, measured on others.

    python benchmarks/overfit.py OUT

Trains image-to-video by recipes/svd_finetune.py on a CPU and writes OUT/overfit.json, with the rows of held-out
measurements, what the run found of overfitting and what `inflate runs` says of it, and OUT/overfit.png, the run's own
plot. The exit status is 1 if nothing was found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

from inflate import config as configuration
from inflate import runs
from inflate.data.demo_clips import build
from record import command, record, write

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import svd_finetune as recipe  # noqa: E402 -- a script, not a package

SETTINGS = (
    "stage=image_to_video", "data.split=train", "data.held_out=held_out", "data.frames=4", "data.height=64",
    "data.width=64", "image_to_video.P_mean=0.0", "image_to_video.held_out_clips=16", "image_to_video.preview_clips=1",
    "sampling.steps=2", "training.batch=2", "training.lr=2e-4", "training.warmup=20", "training.ema=0.9",
    "training.workers=0", "training.log_every=5", "training.evaluate_every=40", "training.checkpoint_every=40",
    "training.keep=0", "training.preview_every=0", "training.tracker=none", "training.progress=false",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--clips", type=int, default=8)
    arguments = parser.parse_args()
    clips = build(arguments.output / "clips", clips=arguments.clips, held_out=16)
    folder = arguments.output / "run"
    places = (f"data.path={clips}", f"training.output={folder}", f"training.steps={arguments.steps}")
    recipe.train(configuration.load(recipe.Config, [*SETTINGS, *places]))
    metrics = json.loads((folder / runs.METRICS).read_text())
    said = runs.describe(runs.read(folder)).splitlines()[1:]
    result = {"clips": arguments.clips, "overfitting": metrics["overfitting"], "inflate runs": said}
    write(arguments.output / "overfit.json", record(command("OUT"), result | {"held_out": metrics["held_out"]}))
    shutil.copyfile(folder / "metrics.png", arguments.output / "overfit.png")
    print("\n".join(said))
    sys.exit(not metrics["overfitting"])


if __name__ == "__main__":
    main()
