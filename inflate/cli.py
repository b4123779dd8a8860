"""The command `inflate`. Each command imports what it needs when it runs, so that --help answers at once."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from inflate import __version__, shelves
from inflate.adapter_cli import adapter_app
from inflate.errors import CheckpointError, ConfigError, DataError, SurgeryError, TrainingError, report_errors
from inflate.formats import WRITTEN
from inflate.options import ImageEncoder, ModelPath, Prediction, Tokenizer, check_output
from inflate.refine_cli import refining_app
from inflate.sample_cli import sampling_app

if TYPE_CHECKING:
    from inflate.data.preflight import Progress
    from inflate.data.settings import Data

app = typer.Typer(
    help="Turn a Stable Diffusion checkpoint into a video model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

data = typer.Typer(help="Look at the clips of a run before it starts.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(sampling_app)
app.add_typer(refining_app)
app.add_typer(adapter_app, name="adapter")

SIGNALLED = 128
"""Exit status of a command that a signal stopped, less the signal's number."""

Settings = Annotated[
    list[str],
    typer.Argument(metavar="FILE.yaml|data.KEY=VALUE ...", help="Of a dataset or a recipe; later ones win."),
]
RunSettings = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE.yaml|KEY=VALUE ...",
        help="What a run is given: stage, data, model; of tasks image_to_video, image_text_to_video.",
    ),
]


def main() -> None:
    """Run the command line."""
    app(prog_name="inflate")


