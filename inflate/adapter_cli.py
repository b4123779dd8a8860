"""The commands `inflate adapter ...`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inflate.errors import report_errors
from inflate.formats import ADAPTERS

if TYPE_CHECKING:
    from inflate.adapters.algebra import Resized

adapter_app = typer.Typer(help="Work with the files of adapters: LoRAs and their kin.", no_args_is_help=True)
Output = Annotated[Path, typer.Option("-o", "--output", help="The new file, .safetensors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
Rank = Annotated[int, typer.Option(min=1, help="Inner width of the factors.")]


@adapter_app.command("convert", epilog=f"Formats: {'; '.join(f'{name}: {what}' for name, what in ADAPTERS.items())}.")
@report_errors()
def convert_adapter(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="A .safetensors file in any of the formats.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The new file, .safetensors.")],
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help="What to write [default: inflate]")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model that the adapter is for [default: the one that the file tells]")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Its alpha, where the file does not tell.")] = None,
    without_text: Annotated[bool, typer.Option("--without-text", help="Leave out what is for text encoders.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter in another program's names, tensor for tensor; what that has no place for is refused."""
    from inflate.adapters.conversion import convert

    typer.echo(f"note: {convert(source, target, to, model, alpha, without_text, overwrite)}", err=True)
    typer.echo(f"wrote {target}")


@adapter_app.command("resize")
@report_errors()
def resize_adapter(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA.")],
    output: Output,
    rank: Rank,
    overwrite: Overwrite = False,
) -> None:
    """Write the nearest LoRA of another rank, by singular values, and say how much of it is left out."""
    from inflate.adapters import algebra, file

    found = algebra.resized(file.read(source), rank)
    adapter = algebra.remembered(found.adapter, by="resize", of=source.name, rank=rank, lost=found.lost_in_all)
    file.write(output, adapter, overwrite)
    _echo_lost(found)
    typer.echo(f"wrote {output}")


@adapter_app.command("combine")
@report_errors()
def combine_adapters(
    sources: Annotated[
        list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="LoRAs, and how strongly each is to act.")
    ],
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="Resize the sum to this [default: the sum of ranks]")] = None,
    other_bases: Annotated[bool, typer.Option("--other-bases", help="Combine adapters of different models.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one LoRA that acts as several together, or as one at another strength."""
    from inflate.adapters import algebra, file
    from inflate.adapters.settings import Weighted

    parts = [Weighted.parse(source) for source in sources]
    weights = [part.weight for part in parts]
    adapter = algebra.combined([file.read(part.path) for part in parts], weights, other_bases)
    if rank is not None:
        found = algebra.resized(adapter, rank)
        adapter = found.adapter
        _echo_lost(found)
    made = [{"file": part.path.name, "weight": part.weight} for part in parts]
    file.write(output, algebra.remembered(adapter, by="combine", of=made, rank=rank), overwrite)
    typer.echo(f"wrote {output}")


@adapter_app.command("scale")
@report_errors()
def scale_adapter(
    source: Annotated[str, typer.Argument(metavar="FILE:WEIGHT", help="An adapter, and how strongly it is to act.")],
    output: Output,
    overwrite: Overwrite = False,
) -> None:
    """Write an adapter at another strength: its alpha changes, its tensors do not."""
    from inflate.adapters import algebra, file
    from inflate.adapters.settings import Weighted

    part = Weighted.parse(source)
    adapter = algebra.scaled(file.read(part.path), part.weight)
    file.write(output, algebra.remembered(adapter, by="scale", of=part.path.name, weight=part.weight), overwrite)
    typer.echo(f"wrote {output}")


@adapter_app.command("extract")
@report_errors()
def extract_adapter(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model, file or folder.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The same after it was fine-tuned.")],
    output: Output,
    rank: Rank = 16,
    leave_rest: Annotated[
        bool, typer.Option("--leave-rest", help="Leave what no LoRA can change as BASE has it: norms, biases, mixes.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Write what a fine-tuned UNet has beyond its base as a LoRA, and say how much of it is left out."""
    from inflate.adapters import conversion, file

    found = conversion.extract(base, tuned, rank, leave_rest)
    file.write(output, found.adapter, overwrite)
    _echo_lost(found)
    typer.echo(f"wrote {output}")


def _echo_lost(found: Resized) -> None:
    """Say how much of a change a rank left out."""
    worst = max(found.lost, key=lambda layer: found.lost[layer])
    typer.echo(
        f"note: {found.lost_in_all:.2%} of the change's length is left out (0 is best); most, "
        f"{found.lost[worst]:.2%}, of {worst}",
        err=True,
    )
