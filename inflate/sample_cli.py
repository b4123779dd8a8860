"""The commands that draw clips. Each imports what it needs when it runs, so that --help answers at once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inflate import sample_options as of
from inflate.adapters.settings import Weighted
from inflate.drawing import (
    Adapters,
    Dtype,
    LittleMemory,
    OtherImageModel,
    adapt,
    note,
    note_image_model,
    refuse_unguided,
    write,
)
from inflate.errors import CheckpointError, ConfigError, DataError, report_errors
from inflate.options import (
    MOST_SEED,
    AnyBase,
    ImageEncoder,
    ModelPath,
    Prediction,
    Tokenizer,
    both,
    check_output,
    check_rates,
    chosen,
    keep_inputs,
    option,
)

if TYPE_CHECKING:
    from inflate.animation import Animator, Pixels, Size
    from inflate.families.svd import SVD
    from inflate.families.video_ldm import VideoLDM
    from inflate.models.precision import Precision
    from inflate.models.stable_diffusion import TextToVideo
    from inflate.sampling.text_to_video import Sampling as TextSampling
    from inflate.shooting import Shooting
    from inflate.story import Shot

    Draws = tuple[SVD | TextToVideo, Callable[[], list[Pixels]], list[str], float]
    """A model, what draws clips with it, the names of these, and their frames per second."""

sampling_app = typer.Typer()

LEAST_FRAMES = {"story": 2, "end_image": 2, "loop": 3}
"""How long clips must be for options that show a frame of them once, or fix both ends."""


@sampling_app.command()
@report_errors()
def sample(
    path: ModelPath,
    output: of.Output,
    image: of.Image = None,
    story: of.Story = None,
    frames: of.Frames = None,
    fps: of.Fps = None,
    play_fps: of.PlayFps = None,
    steps: of.Steps = None,
    start: of.Start = None,
    seed: of.Seed = 0,
    grid: of.Grid = 1,
    height: of.Height = None,
    width: of.Width = None,
    prompt: of.Prompt = None,
    negative: of.Negative = None,
    end_image: of.EndImage = None,
    loop: of.Loop = False,
    stride: of.Stride = None,
    eta: of.Eta = None,
    guidance: of.Guidance = None,
    image_guidance: of.ImageGuidance = None,
    rescale: of.Rescale = None,
    motion_bucket: of.MotionBucket = None,
    noise_aug: of.NoiseAug = None,
    guidance_min: of.GuidanceMin = None,
    guidance_max: of.GuidanceMax = None,
    refine: of.Refine = None,
    strength: of.Strength = None,
    keep_colours: of.KeepColours = None,
    refine_start: of.RefineStart = None,
    refine_steps: of.RefineSteps = None,
    refine_guidance: of.RefineGuidance = None,
    refine_height: of.RefineHeight = None,
    refine_width: of.RefineWidth = None,
    image_model: OtherImageModel = None,
    image_encoder: ImageEncoder = None,
    prediction: Prediction = None,
    adapter: Adapters = None,
    any_base: AnyBase = False,
    dtype: Dtype = None,
    little_memory: LittleMemory = None,
    overwrite: of.Overwrite = False,
) -> None:
    """Animate IMAGE, or the shots of a story, with the model in PATH. Its networks take turns on the GPU.

    Ctrl-C while a story is drawn writes the shots that are whole.
    """
    wanted = [Weighted.parse(text) for text in adapter or ()]
    files = output, *_beside(output, story, refine)
    check_output(overwrite, (".mp4",), *files)
    size, refined = both(height=height, width=width), both(refine_height=refine_height, refine_width=refine_width)
    wished = chosen(
        strength=strength, keep_colours=keep_colours, refine_start=refine_start, refine_steps=refine_steps,
        refine_guidance=refine_guidance,
    )  # fmt: skip
    _check_refined(refine, story, [*wished, *chosen(refine_height=refine_height)])
    long = {"story": story, "end_image": end_image, "loop": loop}
    shot = chosen(prompt=prompt or None, end_image=end_image, loop=loop or None)
    given = shot | chosen(
        frames=frames, fps=fps, steps=steps, start=start, negative=negative, stride=stride, eta=eta, guidance=guidance,
        image_guidance=image_guidance, rescale=rescale, motion_bucket=motion_bucket, noise_aug=noise_aug,
        guidance_min=guidance_min, guidance_max=guidance_max, image_model=image_model, image_encoder=image_encoder,
        prediction=prediction, little_memory=little_memory,
    )  # fmt: skip
    check_rates(fps=fps, play_fps=play_fps)
    if image_guidance is None:
        refuse_unguided(guidance, negative=negative, rescale=rescale)
    _check_length(frames, **long)
    shots = _told(story, seed, image, grid, shot) if story else _asked(image, range(seed, seed + grid), **shot)
    from inflate import refining, shooting

    sizes = shooting.sizes_of(shots, story)
    keep_inputs(sizes, *files)
    drawn = shots
    if refine:
        refining.check_model(refine)
        given, drawn = _of_base(path, given, shots)
    animator = _animator(path, given, drawn, story, long)
    adapt(animator.family, wanted, any_base, dtype)
    rate = animator.fps if play_fps is None else play_fps
    taken = shooting.Shooting.at(size or animator.size(*next(iter(sizes.values()))), drawn, sizes, note)
    if story:
        _write_story(output, taken, animator, rate)
        return
    clips = [clip[:-1] if loop else clip for clip in taken.together(animator)]
    if refine:
        _write_grid(_base_of(output), shots, clips, grid, rate)
        del animator, taken  # the refinement model takes their place
        wished |= chosen(negative=negative, little_memory=little_memory)
        clips = _refined(refine, wished, refined, shots, clips, dtype)
    _write_grid(output, shots, clips, grid, rate)


def _of_base(path: str, given: dict[str, Any], shots: "list[Shot]") -> "tuple[dict[str, Any], list[Shot]]":
    """Return the options and shots of what is to be refined: without prompts, where its model is told none."""
    from inflate.animation import takes_prompts

    if takes_prompts(path):
        return given, shots
    kept = {name: value for name, value in given.items() if name not in ("prompt", "negative")}
    return kept, [replace(shot, prompt="") for shot in shots]


def _base_of(output: Path) -> Path:
    """Return where the clips lie that a refinement begins from."""
    return output.with_stem(f"{output.stem}-base")


def _beside(output: Path, story: Path | None, refine: str | None) -> list[Path]:
    """Return the files that go with a video: its contact sheet, of a story its page, of a refinement what it is of."""
    base = [_base_of(output)] if refine else []
    pages = [output.with_suffix(".html")] if story else []
    return [*base, *(file.with_suffix(".png") for file in (output, *base)), *pages]


def _check_refined(refine: str | None, story: Path | None, names: "Sequence[str]") -> None:
    """Raise ConfigError for options of a refinement where there is none, and for a story that is to be refined."""
    if names and not refine:
        raise ConfigError(f"{option(names[0])} is of a refinement: name its model by --refine")
    if refine and story:
        raise ConfigError("--refine is not for a story: draw it, then refine the video: inflate refine VIDEO")


def _animator(
    path: str, given: dict[str, Any], shots: "Sequence[Shot]", story: Path | None, long: dict[str, Any]
) -> "Animator":
    """Return what animates shots by the options that are given; ConfigError where it cannot."""
    from inflate import animation, shooting

    kind = animation.kind_of(path, given)
    if story:
        shooting.refuse_keys(shots, story, kind, path)
    note_image_model(path)
    animator = kind.load(path, given)
    _check_length(animator.frames, **long)
    prompts, negative = [shot.prompt for shot in shots], given.get("negative", "")
    found = animator.notes([*prompts, negative], any(shot.end_image for shot in shots))
    note(*found, *animation.unprompted(path, prompts))
    return animator


def _refined(
    path: str,
    given: dict[str, Any],
    size: "Size | None",
    shots: "Sequence[Shot]",
    clips: "Sequence[Pixels]",
    dtype: "Precision | None",
) -> "list[Pixels]":
    """Return the clips (F, H, W, 3), drawn anew by their prompts with the refinement model in a path."""
    import numpy as np

    from inflate.refining import Refining

    refining = Refining.load(path, {name.removeprefix("refine_"): value for name, value in given.items()})
    note(*refining.notes([shot.prompt for shot in shots]))
    adapt(refining.family, [], any_base=False, dtype=dtype)
    size = size or refining.size(*clips[0].shape[1:3])
    drawn = [refining.draw([clip], shot.prompt, shot.seed or 0, size) for clip, shot in zip(clips, shots, strict=True)]
    return [np.concatenate(list(parts)) for parts in drawn]


def _check_length(frames: int | None, **asked: Any) -> None:
    """Raise ConfigError where clips of so many frames are too short for an option that is given."""
    for name, value in asked.items():
        if value and frames is not None and frames < LEAST_FRAMES[name]:
            raise ConfigError(f"{option(name)} needs --frames of {LEAST_FRAMES[name]} or more, not {frames}")


def _told(file: Path, seed: int, image: Path | None, grid: int, shot: dict[str, Any]) -> "list[Shot]":
    """Return the shots of a story; ConfigError for what was given of a single shot."""
    from inflate import story

    single = ["IMAGE"] * (image is not None) + [option(name) for name in shot] + ["--grid"] * (grid > 1)
    if single:
        raise ConfigError(f"{single[0]} is not for a story, whose shots have their own: leave it out")
    return story.read(file, seed)


def _asked(
    image: Path | None,
    seeds: "Sequence[int]",
    prompt: "Sequence[str]" = ("",),
    end_image: Path | None = None,
    loop: bool = False,
) -> "list[Shot]":
    """Return a shot for each prompt and seed."""
    from inflate.story import Shot

    if image is None:
        raise ConfigError("name IMAGE, the first frame, or a story by --story")
    if loop and end_image is not None:
        raise ConfigError("--loop ends on the first frame and --end-image on another: give one of them")
    end = image if loop else end_image
    return [Shot(image, prompt=each, seed=seed, end_image=end) for each in prompt for seed in seeds]


def _write_grid(output: Path, shots: "Sequence[Shot]", clips: "Sequence[Pixels]", grid: int, fps: float) -> None:
    """Write clips side by side, those of each prompt in a row where there are several."""
    from inflate.data.pixels import tiled

    rows = len(clips) // grid
    labels = [f"{shot.label}, seed {shot.seed}" for shot in shots] if len(clips) > 1 else None
    write(output, tiled(clips, grid if rows > 1 else None), fps, clips, labels)


def _write_story(output: Path, taken: "Shooting", animator: "Animator", fps: float) -> None:
    """Draw the shots; write the video, its sheet and its page, where Ctrl-C stops it of the shots that are whole."""
    clips: list[Pixels] = []
    stopped = False
    try:
        for clip in taken.in_turn(animator, lambda text: typer.echo(text, err=True)):
            clips.append(clip)
    except KeyboardInterrupt:
        stopped = True
    if clips:
        _write_shots(output, taken.shots, clips, fps)
    if stopped:
        kept = f", which {output} shows" if clips else ""
        raise KeyboardInterrupt(f"interrupted after {len(clips)} of {len(taken.shots)} shots{kept}")


def _write_shots(output: Path, shots: "Sequence[Shot]", clips: "Sequence[Pixels]", fps: float) -> None:
    import numpy as np

    from inflate import story

    parts = story.shown(shots, clips)
    labels = [f"{number}: {shot.label}" for number, shot in enumerate(shots[: len(parts)], 1)]
    page = story.page(output.name, shots, parts, fps)
    write(output, np.concatenate(parts), fps, parts, labels, page, story.columns(parts))


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
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the noise.")] = 0,
    grid: Annotated[int, typer.Option(min=1, help="Clips side by side, of this seed and the next ones.")] = 1,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the clip [default: the model's]")] = None,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second, which some models are told [default: the model's clips']")
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
    check_rates(fps=fps)
    refuse_unguided(guidance, negative=negative)
    from inflate.animation import unknown_words
    from inflate.data.pixels import tiled
    from inflate.sampling.text_to_video import Sampling

    given = chosen(
        steps=steps, guidance=guidance, negative=negative, sampler=sampler, frames=frames, height=height, width=width,
        batch=batch, little_memory=little_memory,
    )  # fmt: skip
    settings = Sampling(**given)
    family = _text_to_video(path, image_model, tokenizer, prediction)
    note_image_model(path)
    note(*unknown_words(family.text, [prompt, negative]))
    adapt(family, wanted, any_base, dtype)
    if fps is not None:
        own = family.clips
        family.clips = replace(own, fps=fps) if own.number is None else replace(own, number=fps)
    clips = _draw(family, [prompt], range(seed, seed + grid), settings)
    write(output, tiled(clips), family.clips.fps, clips)


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
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the noise, the same in every column.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Rows of each input: of this seed and the next ones.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps [default: sample's, or generate's]")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Length of the clips [default: the model's]")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What happens in the images, for a model that is told; a row for each.")
    ] = None,
    any_base: AnyBase = False,
) -> None:
    """Draw the same inputs and seeds under several adapters or strengths, the base first: a video, a sheet, a page."""
    from inflate import comparison

    wanted = comparison.columns(adapter)
    if output.exists():
        raise DataError(f"{output} exists already; choose another name")
    given = chosen(steps=steps, frames=frames, prompt=prompt or None)
    draws = _animations if _are_images(inputs) else _drawings
    family, clips, rows, fps = draws(path, inputs, range(seed, seed + seeds), given)
    drawn = comparison.draw(family.unet, wanted, clips, any_base)
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


def _animations(path: str, images: list[str], seeds: "Sequence[int]", given: dict[str, Any]) -> "Draws":
    """Return what animates each image by each prompt with each seed; all as large as the first."""
    from inflate import animation, shooting

    prompts = given.get("prompt", ("",))
    shots = [shot for image in images for shot in _asked(Path(image), seeds, prompts)]
    sizes = shooting.sizes_of(shots)
    note_image_model(path)
    animator = animation.kind_of(path, given).load(path, given)
    note(*animator.notes(prompts, ends=False), *animation.unprompted(path, prompts))
    taken = shooting.Shooting.at(animator.size(*sizes[Path(images[0])]), shots, sizes, note)
    rows = [
        ", ".join(filter(None, (shot.image.name, shot.prompt, f"seed {shot.seed}"))) for shot in shots if shot.image
    ]
    return animator.family, lambda: taken.together(animator), rows, animator.fps


def _drawings(path: str, prompts: list[str], seeds: "Sequence[int]", given: dict[str, Any]) -> "Draws":
    """Return what draws each prompt with each seed."""
    from inflate.animation import unknown_words
    from inflate.sampling.text_to_video import Sampling

    if "prompt" in given:
        raise ConfigError("--prompt is for images; these are prompts already: leave it out")
    family = _text_to_video(path)
    note_image_model(path)
    note(*unknown_words(family.text, prompts))
    settings = Sampling(**given)
    rows = [f"{prompt}, seed {seed}" for prompt in prompts for seed in seeds]
    return family, lambda: _draw(family, prompts, seeds, settings), rows, family.clips.fps


def _text_to_video(path: str, *given: Any) -> "VideoLDM":
    """Return the model in `path`, as `VideoLDM.load` does; CheckpointError for one that animates images."""
    from inflate.animation import KINDS, refuse_refiner
    from inflate.families.video_ldm import VideoLDM
    from inflate.models import folders

    family = folders.family_of(path)
    if family in KINDS:
        raise CheckpointError(f"{path} is of {family}, which animates images: inflate sample {path} IMAGE -o out.mp4")
    refuse_refiner(path, family)
    return VideoLDM.load(path, *given)


def _draw(
    family: "VideoLDM", prompts: "Sequence[str]", seeds: "Sequence[int]", settings: "TextSampling"
) -> "list[Pixels]":
    """Return a clip (F, H, W, 3) of each prompt with each seed, showing the progress."""
    from inflate.animation import device, in_pixels, progress
    from inflate.sampling.text_to_video import sample as draw

    named, drawn = [one for one in prompts for _ in seeds], [*seeds] * len(prompts)
    return [in_pixels(clip) for clip in draw(family, named, drawn, settings, progress, device())]
