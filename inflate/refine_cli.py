"""The command that refines videos. It imports what it needs when it runs, so that --help answers at once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inflate.adapters.settings import Weighted
from inflate.drawing import Adapters, Dtype, LittleMemory, adapt, note, refuse_unguided
from inflate.errors import ConfigError, report_errors
from inflate.options import MOST_SEED, REFINEMENT, AnyBase, both, check_output, chosen

if TYPE_CHECKING:
    from inflate.animation import Size
    from inflate.data.video import Probe
    from inflate.refining import Refining

refining_app = typer.Typer()


@refining_app.command()
@report_errors()
def refine(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="Any video, of any length.")],
    model: Annotated[str, typer.Option(metavar="PATH", help="A refinement model's folder, or its name on the Hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The video, .mp4; a contact sheet lies beside it.")],
    prompt: Annotated[str, typer.Option(help="What the video shows.")] = "",
    negative: Annotated[
        str | None,
        typer.Option(
            "--negative", "--negative-prompt", help="A prompt that guidance leads away from [default: the model's]"
        ),
    ] = None,
    strength: Annotated[float | None, typer.Option(min=0, max=1, help=REFINEMENT["strength"])] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels [default: the model's area in its shape]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; give both or neither.")] = None,
    frames_at_once: Annotated[
        int | None, typer.Option(min=1, help="Frames that the model is given together [default: its clips' length]")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="Frames that those share with the next, at least [default: a quarter]")
    ] = None,
    start: Annotated[Literal["noise", "inversion"], typer.Option(help=REFINEMENT["start"])] = "noise",
    steps: Annotated[int | None, typer.Option(min=1, help=REFINEMENT["steps"])] = None,
    guidance: Annotated[float | None, typer.Option(help=REFINEMENT["guidance"])] = None,
    rescale: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of its overexposure undone [default: 0.2, of an inversion 0.3]"),
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Noise of each step: 0 for none, up to 1 [default: 1]")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="Added to the prompt [default: nothing, of an inversion words of praise]")
    ] = None,
    freeu: Annotated[
        bool | None, typer.Option("--freeu/--no-freeu", help="Stronger features [default: for an inversion]")
    ] = None,
    double_frames: Annotated[
        bool, typer.Option("--double-frames", help="Every frame twice, for clips shorter than the model's.")
    ] = False,
    keep_colours: Annotated[int | None, typer.Option(min=0, max=10, help=REFINEMENT["keep_colours"])] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all noise.")] = 0,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    little_memory: LittleMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Draw VIDEO anew, larger and sharper, with a refinement model; its frame rate stays, its sound does not.

    It is scaled to cover the new size and cropped about its centre.
    """
    wanted = [Weighted.parse(text) for text in adapter or ()]
    check_output(overwrite, (".mp4",), output, output.with_suffix(".png"))
    asked = both(height=height, width=width)
    refuse_unguided(guidance, negative=negative, rescale=rescale)
    given = chosen(
        strength=strength, start=start, steps=steps, guidance=guidance, rescale=rescale, eta=eta, negative=negative,
        suffix=suffix, freeu=freeu, double_frames=double_frames or None, window=frames_at_once, overlap=overlap,
        keep_colours=keep_colours, little_memory=little_memory,
    )  # fmt: skip
    from inflate.refining import Refining, probe

    found = probe(video)
    refining = Refining.load(model, given)
    size = _checked(refining, asked, video, found)
    note(*_notes(video, found, size), *refining.notes([prompt]))
    adapt(refining.family, wanted, any_base, dtype)
    refining.write(video, found, prompt, seed, size, output)
    for file in (output, output.with_suffix(".png")):
        typer.echo(f"wrote {file}")


def _checked(refining: "Refining", asked: "Size | None", video: Path, found: "Probe") -> "Size":
    """Return the size that a video is refined at, as asked or by default; ConfigError where a side is too small."""
    from inflate.sampling.refinement import check_size

    size = asked or refining.size(found.height, found.width)
    try:
        check_size(refining.family, size)
    except ConfigError as error:
        if asked:
            raise
        raise ConfigError(f"{video} is {found.width}x{found.height}: {error}; give --height and --width") from None
    return size


def _notes(video: Path, found: "Probe", size: "Size") -> list[str]:
    """Return what of a video is not kept."""
    from inflate.animation import CUT, cut
    from inflate.data.video import has_high_range, has_sound

    notes = [f"{video} has sound, which is not kept"] if has_sound(video) else []
    if has_high_range(video):
        notes.append(f"{video} has colours of high dynamic range, which are read as others: they become flat")
    if size[0] * size[1] < found.height * found.width:
        less = f"{video} is {found.width}x{found.height} and becomes smaller, {size[1]}x{size[0]}"
        notes.append(f"{less}; --height and --width set another size")
    share = cut(found.height, found.width, size)
    if share > CUT:
        notes.append(f"{video} has another shape than {size[1]}x{size[0]}: {share:.0%} of it are cut off")
    if found.variable:
        notes.append(f"{video} has no constant frame rate: its frames are shown evenly, {found.fps:.4g} a second")
    return notes
