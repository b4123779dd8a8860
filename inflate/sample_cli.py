"""The commands that draw clips. Each imports what it needs when it runs, so that --help answers at once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inflate.adapters.settings import Weighted
from inflate.errors import ConfigError, DataError, report_errors
from inflate.options import AnyBase, ImageEncoder, ModelPath, Prediction, Tokenizer, check_output

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from inflate.families.svd import SVD
    from inflate.families.video_ldm import VideoLDM
    from inflate.models.precision import Precision
    from inflate.sampling.svd import Sampling
    from inflate.sampling.text_to_video import Sampling as TextSampling

sampling_app = typer.Typer()

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


@sampling_app.command()
@report_errors()
def sample(
    path: ModelPath,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The first frame.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The video, .mp4; a contact sheet lies beside it.")],
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the clip [default: the model's, 14 where a file tells none]")
    ] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second [default: the model's]")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 25,
    motion_bucket: Annotated[float, typer.Option(min=0, max=255, help="Amount of motion.")] = 127.0,
    noise_aug: Annotated[float, typer.Option(min=0, help="Noise added to the first frame.")] = 0.02,
    guidance_min: Annotated[float, typer.Option(help="Guidance scale of the first frame.")] = 1.0,
    guidance_max: Annotated[float, typer.Option(help="Guidance scale of the last frame.")] = 3.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all noise.")] = 0,
    height: Annotated[
        int | None, typer.Option(min=1, help="Pixels [default: the model's area, the image's shape]")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; give both or neither.")] = None,
    image_model: OtherImageModel = None,
    image_encoder: ImageEncoder = None,
    prediction: Prediction = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    little_memory: LittleMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Animate IMAGE with the model in PATH. Its networks take turns on the GPU."""
    wanted = [Weighted.parse(text) for text in adapter or ()]
    check_output(overwrite, (".mp4",), output, output.with_suffix(".png"))
    if (height is None) != (width is None):
        raise ConfigError("--height and --width: give both or neither")
    from inflate.data.video import read_image

    first = read_image(image)
    from inflate.sampling.svd import Sampling

    given = {"image_model": image_model, "image_encoder": image_encoder, "prediction": prediction}
    family = _load(path, frames=frames, **given)
    _adapt(family, wanted, any_base, dtype)
    size = (height, width) if height and width else _fitting(first.shape[0], first.shape[1], family)
    settings = Sampling(
        steps=steps,
        guidance_min=guidance_min,
        guidance_max=guidance_max,
        fps=family.fps if fps is None else fps,
        motion_bucket=motion_bucket,
        noise_aug=noise_aug,
        frames=frames,
        seed=seed,
        little_memory=little_memory,
    )
    _write(output, _animate(family, read_image(image, size), settings), settings.fps)


