"""Refinement of clips and of videos of any length: read, refined and written part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from inflate.animation import Pixels, Size, asked_of, device, fitting, in_pixels, progress, unknown_words
from inflate.data import video
from inflate.data.pixels import to_float
from inflate.data.video import Probe
from inflate.errors import CheckpointError, DataError
from inflate.families import i2vgen_xl_refiner, video_ldm
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.files import new_files
from inflate.models import folders
from inflate.models.visits import visiting
from inflate.sampling.colours import recoloured
from inflate.sampling.refinement import (
    PUBLISHED,
    Refinement,
    check_size,
    decoded,
    encoded,
    enlarged,
    fitted,
    refine_latents,
)

SHOWN = 8
"""Frames of a video in its contact sheet."""
TOGETHER = 16
"""Frames of a video that are read at once."""


def check_model(path: str) -> None:
    """Raise CheckpointError, naming the right command, for a model that is not of refinement."""
    family = folders.family_of(path)
    if family == i2vgen_xl_refiner.FAMILY:
        return
    kind = f"is of {family}" if family else "says no family, as an image model's folder does"
    own = "generate" if family == video_ldm.FAMILY else "sample"
    remedy = f"inflate {own} draws with it" if family else "inflate it and train it for refinement"
    raise CheckpointError(f"{path} {kind} and refines no clips, as {i2vgen_xl_refiner.FAMILY} does; {remedy}")


@dataclass(frozen=True)
class Refining:
    """A refinement model with the settings of its clips."""

    path: str
    family: Refiner
    settings: Refinement

    @classmethod
    def load(cls, path: str, given: Mapping[str, Any]) -> Self:
        """The model in `path`, with the options that were given over those published, by their names.

        CheckpointError for a model of another kind, ConfigError for what it cannot do.
        """
        check_model(path)
        usual = PUBLISHED[given.get("start", "noise")]
        settings = replace(usual, **asked_of(Refinement, given))
        family = Refiner.load(path)
        settings.solver(family)
        settings.windows(family)
        return cls(path, family, settings)

    def size(self, height: int, width: int) -> Size:
        """The shape of clips of a size at about the area that the model was trained at."""
        own = self.family.size
        return fitting(height, width, own[0] * own[1], self.family.factor)

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """Unknown words of prompts, and noise of levels that it was not trained on."""
        solver, trained = self.settings.solver(self.family), self.family.clips.levels
        beyond = [] if solver is None or solver.levels <= trained else [
            f"{self.path} was trained on {trained} noise levels, and {solver.levels} are drawn anew: --strength "
            f"{trained * self.settings.strength / solver.levels:.3g} keeps to them"
        ]  # fmt: skip
        return beyond + unknown_words(self.family.text, [*prompts, self.settings.negative or ""])

    def draw(self, parts: Iterable[Pixels], prompt: str, seed: int, size: Size) -> Iterator[Pixels]:
        """The refined frames (f, H, W, 3), a few at a time, of a clip (F, h, w, 3) that comes in parts."""
        check_size(self.family, size)
        family, place, levels = self.family, device(), self.settings.keep_colours
        kept, latents = list[Pixels](), list[Tensor]()  # the frames for their colours' sake, at their own size
        with visiting([family.vae], place):
            for part in parts:
                latents.append(encoded(family, torch.from_numpy(to_float(part)), size, place))
                kept += list(part) if levels else []
        refined = refine_latents(
            family, torch.cat(latents), prompt, seed, self.settings, partial(progress, doing="refining")
        )
        before = (torch.from_numpy(to_float(frame[None]))[0] for frame in kept)
        for frames in recoloured(decoded(family, refined, size), enlarged(before, size), levels):
            yield in_pixels(frames)

    def write(self, file: Path, found: Probe, prompt: str, seed: int, size: Size, output: Path) -> None:
        """Refine a video, and write it at its rate with a contact sheet of before and after: both or neither."""
        numbers = [int(number) for number in np.linspace(0, found.frames - 1, min(SHOWN, found.frames)).round()]
        before, after = list[Pixels](), list[Pixels]()
        parts = _keeping(video.walk(file, TOGETHER), numbers, before)
        refined = _keeping(self.draw(parts, prompt, seed, size), numbers, after)
        try:
            with new_files(output.parent, output.name) as aside:
                video.write_parts(aside / output.name, refined, found.fps)
                larger = in_pixels(fitted(torch.from_numpy(to_float(np.stack(before))), size))
                rows = [larger, np.stack(after)]
                video.contact_sheet(aside / output.with_suffix(".png").name, rows, ["before", "after"], SHOWN)
        except OSError as error:
            raise DataError(f"{output} cannot be written: {error}") from error


def probe(file: Path) -> Probe:
    """What a video holds; DataError, naming it, for a still and for what cannot be decoded."""
    if video.is_image(file):
        raise DataError(f"{file} is an image, and videos are refined: animate it by inflate sample MODEL {file}")
    return video.probe(file)


def _keeping(parts: Iterable[Pixels], numbers: Sequence[int], kept: list[Pixels]) -> Iterator[Pixels]:
    """The parts as they come, the frames of those numbers being kept."""
    begin = 0
    for part in parts:
        kept.extend(part[number - begin] for number in numbers if begin <= number < begin + len(part))
        yield part
        begin += len(part)
