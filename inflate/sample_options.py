"""The options of `inflate sample`, for what all families take and for what some do."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from inflate.options import MOST_SEED, REFINEMENT

SVD_ALONE, DYNAMICRAFTER_ALONE, PROMPTED = "Stable Video Diffusion", "DynamiCrafter", "DynamiCrafter and I2VGen-XL"
REFINED = "Refinement, by a second model"
"""Panels of options that not every family has, and of what comes after the drawing."""


def _of_svd(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=SVD_ALONE, **limits)


def _of_dynamicrafter(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=DYNAMICRAFTER_ALONE, **limits)


def _of_prompted(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=PROMPTED, **limits)


def _of_refined(text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=REFINED, **limits)


Output = Annotated[Path, typer.Option("-o", "--output", help="The video, .mp4; a contact sheet lies beside it.")]
Image = Annotated[
    Path | None, typer.Argument(metavar="IMAGE", help="The first frame; a story names its own.", show_default=False)
]
Story = Annotated[
    Path | None,
    typer.Option(help="YAML or JSON list of shots to join, each {image: FILE or previous: true, prompt: TEXT}."),
]
Frames = Annotated[
    int | None, typer.Option(min=1, help="Length of a clip [default: the model's, 14 where a file tells none]")
]
Fps = Annotated[float | None, typer.Option(help="Frames per second, as the model is told [default: its own]")]
PlayFps = Annotated[float | None, typer.Option(help="Those of the video, where they are to be others.")]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps [default: SVD 25, DynamiCrafter 50, I2VGen-XL 50]")
]
Start = Annotated[
    float | None,
    typer.Option(help="Begin lower, for more motion. SVD: a noise level below 700; others: a timestep below 999"),
]
Seed = Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all noise; each shot of a story has the next.")]
Grid = Annotated[int, typer.Option(min=1, help="Clips side by side, of this seed and the next ones.")]
Height = Annotated[
    int | None, typer.Option(min=1, help="Pixels [default: SVD's area in the image's shape; the others' own]")
]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels; give both or neither.")]
Prompt = Annotated[list[str] | None, _of_prompted("What happens; may be repeated: a row each.")]
Negative = Annotated[
    str | None,
    _of_prompted("A prompt that guidance leads away from [default: the model's]", "--negative", "--negative-prompt"),
]
EndImage = Annotated[Path | None, _of_dynamicrafter("The last frame.")]
Loop = Annotated[bool, _of_dynamicrafter("End on the first frame, which is shown once.", "--loop")]
Stride = Annotated[
    float | None, _of_dynamicrafter("What a model is told in place of frames per second [default: its own]", min=1)
]
Eta = Annotated[
    float | None,
    _of_prompted("Noise of each step: 0 for none, up to 1 [default: DynamiCrafter 1, I2VGen-XL 0]", min=0, max=1),
]
Guidance = Annotated[
    float | None,
    _of_prompted("Guidance scale; up to 1 there is none [default: DynamiCrafter 7.5, I2VGen-XL 9]"),
]
ImageGuidance = Annotated[float | None, _of_dynamicrafter("That of the image, for a pass more [default: one for both]")]
Rescale = Annotated[
    float | None,
    _of_prompted("Share of its overexposure that is undone [default: DynamiCrafter's own, I2VGen-XL 0]", min=0, max=1),
]
MotionBucket = Annotated[float | None, _of_svd("Amount of motion [default: 127]", min=0, max=255)]
NoiseAug = Annotated[float | None, _of_svd("Noise added to the first frame [default: 0.02]", min=0)]
GuidanceMin = Annotated[float | None, _of_svd("Guidance scale of the first frame [default: 1]")]
GuidanceMax = Annotated[float | None, _of_svd("Guidance scale of the last frame [default: 3]")]
Refine = Annotated[
    str | None,
    _of_refined("A refinement model, which draws the clips anew, larger; they stay beside as NAME-base.mp4."),
]
Strength = Annotated[float | None, _of_refined(REFINEMENT["strength"], min=0, max=1)]
KeepColours = Annotated[int | None, _of_refined(REFINEMENT["keep_colours"], min=0, max=10)]
RefineStart = Annotated[Literal["noise", "inversion"] | None, _of_refined(REFINEMENT["start"] + " [default: noise]")]
RefineSteps = Annotated[int | None, _of_refined(REFINEMENT["steps"], min=1)]
RefineGuidance = Annotated[float | None, _of_refined(REFINEMENT["guidance"])]
RefineHeight = Annotated[
    int | None, _of_refined("Pixels [default: the refinement model's area in the clips' shape]", min=1)
]
RefineWidth = Annotated[int | None, _of_refined("Pixels; give both or neither.", min=1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
