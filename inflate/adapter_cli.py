"""The commands `inflate adapter ...`. Each imports what it needs when it runs, so that --help answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inflate.adapters.settings import Weighted
from inflate.errors import CheckpointError, report_errors

if TYPE_CHECKING:
    from inflate.adapters.bases import Family

adapter_app = typer.Typer(help="Look at adapters, prove them, merge them.", no_args_is_help=True)

AdapterFile = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter, .safetensors.")]
AdapterFiles = Annotated[
    list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters, each as trained or in a weight.")
]
ModelFolder = Annotated[
    str, typer.Argument(metavar="MODEL", help="The adapters' base: a folder, owner/name on the Hub, or `pocket`.")
]
Target = Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Take adapters that were made on another model, too.")]


@adapter_app.command()
@report_errors()
def show(path: AdapterFile) -> None:
    """Say what an adapter is: kind, layers, rank, base, what it was made of, how it was proved, its held-out curve."""
    from inflate.adapters import card, file

    typer.echo(card.table(file.read(path)))


@adapter_app.command()
@report_errors()
def verify(
    path: AdapterFile,
    base: Annotated[str | None, typer.Option(help="Its base [default: the one it names, if it is here]")] = None,
    any_base: AnyBase = False,
) -> None:
    """Load an adapter on its base and compare the output with the trained model's, which the file keeps."""
    from inflate.adapters import bases, file
    from inflate.adapters import verify as proof

    adapter = file.read(path)
    name = base or bases.name_of(adapter, path)
    found = proof.check(path, bases.load(bases.family_of(name, adapter), {"path": name}).unet, any_base)
    typer.echo(f"{path} on {name}: {found.max_abs_diff:.1e} from what was trained, {found.effect:.1e} from the base")
    proof.refuse_difference(path, found.max_abs_diff)


@adapter_app.command()
@report_errors()
def merge(model: ModelFolder, files: AdapterFiles, output: Target, any_base: AnyBase = False) -> None:
    """Write MODEL with the adapters merged into its weights, as a model like any other."""
    from inflate.adapters import merge as merging

    wanted = [Weighted.parse(text) for text in files]
    family = _family(model, wanted[0].path, output)
    merging.merge_files(family.unet, wanted, any_base)
    family.save_pretrained(output)
    typer.echo(f"wrote {output}")


@adapter_app.command()
@report_errors()
def unmerge(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model that an adapter was merged into.")],
    text: Annotated[str, typer.Argument(metavar="FILE[:WEIGHT]", help="The adapter, and the weight of its merging.")],
    output: Target,
) -> None:
    """Write MODEL without the adapter that was merged into it; nothing is written where it was not."""
    from inflate.adapters import file
    from inflate.adapters import merge as merging

    wanted = Weighted.parse(text)
    family = _family(model, wanted.path, output)
    apart = merging.unmerge(family.unet, file.read(wanted.path), wanted.weight, wanted.path)
    family.save_pretrained(output)
    typer.echo(f"wrote {output}; with the adapter beside it, it is {apart:.1e} from what was trained")


def _family(model: str, adapter: Path, output: Path) -> "Family":
    """Load the model that an adapter is to be merged into or taken out of, if the output is free."""
    if output.exists():
        raise CheckpointError(f"{output} exists already; choose another name")
    from inflate.adapters import bases, file

    return bases.load(bases.family_of(model, file.read(adapter)), {"path": model})
