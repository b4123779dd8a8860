"""What the commands that draw clips share: options, notes, adapters for as long as they run, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inflate.adapters.settings import Weighted
from inflate.errors import ConfigError, DataError
from inflate.options import option

if TYPE_CHECKING:
    from inflate.animation import Pixels
    from inflate.families.svd import SVD
    from inflate.models.precision import Precision
    from inflate.models.stable_diffusion import TextToVideo

OtherImageModel = Annotated[
    str | None,
    typer.Option("--image-model", help="Another Stable Diffusion for the temporal layers to go over: its look."),
]

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(
        "--dtype", help="Round all weights to this and compute in it, in half the memory [default: as loaded]"
    ),
]
LittleMemory = Annotated[
    bool | None,
    typer.Option("--little-memory/--at-once", help="The same clip, part by part or at once [default: by its size]"),
]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME[:WEIGHT]", help="An adapter's file, folder or name on the shelf; may be repeated."
    ),
]


def refuse_unguided(guidance: float | None, **idle: Any) -> None:
    """Raise ConfigError for options that only guidance reads, where its scale says that there is none."""
    names = " and ".join(option(name) for name, value in idle.items() if value)
    if names and guidance is not None and guidance <= 1.0:
        raise ConfigError(f"{names} cannot act without guidance, which --guidance {guidance:g} turns off: leave it out")


def adapt(family: SVD | TextToVideo, wanted: list[Weighted], any_base: bool, dtype: Precision | None) -> None:
    """Merge adapters into the UNet, and then round all weights, for as long as this command runs."""
    if wanted:
        from inflate.adapters.merge import merge_files

        merge_files(family.unet, wanted, any_base)
    if dtype is not None:
        from inflate.models.precision import cast

        cast(family.parts.values(), dtype)


def note_image_model(path: str) -> None:
    """Say what a freshly inflated model cannot do yet."""
    from diffusers import UNet2DConditionModel

    from inflate.models import folders, single_file

    file = Path(path).expanduser() if path.endswith(folders.SAFETENSORS) else None
    if single_file.is_single_image_model(file) if file else folders.holds(path, UNet2DConditionModel):
        note(f"{path} is an image model: freshly inflated, its frames know nothing of each other")


def note(*texts: str) -> None:
    for text in texts:
        typer.echo(f"note: {text}", err=True)


def write(
    output: Path,
    frames: Pixels,
    fps: float,
    rows: Sequence[Pixels] | None = None,
    labels: Sequence[str] | None = None,
    page: str | None = None,
    columns: int = 8,
) -> None:
    """Write the video, a contact sheet of it or of the clips that it is made of, and a page: together or not at all.

    The sheet has so many columns at most.
    """
    from inflate.data import video
    from inflate.files import new_files, write_text

    sheet, text = output.with_suffix(".png"), output.with_suffix(".html")
    try:
        with new_files(output.parent, output.name) as aside:
            video.write(aside / output.name, frames, fps)
            video.contact_sheet(aside / sheet.name, rows or [frames], labels, columns)
            if page is not None:
                write_text(aside / text.name, page)
    except OSError as error:
        raise DataError(f"{output} cannot be written: {error}") from error
    for file in (output, sheet, *([] if page is None else [text])):
        typer.echo(f"wrote {file}")
