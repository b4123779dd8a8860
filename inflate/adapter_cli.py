"""The commands `inflate adapter ...`. Each imports what it needs when it runs, so that --help answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inflate.adapters.settings import Weighted
from inflate.errors import CheckpointError, report_errors
from inflate.formats import ADAPTERS
from inflate.options import AnyBase

if TYPE_CHECKING:
    from inflate.adapters.algebra import Resized
    from inflate.adapters.bases import Family

adapter_app = typer.Typer(
    help="Look at adapters, prove them, merge them, convert them, calculate with them.", no_args_is_help=True
)

AdapterFile = Annotated[Path, typer.Argument(metavar="FILE", help="An adapter, .safetensors.")]
AdapterFiles = Annotated[
    list[str], typer.Argument(metavar="FILE[:WEIGHT]...", help="Adapters, each as trained or in a weight.")
]
ModelFolder = Annotated[
    str, typer.Argument(metavar="MODEL", help="The adapters' base: a folder, owner/name on the Hub, or `pocket`.")
]
Target = Annotated[Path, typer.Option("-o", "--output", help="A new folder for the model.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="The new file, .safetensors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
Rank = Annotated[int, typer.Option(min=1, help="Inner width of the factors.")]


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
    model = bases.settings_of(adapter, path, base)
    found = proof.check(path, bases.load(bases.family_of(str(model["path"]), adapter), model).unet, any_base)
    name = base or adapter.base
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


@adapter_app.command("convert", epilog=f"Formats: {'; '.join(f'{name}: {what}' for name, what in ADAPTERS.items())}.")
@report_errors()
def convert_adapter(
    source: Annotated[Path, typer.Argument(metavar="FROM", help="A .safetensors file in any of the formats.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="The new file, .safetensors.")],
    to: Annotated[str | None, typer.Option(metavar="FORMAT", help="What to write, if not inflate.")] = None,
    model: Annotated[str | None, typer.Option(help="What it is for, where the file does not tell.")] = None,
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
    source: AdapterFile,
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
    sources: AdapterFiles,
    output: Output,
    rank: Annotated[int | None, typer.Option(min=1, help="Resize the sum to this.")] = None,
    any_base: AnyBase = False,
    overwrite: Overwrite = False,
) -> None:
    """Write one LoRA that acts as several together, or as one at another strength."""
    from inflate.adapters import algebra, file

    parts = [Weighted.parse(source) for source in sources]
    weights = [part.weight for part in parts]
    adapter = algebra.combined([file.read(part.path) for part in parts], weights, any_base)
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


@adapter_app.command()
@report_errors()
def repro(
    path: AdapterFile,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the run.")],
    data: Annotated[str | None, typer.Option(help="Its clips, if they lie elsewhere here.")] = None,
    base: Annotated[str | None, typer.Option(help="Its base, if it lies elsewhere here.")] = None,
) -> None:
    """Train an adapter again from what its file tells, and compare the weights bit by bit; status 1 if they differ."""
    from inflate.adapters import file
    from inflate.training import reproduction

    reproduction.refuse_output(output)
    wanted = reproduction.Reproduction.of(path, output, data, base)
    wanted.check()
    for note in wanted.differences():
        typer.echo(f"note: {note}: the last bits may differ", err=True)
    wanted.run()
    count = wanted.compare(output / "export" / file.NAME)
    typer.echo(f"all {count} tensors of {output / 'export' / file.NAME} equal those of {path}, to the bit")


@adapter_app.command()
@report_errors()
def push(
    path: AdapterFile,
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="For you alone, where it is made anew.")] = False,
) -> None:
    """Upload an adapter with its card and samples; OWNER/NAME is made if need be."""
    from inflate.adapters import sharing

    typer.echo(f"pushed {path}: {sharing.push(path, name, private)}")


@adapter_app.command()
@report_errors()
def pull(
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository on the Hugging Face Hub.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder; --adapter takes it as it is.")],
    revision: Annotated[str | None, typer.Option(help="A commit, tag or branch [default: the newest]")] = None,
) -> None:
    """Download an adapter, safetensors alone, checked as any stranger's, with its card and samples."""
    from inflate.adapters import sharing

    pulled = sharing.pull(name, folder, revision)
    for each in pulled.files:
        typer.echo(f"wrote {each}")
    typer.echo(f"note: of commit {pulled.revision}", err=True)


def _family(model: str, adapter: Path, output: Path) -> "Family":
    """Load the model that an adapter is to be merged into or taken out of, if the output is free."""
    if output.exists():
        raise CheckpointError(f"{output} exists already; choose another name")
    from inflate.adapters import bases, file

    return bases.load(bases.family_of(model, file.read(adapter)), {"path": model})


def _echo_lost(found: "Resized") -> None:
    """Say how much of a change a rank left out."""
    worst = max(found.lost, key=lambda layer: found.lost[layer])
    typer.echo(
        f"note: {found.lost_in_all:.2%} of the change's length is left out (0 is best); most, "
        f"{found.lost[worst]:.2%}, of {worst}",
        err=True,
    )
