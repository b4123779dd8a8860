"""What it costs a LoRA to learn over a base whose frozen weights are rounded (`memory.base`): pocket-svd, a CPU.

    python benchmarks/quantised_base.py CLIPS OUT [--steps 600] [--seeds 0 1]

Trains adapters/pocket_camera.yaml by recipes/svd_finetune.py on CLIPS, a folder of datasets/build_camera.py, over the
base as loaded, in int8 and in nf4, on equal clips and noise. The recipe's precision is bf16, by which memory.base=bf16
is the base as loaded, to the bit. Every adapter is also measured over the base as loaded, where it is used. Beside
that, what rounding does to the untrained model: how far its output moves, by which layers are rounded. Writes
OUT/quantised_base.json and OUT/quantised_base.png. Runs that are there already are not repeated; one that was stopped
is gone on with.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from inflate import config as configuration
from inflate.adapters import attach, file, targets
from inflate.data.clips import ClipDataset
from inflate.families.svd import SVD
from inflate.layers import quantised
from inflate.layers.quantised import Kind
from inflate.layers.temporal import TemporalConv
from inflate.training.image_to_video import ImageToVideoTask
from inflate.training.memory import bytes_of
from record import command, record, write

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import svd_finetune as recipe  # noqa: E402 -- a script, not a package

BASES = ("as_loaded", "int8", "nf4")
LOSS = "held-out loss"
ROOT = Path(__file__).parents[1]
CARDS = (str(ROOT / "recipes" / "svd_pocket.yaml"), str(ROOT / "adapters" / "pocket_camera.yaml"))
SETTINGS = (
    "training.evaluate_every=100", "training.checkpoint_every=100", "training.preview_every=0", "training.tracker=none",
    "training.progress=false", "training.resume=latest", "image_to_video.preview_clips=2", "sampling.steps=5",
)  # fmt: skip
LAYERS: dict[str, Callable[[str, nn.Module], bool]] = {
    "linear": lambda name, layer: isinstance(layer, nn.Linear),
    "convolutions": lambda name, layer: isinstance(layer, nn.Conv2d) and name not in quantised.ENDS,
    "temporal convolutions": lambda name, layer: isinstance(layer, TemporalConv),
    "all of these, as memory.base does": lambda name, layer: name not in quantised.ENDS,
    "conv_in and conv_out alone": lambda name, layer: name in quantised.ENDS,
}
"""Which layers are rounded, of those that can be."""


def settings(clips: Path, run: Path, base: str, seed: int, steps: int) -> recipe.Config:
    """The settings of a run."""
    own = (f"data.path={clips}", f"training.output={run}", f"memory.base={base}", f"training.seed={seed}")
    return configuration.load(recipe.Config, [*CARDS, *SETTINGS, *own, f"training.steps={steps}"])


def trained(config: recipe.Config) -> dict[str, Any]:
    """Train, unless that is done already; the held-out losses of the run by step."""
    output = config.training.output
    if not (output / "README.md").is_file():
        recipe.train(config)
    rows = json.loads((output / "metrics.json").read_text())["held_out"]
    return {str(row["step"]): row[LOSS] for row in rows}


def over_the_base(config: recipe.Config) -> float:
    """The held-out loss of a run's adapter over the base as loaded."""
    config = configuration.load(recipe.Config, [str(config.training.output / "config.yaml"), "adapter.kind=none",
        "adapter.targets=[]", "memory.base=as_loaded"])  # fmt: skip
    family = SVD.load(config.model.path, frames=config.data.main.frames)
    clips, held_out = ClipDataset(config.data), ClipDataset(config.data.evaluation(), shuffle=False)
    task = recipe.make_task(config, family, clips, held_out)
    assert isinstance(task, ImageToVideoTask)
    attach.load(family.unet, file.read(config.training.output / "export" / file.NAME))
    with torch.autocast("cpu", torch.bfloat16):
        return task.evaluate()[LOSS]


def moved() -> dict[str, dict[str, Any]]:
    """How far the untrained model's output moves by rounding, by layers, and what their weights then take."""
    plain = SVD.load("pocket-svd").unet.requires_grad_(False).eval()
    before, found = output(plain), {}
    for kind, (layers, chosen) in product(get_args(Kind), LAYERS.items()):
        unet = copy.deepcopy(plain)
        for name, layer in [*unet.named_modules()]:
            if type(layer) in quantised.STORED and chosen(name, layer):
                quantised.store_layer(layer, kind)
        stored = [layer for layer in unet.modules() if isinstance(layer, quantised.Stored)]
        found[f"{kind}, {layers}"] = {
            "output error": float((output(unet) - before).norm() / before.norm()),
            "bytes": bytes_of(tensor for layer in stored for tensor in layer.buffers()),
            "as loaded": bytes_of(layer.original for layer in stored),
        }
    return found


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    """What a UNet makes of three draws of noise."""
    return torch.cat([unet(**targets.inputs(unet, 1, seed=10 * seed)).sample for seed in range(3)])


def compared(losses: dict[str, dict[str, float]], over: dict[str, float], seeds: list[int]) -> dict[str, Any]:
    """The last losses, and by how many percent they differ from those over the base as loaded."""
    found: dict[str, Any] = {}
    for seed, base in product(seeds, BASES):
        reference, rows = losses[f"as_loaded, seed {seed}"], losses[f"{base}, seed {seed}"]
        first, last = [*rows][0], [*rows][-1]
        there = over[f"{base}, seed {seed}"]
        found[f"{base}, seed {seed}"] = {
            "untrained": rows[first], "trained": rows[last], "trained, over the base as loaded": there,
            "untrained, percent": percent(rows[first], reference[first]),
            "trained, percent": percent(rows[last], reference[last]),
            "trained, over the base as loaded, percent": percent(there, over[f"as_loaded, seed {seed}"]),
        }  # fmt: skip
    return found


def percent(value: float, reference: float) -> float:
    """By how many percent a value is above a reference."""
    return 100 * (value / reference - 1)


def draw(path: Path, losses: dict[str, dict[str, float]]) -> None:
    """The held-out losses over the steps, and their differences from those over the base as loaded."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, rows in losses.items():
        base, seed = name.split(", seed ")
        reference = losses[f"as_loaded, seed {seed}"]
        steps, style = [*map(int, rows)], {"color": f"C{BASES.index(base)}", "linestyle": "-:"[int(seed) % 2]}
        left.plot(steps, [*rows.values()], label=name, **style)
        if base != "as_loaded":
            right.plot(steps, [percent(rows[step], reference[step]) for step in rows], label=name, **style)
    left.set(xlabel="step", ylabel=LOSS, yscale="log")
    right.set(xlabel="step", ylabel="percent above the base as loaded")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    configs = {
        f"{base}, seed {seed}": settings(
            arguments.clips, arguments.output / f"{base}-{seed}", base, seed, arguments.steps
        )
        for seed, base in product(arguments.seeds, BASES)
    }
    losses = {name: trained(config) for name, config in configs.items()}
    over = {name: over_the_base(config) for name, config in configs.items()}
    result = {"compared": compared(losses, over, arguments.seeds), "losses": losses, "rounding alone": moved()}
    print(json.dumps({name: value for name, value in result.items() if name != "losses"}, indent=1))
    write(arguments.output / "quantised_base.json", record(command("CLIPS", "OUT"), result))
    draw(arguments.output / "quantised_base.png", losses)


if __name__ == "__main__":
    main()
