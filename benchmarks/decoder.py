"""What a temporal decoder gains, and what its discriminator adds: five decoders on the same held-out clips.

    python benchmarks/decoder.py OUT --noise 0.15 --steps 1500

a  the shipped frame-wise decoder
b  a frame-wise decoder, all of it fine-tuned for the same steps on the same noisy latents
c  temporal layers, without discriminator
d  temporal layers, against a video discriminator
e  as d, with an image discriminator too

The learning rate is 1e-3 for new layers, 2e-4 for b, whose layers are trained already: at 1e-3 it falls apart.
`--noise` is the deviation of the held-out noise, in scaled latents, as benchmarks/sampler_noise.py measures it;
training draws from 0 to twice as much. The trained decoders are also measured at the `--levels` of noise. Writes
OUT/decoder.json, .md and .png; each variant's folder has contact sheets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from matplotlib.figure import Figure

from inflate.data.clips import ClipDataset, collate
from inflate.data.demo_clips import build
from inflate.data.settings import Data
from inflate.families.svd import SVD
from inflate.training.decoder import Decoder, DecoderTask, HeldOut
from inflate.training.held_out import join
from inflate.training.loop import fit
from inflate.training.settings import Training
from record import command, record, write

VARIANTS = {
    "b": {"temporal": False, "trainable": "decoder", "adversarial": 0.0, "lr": 2e-4},
    "c": {"adversarial": 0.0},
    "d": {},
    "e": {"image_adversarial": True},
}


def settings_of(variant: str, noise: float, steps: int) -> Decoder:
    """The decoder settings of a variant; only what its letter says differs."""
    common = Decoder(
        l1=1.0, perceptual=0.0, adversarial=0.2, adversarial_start=steps // 3, discriminator_lead=steps // 10,
        discriminator_channels=24, discriminator_lr=1e-3, latent_noise=(0.0, 2 * noise), held_out_noise=noise,
    )  # fmt: skip
    return replace(common, **VARIANTS[variant])  # type: ignore[arg-type]  # the values are of many types


def data_of(clips: Path) -> Data:
    """The settings of the clips."""
    return Data(str(clips), split="train", held_out="held_out", frames=8, height=64, width=64)


def run(variant: str, output: Path, clips: Path, arguments: argparse.Namespace) -> None:
    """Train one variant; its held-out measures over the steps are in its metrics.json."""
    data = data_of(clips)
    held_out = join([collate([item]) for item in ClipDataset(data.evaluation(), shuffle=False)])["pixels"]
    family = SVD.load("pocket", frames=data.frames)
    task = DecoderTask(
        family.vae,
        settings_of(variant, arguments.noise, arguments.steps),
        held_out,
        family.save_pretrained,
        fps=8.0,
    )
    training = Training(
        output=output / variant, steps=arguments.steps, batch=1, lr=1e-3, warmup=20, schedule="cosine", ema=0.995,
        precision=arguments.precision, workers=0, evaluate_every=arguments.steps // 5, preview_every=0,
        checkpoint_every=500, tracker="none", resume="latest",
    )  # fmt: skip
    result = fit(task, ClipDataset(data, seed=0), training, collate)
    if result.export is None:
        raise SystemExit(f"stopped by {result.stopped} at step {result.step}; the same command goes on")


def measured(arguments: argparse.Namespace, variants: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """The measures on noisy latents by level of noise, then by variant: of the exported decoders and of the shipped."""
    clips = ClipDataset(data_of(arguments.output / "clips").evaluation(), shuffle=False)
    pixels = join([collate([item]) for item in clips])["pixels"]
    found: dict[str, dict[str, dict[str, float]]] = {str(level): {} for level in arguments.levels}
    for variant in ("a", *variants):
        family = SVD.load("pocket" if variant == "a" else arguments.output / variant / "export")
        temporal = VARIANTS.get(variant, {"temporal": False}).get("temporal", True)
        for level in arguments.levels:
            held_out = HeldOut(family.vae, pixels, level, seed=0)
            values = held_out.measure(family.vae, True) if temporal else held_out.parent
            found[str(level)][variant] = {name: value for name, value in values.items() if name.startswith("noisy/")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--noise", type=float, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--only", default="bcde", help="train only these; - for none, only the report")
    parser.add_argument("--levels", type=float, nargs="*", default=[])
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    clips = build(arguments.output / "clips", clips=600, held_out=32)
    for variant in arguments.only.replace("-", ""):
        run(variant, arguments.output, clips, arguments)
    read = {v: arguments.output / v / "metrics.json" for v in VARIANTS}
    found = {v: json.loads(path.read_text())["held_out"] for v, path in read.items() if path.is_file()}
    report({v: rows for v, rows in found.items() if rows[-1]["step"] == arguments.steps}, arguments)


def report(done: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Write the table, the plot and the numbers."""
    first = next(iter(done.values()))[-1]
    names = [name.removeprefix("parent/") for name in first if name.startswith("parent/")]
    rows = {"a": {name: first[f"parent/{name}"] for name in names}}
    rows |= {variant: {name: history[-1][name] for name in names} for variant, history in done.items()}
    head = "| | " + " | ".join(names) + " |\n|---" * 1 + "|---" * len(names) + "|"
    table = "\n".join(
        [head, *("| " + " | ".join([v, *(f"{row[n]:.4g}" for n in names)]) + " |" for v, row in rows.items())]
    )
    settings = {v: asdict(settings_of(v, arguments.noise, arguments.steps)) for v in done}
    result = {"noise": arguments.noise, "steps": arguments.steps, "held-out clips": 32, "final": rows,
              "at other levels of noise": measured(arguments, done), "history": done, "settings": settings}  # fmt: skip
    write(arguments.output / "decoder.json", record(command("OUT"), result))
    (arguments.output / "decoder.md").write_text(table + "\n")
    print(table)
    figure = Figure(figsize=(14, 3.5), layout="constrained")
    shown = [name for name in names if "noisy" in name][:4]
    for place, name in enumerate(shown, 1):
        axes = figure.add_subplot(1, len(shown), place)
        for variant, history in done.items():
            axes.plot([row["step"] for row in history], [row[name] for row in history], marker=".", label=variant)
        axes.axhline(rows["a"][name], color="grey", label="a")
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(arguments.output / "decoder.png", dpi=90)


if __name__ == "__main__":
    main()
