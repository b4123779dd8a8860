"""The README.md that a run leaves beside its results: what was trained, on what, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inflate.files import write_text
from inflate.measures import Overfitting, Rows, better
from inflate.sampling.refinement import PUBLISHED, Refinement
from inflate.training.log import found_overfitting
from inflate.training.record import device_name


def write_card(
    folder: Path,
    title: str,
    facts: Mapping[str, str],
    held_out: Rows,
    scores: Mapping[str, float],
    config: str,
    use: str,
) -> Path:
    """Write FOLDER/README.md, which says by `use` what to do with the export; every number in it was measured."""
    sections = [
        f"# {title}",
        "\n".join(f"- {name}: {value}" for name, value in {**facts, "hardware": hardware()}.items()),
        _measured(held_out, found_overfitting(folder, held_out)),
        _scored(scores),
        f"## Use\n\n{use}",
        f"## Settings\n\n```yaml\n{config.strip()}\n```",
    ]
    path = folder / "README.md"
    write_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def image_use(decode_chunk: int) -> str:
    """How to animate an image with an export of Stable Video Diffusion; the chunk is that of the decoder's training."""
    return (
        "```bash\ninflate sample export image.png -o out.mp4\n```\n\n"
        "```python\nfrom diffusers import StableVideoDiffusionPipeline\n\n"
        'pipeline = StableVideoDiffusionPipeline.from_pretrained("export")\n'
        f"frames = pipeline(image, decode_chunk_size={decode_chunk}).frames[0]  # the decoder's training chunk\n```"
    )


TEXT_USE = '```bash\ninflate generate export "a prompt" -o out.mp4\n```'
"""How to draw a prompt with a text-to-video export."""


ANIMATION_USE = '```bash\ninflate sample export image.png --prompt "a prompt" -o out.mp4\n```'
"""How to animate an image by a prompt with an export of DynamiCrafter or I2VGen-XL."""

UNPROMPTED_USE = ANIMATION_USE.replace(' --prompt "a prompt"', "")
"""How to animate an image with an export of I2VGen-XL that is told images alone."""

BETWEEN_USE = ANIMATION_USE.replace("image.png", "first.png --end-image last.png")
"""How to draw from one image to another with an export of DynamiCrafter that was trained for it."""

REFINEMENT_USE = '```bash\ninflate refine clip.mp4 --model export --prompt "a prompt" -o out.mp4\n```'
"""How to draw a clip anew with a refiner."""

OPTIONS = ("start", "strength", "steps", "guidance", "rescale", "eta", "suffix", "freeu", "keep_colours")
"""Settings of drawing that are options of the commands, too, by the names that these have."""

STREAM_USE = (
    "```bash\npython recipes/dynamicrafter_finetune.py recipes/dynamicrafter_adapt.yaml model.image_stream=export\n```"
)
"""How to go on with an image stream alone."""


def drawn_as(use: str, settings: object, usual: object) -> str:
    """A command that draws by `settings`: with an option for each that is not as `usual`, the command's own.

    Without guidance there is nothing to rescale, and commands refuse to.
    """
    unguided = getattr(settings, "guidance", 0.0) <= 1.0
    found = {name: getattr(settings, name) for name in OPTIONS if hasattr(settings, name)}
    told = [
        _option(name, value)
        for name, value in found.items()
        if value != getattr(usual, name) and not (name == "rescale" and unguided)
    ]
    return use.replace(" -o ", " ".join(["", *told, "-o "]))


def refined_as(settings: Refinement, trained: int) -> str:
    """How to draw a clip anew as by these settings with a refiner that was trained on so many noise levels."""
    usual = PUBLISHED[settings.start]
    strength = settings.strength * (settings.levels or trained) / (usual.levels or trained)
    return drawn_as(REFINEMENT_USE, replace(settings, strength=strength), replace(usual, start="noise"))


def _option(name: str, value: Any) -> str:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words} {f'{value:.4g}' if isinstance(value, float) else shlex.quote(str(value))}"


def hardware() -> str:
    """The device that a run of this process uses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = "" if device.type == "cuda" else f"{torch.get_num_threads()} threads, "
    return f"{device_name(device)}, {threads}torch {torch.__version__}"


def _measured(held_out: Rows, overfitted: Sequence[Overfitting]) -> str:
    if not held_out:
        return ""
    first, last = held_out[0], held_out[-1]
    rows = [
        f"| {name} | {first[name]:.4g} | {last[name]:.4g} | {better(name)} |"
        for name in last
        if name != "step" and name in first
    ]
    head = f"| measure | step {int(first['step'])} | step {int(last['step'])} | better |\n|---|---|---|---|"
    return "\n\n".join(["## Measured", "\n".join([head, *rows]), *(f"**{one}**" for one in overfitted)])


def _scored(scores: Mapping[str, float]) -> str:
    if not scores:
        return ""
    rows = "\n".join(f"| {name} | {value:.4g} | {better(name)} |" for name, value in scores.items())
    return f"## Samples\n\n| of the last preview | | better |\n|---|---|---|\n{rows}"
