"""What several commands take, and the check of what they write."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from inflate.errors import ConfigError, DataError

ModelPath = Annotated[
    str, typer.Argument(metavar="PATH", help="A model's folder, its owner/name on the Hugging Face Hub, or `pocket`.")
]
ImageEncoder = Annotated[
    str | None,
    typer.Option(
        "--image-encoder", help="Folder of the image encoder, where the original's file or image model has none."
    ),
]
Tokenizer = Annotated[
    str | None,
    typer.Option("--tokenizer", help="Folder of the tokenizer, where the image model is a single file."),
]
Prediction = Annotated[
    Literal["epsilon", "v_prediction"] | None,
    typer.Option("--prediction", help="What a Stable Diffusion 2's file predicts."),
]

AnyBase = Annotated[bool, typer.Option("--any-base", help="Take adapters that were made on another model, too.")]


REFINEMENT = {
    "start": (
        "What is drawn anew: a clip with fresh noise of the levels of training, or its inversion over 700 of them, "
        "which keeps more of it."
    ),
    "strength": (
        "Share of the noise levels that is drawn anew, 0 (nothing) to 1: of 700 for an inversion, as in VGen, "
        "otherwise of those of training [default: 1]"
    ),
    "steps": "Denoising steps [default: 30]",
    "guidance": "Guidance scale; up to 1 there is none [default: 7.5, of an inversion 9]",
    "keep_colours": (
        "What is larger than 2 to this power pixels stays as it was [default: 0, off; 2 keeps most, 5 the colours "
        "alone]"
    ),
}
"""What --help says of refining a video, and of refining what is drawn."""

MOST_SEED = 2**63 - 1
"""Above it there is room for the seeds of a grid and of a story's shots: generators take less than 2**64."""


def option(name: str) -> str:
    """A parameter as it is written on the command line."""
    return f"--{name.replace('_', '-')}"


def chosen(**options: Any) -> dict[str, Any]:
    """The options that were given; ConfigError for a number that is not finite."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{option(name)} is {value}: it must be a finite number")
    return {name: value for name, value in options.items() if value is not None}


def both(**sides: int | None) -> tuple[int, int] | None:
    """A video's sides in pixels, given together, or none of them; ConfigError for one alone, and for odd ones."""
    first, second = sides.values()
    if (first is None) != (second is None):
        raise ConfigError(f"{' and '.join(option(name) for name in sides)}: give both or neither")
    for name, side in sides.items():
        if side is not None and side % 2:
            raise ConfigError(f"{option(name)} is {side}: the sides of a video are even; give {side + 1}")
    return None if first is None or second is None else (first, second)


def check_rates(**rates: float | None) -> None:
    """Raise `ConfigError` for a rate that was given and is not above 0."""
    for name, rate in chosen(**rates).items():
        if rate <= 0:
            raise ConfigError(f"{option(name)} is {rate:g}: it must be above 0")


def check_output(overwrite: bool, suffixes: tuple[str, ...], *files: Path) -> None:
    """Raise `DataError` where the first of the files, or one that goes with it, cannot or may not be written."""
    output = files[0]
    if output.suffix.lower() not in suffixes:
        raise DataError(f"{output}: give the output a name that ends in {' or '.join(suffixes)}")
    for file in files:
        if file.exists() and not (overwrite and file.is_file()):
            raise DataError(
                f"{file} exists already; choose another name" + ("" if overwrite else " or add --overwrite")
            )
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise DataError(f"{output}: cannot be written: {parent} is not a folder that you may write to")


def keep_inputs(read: Iterable[Path], output: Path, *beside: Path) -> None:
    """Raise `DataError` where an output, or a file that goes with it, is one of those that are read."""
    inputs = {file.resolve() for file in read}
    for file in (output, *beside):
        if file.resolve() in inputs:
            what = "" if file == output else f", and a file of that name goes with {output}"
            raise DataError(f"{file} is read{what}: choose another name, it would be written over")