@app.callback(invoke_without_command=True)
def answer(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Turn a Stable Diffusion checkpoint into a video model."""
    if version:
        typer.echo(f"inflate {__version__}")
        raise typer.Exit


@app.command()
@report_errors()
def init(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to put them; made if need be.")]) -> None:
    """Copy the recipes, adapters and datasets that you edit into DIR."""
    for target in shelves.copy(folder):
        typer.echo(f"wrote {target}")
    typer.echo(f"next: cd {folder} && accelerate launch recipes/svd_finetune.py")


@data.command()
@report_errors()
def check(settings: Settings) -> None:
    """Decode every clip once and list which windows a run takes of it, in which bucket, or why it is dropped.

    Ends with status 1 where a run would refuse to start. Of a recipe's files only the clips' settings are read.
    """
    from inflate.data.preflight import preflight
    from inflate.data.sources import find_clips

    wanted = _data_settings(settings)
    checks = {wanted.split or "clips": wanted}
    if wanted.held_out is not None:
        checks[f"{wanted.held_out} (held out)"] = wanted.evaluation()
    found = {name: preflight(find_clips(one), one, _progress(name))[0] for name, one in checks.items()}
    typer.echo("\n\n".join(f"{name}\n{one.table()}" for name, one in found.items()))
    for one in found.values():
        one.refuse()


@data.command("cache")
@report_errors()
def cache_clips(
    settings: RunSettings,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of the cache first; encode anew what is damaged.")
    ] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove what these settings do not need.")] = False,
) -> None:
    """Encode the clips of a run once into data.cache, which training then reads: latents, embeddings, caption states.

    What is there already is kept, and what has changed is encoded anew. `accelerate launch --multi_gpu -m inflate data
    cache ...` shares the clips among several GPUs.
    """
    from inflate import config
    from inflate.training import caching

    wanted = config.load(caching.Caching, settings, partial=True)
    caching.cache_clips(wanted, verify, prune, _progress, typer.echo)


@data.command("show")
@report_errors()
def show_cached(
    settings: RunSettings,
    output: Annotated[Path, typer.Option("-o", "--output", help="A new folder for videos and contact sheets.")],
    count: Annotated[int, typer.Option(min=1, help="Windows to show, spread over all.")] = 4,
) -> None:
    """Decode windows of what data.cache holds, beside the files' own frames."""
    if output.exists():
        raise DataError(f"{output} exists already; choose another name")
    from inflate import config
    from inflate.training import caching

    caching.show_cached(config.load(caching.Caching, settings, partial=True), output, count, typer.echo)


def _data_settings(sources: list[str]) -> "Data":
    """Read the group `data` of settings files and arguments."""
    from inflate import config
    from inflate.data.settings import Data

    @dataclass
    class Settings:
        data: Data = field(default_factory=Data)

    return config.load(Settings, sources, partial=True).data


def _progress(name: str) -> "Progress":
    """Show a bar on a terminal."""
    from tqdm import tqdm

    bar = tqdm(desc=name, unit="clip", leave=False, disable=None)

    def show(done: int, whole: int) -> None:
        bar.total = whole
        bar.update(done - bar.n)
        if done == whole:
            bar.close()

    return show


@app.command()
@report_errors()
def doctor(
    output: Annotated[Path, typer.Option(help="Where runs will be written.")] = Path("output"),
) -> None:
    """Check this installation: packages, devices, disk, and the pocket model at work. Status 1 if a check failed."""
    from inflate.findings import all_pass
    from inflate.installation import LAUNCH, MACHINE, checks

    passed = all_pass(checks(output), MACHINE, typer.echo)
    typer.echo(f"for several GPUs or machines: {LAUNCH} --output {output}")
    if not passed:
        raise typer.Exit(1)


@app.command()
@report_errors()
def verify(path: ModelPath) -> None:
    """Inflate an image model, list what was done, and compare the result with it frame by frame."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from inflate.families import svd_files
    from inflate.models import folders, temporal_layers
    from inflate.models.unet import TemporalSpec
    from inflate.surgery import IDENTITY, inflate_unet, inflate_vae, verify_identity

    folder = folders.resolve(path)
    if temporal_layers.are_in(folder) or not svd_files.is_image_model(folder):
        raise CheckpointError(f"{path} is a video model already; verify compares an image model with its inflation")
    unet = folders.load_parent(UNet2DConditionModel, folder / "unet")
    vae = folders.load_parent(AutoencoderKL, folder / "vae")
    video_unet, unet_report = inflate_unet(unet, TemporalSpec(), in_channels=2 * vae.config.latent_channels)
    video_vae, vae_report = inflate_vae(vae)
    typer.echo(f"UNet\n{unet_report.table()}\n\nVAE\n{vae_report.table()}\n")
    differences = {"UNet": verify_identity(video_unet, unet), "decoder": verify_identity(video_vae, vae)}
    for name, difference in differences.items():
        typer.echo(f"{name}: largest difference from the image model {difference:.1e}")
    if not max(differences.values()) <= IDENTITY:  # also where it is not a number
        raise SurgeryError(f"{path}: the inflated model differs from its parent by more than {IDENTITY:g}")


@app.command()
@report_errors()
def show(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A file, a folder, owner/name on the Hub, or `pocket`.")],
) -> None:
    """Say what a file or folder is: format, temporal layers, and the size of each group of parameters.

    Of an adapter's file it says what `inflate adapter show` says.
    """
    from inflate import catalogue
    from inflate.adapters import card, file, foreign

    if foreign.is_adapter(Path(path).expanduser()):
        typer.echo(card.table(file.read(path)))
        return
    typer.echo(catalogue.describe(path).table())


@app.command("convert", epilog=f"Formats to convert to: {', '.join(WRITTEN)}.")
@report_errors()
def convert_model(
    source: Annotated[str, typer.Argument(metavar="FROM", help="A file or folder that `inflate show` knows.")],
    target: Annotated[Path, typer.Argument(metavar="TO", help="A new folder, or a .safetensors file.")],
    to: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="What to write, where FROM has no one usual other.")
    ] = None,
    image_model: Annotated[
        str | None, typer.Option(help="The Stable Diffusion that motion modules or temporal layers alone belong over.")
    ] = None,
    image_encoder: ImageEncoder = None,
    tokenizer: Tokenizer = None,
    prediction: Prediction = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Clip length of the original's file, where untold [default: 14, SVD's]")
    ] = None,
    norm_per_frame: Annotated[
        bool, typer.Option("--norm-per-frame", help="Diffusers' motion modules that were converted from AnimateDiff's.")
    ] = False,
    published: Annotated[
        Literal["256", "512", "1024", "512_interp"] | None,
        typer.Option("--published", help="Which DynamiCrafter the original's file is, where it looks like another."),
    ] = None,
    double_detail: Annotated[
        bool,
        typer.Option("--double-detail", help="An I2VGenXLUNet with half of its detail, as published: mend it."),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that exists.")] = False,
) -> None:
    """Write the model in FROM to TO in another format, bit for bit in float32; what that cannot hold is refused.

    Temporal layers alone are written in half precision.
    """
    from inflate.conversion import Extra, convert

    extra = Extra(image_model, image_encoder, tokenizer, prediction, frames, norm_per_frame, published, double_detail)
    typer.echo(f"note: {convert(source, target, to, extra, overwrite)}", err=True)
    typer.echo(f"wrote {target}")


@app.command()
@report_errors()
def evaluate(
    generated: Annotated[Path, typer.Argument(metavar="GENERATED", help="Folder or metadata file of videos.")],
    real: Annotated[Path | None, typer.Option(help="The same of true videos, by the same names.")] = None,
    unpaired: Annotated[bool, typer.Option("--unpaired", help="The true videos are others: compare the sets.")] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder or metadata file with captions, if not GENERATED's own.")
    ] = None,
    clip: Annotated[Path | None, typer.Option(help="Folder of a CLIP model, for prompt agreement.")] = None,
    fvd_network: Annotated[
        Path | None, typer.Option(help="TorchScript file such as i3d_torchscript.pt; the code in it is executed.")
    ] = None,
    vgg: Annotated[Path | None, typer.Option(help="File of VGG16's tensors, for LPIPS.")] = None,
    lpips_heads: Annotated[Path | None, typer.Option(help="File of LPIPS's linear heads.")] = None,
    frames: Annotated[int | None, typer.Option(help="First frames to measure, if not all.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Scale and crop to this.")] = None,
    fps: Annotated[float | None, typer.Option(help="Resample to this rate.")] = None,
    stride: Annotated[int, typer.Option(min=1, help="Take every n-th frame.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the intervals' bootstrap.")] = 0,
    against: Annotated[Path | None, typer.Option(help="JSON of an earlier evaluation to set beside this one.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Everything as JSON.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Measure a folder of videos: motion and flicker, agreement with prompts, closeness to true videos (PSNR, FVD)."""
    if output is not None:
        check_output(overwrite, (".json",), output)
    from inflate.metrics.folders import Cut, parse_size

    cut = Cut(frames, parse_size(size) if size else None, fps, stride)
    import torch

    from inflate.metrics import evaluate as evaluation
    from inflate.metrics.report import read_earlier

    settings = evaluation.Settings(
        generated, real, prompts, clip, fvd_network, vgg, lpips_heads, unpaired, cut, seed, against
    )
    if fvd_network is not None:
        typer.echo(f"note: {fvd_network} is a program, which now runs", err=True)
    found = evaluation.evaluate(settings, _progress, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for note in found.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(found.table(read_earlier(against) if against else None))
    if output is not None:
        found.write(output)
        typer.echo(f"wrote {output}")


@app.command("sweep", context_settings={"ignore_unknown_options": True})
@report_errors()
def run_sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A script such as recipes/svd_finetune.py.")],
    settings: Annotated[
        list[str], typer.Argument(metavar="[FILE.yaml] key=value,value...", help="What the recipe takes, and lists.")
    ],
) -> None:
    """Run a recipe with each combination of the values that key=a,b,c lists; resume or skip what was run before."""
    from inflate import sweep

    outcomes, stopped = sweep.run(recipe, sweep.plan(recipe, settings), lambda text: typer.echo(text, err=True))
    typer.echo(sweep.table(outcomes))
    if stopped:
        raise typer.Exit(SIGNALLED + stopped)
    failed = [outcome.planned.name for outcome in outcomes if outcome.status]
    if failed:
        remedy = "their errors stand above; the same command goes on with them"
        raise TrainingError(f"{len(failed)} of {len(outcomes)} runs failed ({', '.join(failed)}): {remedy}")


@app.command("plan", context_settings={"ignore_unknown_options": True})
@report_errors()
def plan_run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A script such as recipes/svd_finetune.py.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE.yaml] [key=value] ...", help="What a run is given.")
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option("--gpu", metavar="16GB|NAME", help="A card to choose for: its memory, or its name; repeatable."),
    ] = None,
) -> None:
    """Tell what a run would need of a GPU's memory, phase by phase, without one, and which measures make it fit.

    Nothing is trained, no clip is read, and of a published model no weights. Ends with status 1 where nothing fits.
    """
    from inflate.training.cards import Card

    cards = [Card.parse(one) for one in gpu or []]
    from inflate import fitting
    from inflate.planning import Planner

    if not fitting.plan(Planner(recipe, settings or []), cards, typer.echo, partial(typer.echo, err=True)):
        raise typer.Exit(1)