@sampling_app.command()
@report_errors()
def generate(
    path: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the clip shows.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The video, .mp4; a contact sheet lies beside it.")],
    negative: Annotated[str, typer.Option(help="A prompt that guidance leads away from.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; up to 1 there is none, at half the cost.")] = 7.5,
    sampler: Annotated[str, typer.Option(help="ddim, or euler.")] = "ddim",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    grid: Annotated[int, typer.Option(min=1, help="Clips side by side, of this seed and the next ones.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the clip [default: the model's]")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second of the file [default: the model's clips']")
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels [default: the model's]")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Clips of a grid drawn together [default: 16 frames of 512x512 in all]")
    ] = None,
    image_model: OtherImageModel = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    tokenizer: Tokenizer = None,
    prediction: Prediction = None,
    dtype: Dtype = None,
    little_memory: LittleMemory = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")] = False,
) -> None:
    """Draw a clip of PROMPT with the text-to-video model in PATH. Its networks take turns on the GPU."""
    wanted = [Weighted.parse(text) for text in adapter or ()]
    check_output(overwrite, (".mp4",), output, output.with_suffix(".png"))
    if sampler not in ("ddim", "euler"):
        raise ConfigError(f"--sampler {sampler}: must be ddim or euler")
    from inflate.data.pixels import tiled
    from inflate.families.video_ldm import VideoLDM
    from inflate.sampling.text_to_video import Sampling

    family = VideoLDM.load(path, image_model, tokenizer, prediction)
    _note_image_model(path)
    _note_unknown_words(family, prompt, negative)
    _adapt(family, wanted, any_base, dtype)
    settings = Sampling(
        steps=steps,
        guidance=guidance,
        negative=negative,
        sampler="euler" if sampler == "euler" else "ddim",
        frames=frames,
        height=height,
        width=width,
        batch=batch,
        little_memory=little_memory,
    )
    clips = _draw(family, [prompt], range(seed, seed + grid), settings)
    _write(output, tiled(clips), family.clips.fps if fps is None else fps, clips)


@sampling_app.command("compare")
@report_errors()
def compare_adapters(
    path: ModelPath,
    inputs: Annotated[
        list[str], typer.Argument(metavar="IMAGE|PROMPT...", help="First frames (files), or prompts; a row for each.")
    ],
    adapter: Annotated[
        list[str],
        typer.Option(
            "--adapter", metavar="NAME[:WEIGHT]", help="A column; may be repeated. A:0.8+B:0.5 are two at once."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="A new folder for the grid.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise, the same in every column.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Rows of each input: of this seed and the next ones.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps [default: sample's, or generate's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the clips [default: the model's]")] = None,
    any_base: AnyBase = False,
) -> None:
    """Draw the same inputs and seeds under several adapters or strengths, the base first: a video, a sheet, a page."""
    from inflate import comparison

    wanted = comparison.columns(adapter)
    if output.exists():
        raise DataError(f"{output} exists already; choose another name")
    every = range(seed, seed + seeds)
    family, clips, fps = (_animations if _are_images(inputs) else _drawings)(path, inputs, every, steps, frames)
    drawn = comparison.draw(family.unet, wanted, clips, any_base)
    rows = [f"{Path(one).name}, seed {each}" for one in inputs for each in every]
    comparison.write(output, drawn, rows, fps, f"{path}: {', '.join(drawn)}")
    for name in (comparison.GRID, comparison.SHEET, comparison.PAGE):
        typer.echo(f"wrote {output / name}")


def _are_images(inputs: list[str]) -> bool:
    """Return whether these are first frames; ConfigError for first frames among prompts."""
    from inflate.data.video import is_image

    found = [one for one in inputs if is_image(one)]
    if found and len(found) < len(inputs):
        raise ConfigError(f"{found[0]} is an image and others are prompts: compare either")
    return bool(found)


def _animations(
    path: str, images: list[str], seeds: "Sequence[int]", steps: int | None, frames: int | None
) -> "tuple[SVD, Callable[[], list[npt.NDArray[np.uint8]]], float]":
    """Return the model in `path`, what animates each image with each seed, and the rate; all as large as the first."""
    from inflate.data.video import read_image
    from inflate.sampling.svd import Sampling

    first = read_image(images[0]).shape
    family = _load(path, frames=frames)
    size = _fitting(first[0], first[1], family)
    shown = [read_image(image, size) for image in images]
    settings = Sampling(steps=steps or Sampling.steps, fps=family.fps, frames=frames)
    pairs = [(image, replace(settings, seed=seed)) for image in shown for seed in seeds]
    return family, lambda: [_animate(family, image, each) for image, each in pairs], family.fps


def _drawings(
    path: str, prompts: list[str], seeds: "Sequence[int]", steps: int | None, frames: int | None
) -> "tuple[VideoLDM, Callable[[], list[npt.NDArray[np.uint8]]], float]":
    """Return the model in `path`, what draws each prompt with each seed, and the rate."""
    from inflate.families.video_ldm import VideoLDM
    from inflate.sampling.text_to_video import Sampling

    family = VideoLDM.load(path)
    _note_image_model(path)
    _note_unknown_words(family, *prompts)
    settings = Sampling(steps=steps or Sampling.steps, frames=frames)
    return family, lambda: _draw(family, prompts, seeds, settings), family.clips.fps


def _load(path: str, frames: int | None = None, **given: Any) -> "SVD":
    """Return the family in `path`, as `SVD.load` does, inflated if it is an image model.

    A folder's clip length stays: so many of a sample's frames, however long it is, are decoded together.
    """
    from inflate.families.svd import SVD
    from inflate.models.folders import SAFETENSORS

    _note_image_model(path)
    return SVD.load(path, frames=frames if path.endswith(SAFETENSORS) else None, **given)


def _adapt(family: "SVD | VideoLDM", wanted: list[Weighted], any_base: bool, dtype: "Precision | None") -> None:
    """Merge adapters into the UNet, and then round all weights, for as long as this command runs."""
    if wanted:
        from inflate.adapters.merge import merge_files

        merge_files(family.unet, wanted, any_base)
    if dtype is not None:
        from inflate.models.precision import cast

        cast(family.parts.values(), dtype)


def _note_image_model(path: str) -> None:
    """Say what a freshly inflated model cannot do yet."""
    from diffusers import UNet2DConditionModel

    from inflate.models import folders, single_file

    file = Path(path).expanduser() if path.endswith(folders.SAFETENSORS) else None
    if single_file.is_single_image_model(file) if file else folders.holds(path, UNet2DConditionModel):
        typer.echo(f"note: {path} is an image model: freshly inflated, its frames know nothing of each other", err=True)


def _note_unknown_words(family: "VideoLDM", *prompts: str) -> None:
    """Say which words the text encoder's vocabulary lacks."""
    unknown = family.text.unknown_words(" ".join(prompts))
    if unknown:
        typer.echo(f"note: the model's text encoder does not know: {', '.join(unknown)}", err=True)


def _device() -> "torch.device":
    """Return the GPU, if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _fitting(height: int, width: int, family: "SVD") -> tuple[int, int]:
    """Return (height, width) with the image's shape and about the area that the model was made for, in whole blocks."""
    factor = 2 ** (len(family.vae.config.block_out_channels) - 1)
    block = factor * 2 ** (len(family.unet.config.block_out_channels) - 1)
    if family.height and family.width:
        area = family.height * family.width
    else:
        latent = family.unet.config.sample_size
        sides = (latent, latent) if isinstance(latent, int) else latent
        area = factor**2 * sides[0] * sides[1]
    scale = (area / (height * width)) ** 0.5
    return max(1, round(height * scale / block)) * block, max(1, round(width * scale / block)) * block


def _animate(family: "SVD", first: "npt.NDArray[np.uint8]", settings: "Sampling") -> "npt.NDArray[np.uint8]":
    """Return frames (F, H, W, 3) from the first one (H, W, 3), showing the progress."""
    import torch
    from tqdm import tqdm

    from inflate.data.pixels import to_uint8, unit
    from inflate.sampling.svd import sample as draw

    image = torch.tensor(first).permute(2, 0, 1)[None].to(_device()) / 127.5 - 1  # (1, 3, H, W)
    clip = draw(family, image, settings, progress=lambda steps: tqdm(steps, desc="sampling", unit="step"))[0]
    return to_uint8(unit(clip))  # (F, H, W, 3)


def _draw(
    family: "VideoLDM", prompts: "Sequence[str]", seeds: "Sequence[int]", settings: "TextSampling"
) -> "list[npt.NDArray[np.uint8]]":
    """Return a clip (F, H, W, 3) of each prompt with each seed, showing the progress."""
    from tqdm import tqdm

    from inflate.data.pixels import to_uint8, unit
    from inflate.sampling.text_to_video import sample as draw

    named, drawn = [one for one in prompts for _ in seeds], [*seeds] * len(prompts)
    clips = draw(family, named, drawn, settings, lambda steps: tqdm(steps, desc="sampling", unit="step"), _device())
    return [to_uint8(unit(clip)) for clip in clips]  # (F, H, W, 3)


def _write(
    output: Path, frames: "npt.NDArray[np.uint8]", fps: float, rows: "Sequence[npt.NDArray[np.uint8]] | None" = None
) -> None:
    """Write the video, and a contact sheet of it or of the clips that it is made of."""
    from inflate.data.video import contact_sheet, write

    for file in (write(output, frames, fps), contact_sheet(output.with_suffix(".png"), rows or [frames])):
        typer.echo(f"wrote {file}")