class ListByDefault(TyperGroup):
    """Commands of which `list` is the one that is meant where none is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and args[0] in (*self.commands, "--help")
        return super().parse_args(ctx, args if named else ["list", *args])


runs_app = typer.Typer(cls=ListByDefault, help="List the runs in FOLDER..., compare them, plot them.")
app.add_typer(runs_app, name="runs")
RunFolders = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, with config.yaml.")]


@runs_app.command("list")
@report_errors()
def list_runs(
    folders: Annotated[
        list[Path] | None, typer.Argument(metavar="[FOLDER]...", help="Where to look [default: output]")
    ] = None,
) -> None:
    """List every run below FOLDER: steps done, how it ended, held-out numbers at its start and last, what overfits."""
    from inflate import runs

    for folder in folders or [Path("output")]:
        for found in runs.find(folder):
            typer.echo(runs.describe(runs.read(found)))
        for found in runs.unmeasured(folder):
            typer.echo(f"note: {found} has begun and written no {runs.METRICS} yet", err=True)


@runs_app.command("compare")
@report_errors()
def compare_runs(folders: RunFolders) -> None:
    """Show the settings and surroundings that differ between runs, and their last held-out numbers."""
    from inflate import runs

    if len(folders) < 2:
        raise ConfigError(f"{folders[0]}: name another run to compare it with")
    typer.echo(runs.compare([runs.read(folder) for folder in folders]))


@runs_app.command("plot")
@report_errors()
def plot_runs(
    folders: RunFolders,
    output: Annotated[Path, typer.Option("-o", "--output", help="The plot: .png, .svg or .pdf.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Draw the training and held-out curves of runs on common axes."""
    from inflate import runs

    check_output(overwrite, (".png", ".svg", ".pdf"), output)
    read = [runs.read(folder) for folder in folders]
    logs = [{"history": run.history, "held_out": run.held_out} for run in read]
    labelled = dict(zip(runs.names(read), logs, strict=True))
    if not any(rows for log in logs for rows in log.values()):
        raise CheckpointError(f"{folders[0]}: nothing was recorded that could be drawn")
    from inflate.curves import plot

    plot(output, labelled)
    typer.echo(f"wrote {output}")
