"""What previews write: samples below their truth, how close they come to it, and two previews against each other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from inflate.data import video
from inflate.data.pixels import to_uint8, unit
from inflate.metrics.video import flicker_error, power_spectrum, psnr, sharpness, ssim
from inflate.training.held_out import size_of
from inflate.training.player import Batch

Pixels = npt.NDArray[np.uint8]
Drawn = tuple[list[int], Mapping[str, Tensor], dict[str, float]]
"""Of the shown clips that have one size: their places, clips by name (`write_rows`), and what is measured of them."""
SHOWN = 4
"""Videos side by side."""
LEAST_HEIGHT = 192
"""Smaller videos are enlarged by a whole factor, so that a person sees their pixels."""


def write_drawn(folder: Path, shown: Sequence[Batch], drawn: Iterable[Drawn]) -> None:
    """Write what is drawn of the shown clips (`write_rows`), and scores.json, the mean of what is measured of each."""
    found = []
    for places, clips, measured in drawn:
        write_rows(folder, shown, places, clips)
        found += [measured] * len(places)
    write_scores(folder, found)


def write_rows(folder: Path, shown: Sequence[Batch], places: list[int], clips: Mapping[str, Tensor]) -> None:
    """Write samples (N, F, 3, H, W) of those of the shown clips that have one size as mp4 files, and a contact sheet.

    Each is named by its place. `clips` are the samples, last, and by name what stands above them in the sheet: their
    truth. Of images there is the sheet alone.
    """
    *_, samples = clips.values()
    rows, labels = [], []
    for number, place in enumerate(places):
        name = f"{place:02d}"
        if samples.shape[1] > 1:
            video.write(folder / f"{name}.mp4", to_uint8(unit(samples[number])), float(shown[place]["fps"][0]))
        rows += [to_uint8(unit(each[number])) for each in clips.values()]
        labels += [f"{name} {what}" for what in clips]
    video.contact_sheet(folder / sheet_name(shown, places), rows, labels)


def sheet_name(shown: Sequence[Batch], places: list[int]) -> str:
    """The file of the contact sheet of those of the shown clips that have one size."""
    size = "x".join(map(str, size_of(shown[places[0]])))
    return "sheet.png" if len(places) == len(shown) else f"sheet-{size}.png"


def scores(truth: Tensor, generated: Tensor, given: Tensor) -> dict[str, float]:
    """How close samples come to their clips, all (N, F, 3, H, W) in [-1, 1]: PSNR in dB, flicker error in [0, 1] units.

    `given` are the clips as the autoencoder has them. Means over clips.
    """
    truth, generated, given = unit(truth), unit(generated), unit(given)
    static, held = truth[:, :1].expand_as(truth), generated[:, :1].expand_as(generated)
    first, near = slice(0, 1), slice(1, 4)
    found = {
        "frame 0, sample": psnr(generated[:, first], truth[:, first]),
        "frame 0, autoencoder": psnr(given[:, first], truth[:, first]),
    }
    if truth.shape[1] > 1:
        found |= {
            "frames 1-3, sample": psnr(generated[:, near], truth[:, near]),
            "frames 1-3, sample held still": psnr(held[:, near], truth[:, near]),
            "frames 1-3, static copy": psnr(static[:, near], truth[:, near]),
            "flicker error, sample": flicker_error(generated, truth),
        }
    return {name: float(value.mean()) for name, value in found.items()}


def restored(truth: Tensor, output: Tensor) -> dict[str, float]:
    """How close clips come to their truth, both (N, F, 3, H, W) in [-1, 1], and how sharp they are; means of all."""
    truth, output = unit(truth), unit(output)
    found = {
        "psnr": psnr(output, truth),
        "ssim": ssim(output, truth),
        "sharpness": sharpness(power_spectrum(output), power_spectrum(truth)),
    }
    if truth.shape[1] > 1:
        found["flicker error"] = flicker_error(output, truth)
    return {name: float(value.mean()) for name, value in found.items()}


def write_scores(folder: Path, each: Sequence[dict[str, float]]) -> None:
    """Write scores.json, the mean of what was measured of each clip."""
    names = dict.fromkeys(name for one in each for name in one)
    known = {name: [one[name] for one in each if name in one] for name in names}
    means = {name: sum(values) / len(values) for name, values in known.items()}
    (folder / "scores.json").write_text(json.dumps(means, indent=1) + "\n")


def compare_previews(before: Path, after: Path, target: Path) -> None:
    """Write TARGET.mp4 and TARGET.png: the first videos of `before` above those of the same names in `after`.

    Only videos as large as the first are shown: they stand side by side.
    """
    found = sorted(path.name for path in after.glob("*.mp4") if (before / path.name).is_file())
    if not found:
        return
    probes = {name: video.probe(after / name) for name in found}
    first = probes[found[0]]
    shape = (first.frames, first.height, first.width)
    names = [name for name, one in probes.items() if (one.frames, one.height, one.width) == shape][:SHOWN]
    fps = first.fps
    clips = {folder: [_read(folder / name) for name in names] for folder in (before, after)}
    rows = [_side_by_side(clips[folder]) for folder in (before, after)]
    video.write(target.with_suffix(".mp4"), np.concatenate(rows, axis=1), fps)
    pairs = [clip for pair in zip(clips[before], clips[after], strict=True) for clip in pair]
    labels = [f"{Path(name).stem} {which}" for name in names for which in ("before", "after")]
    video.contact_sheet(target.with_suffix(".png"), pairs, labels)


def _read(path: Path) -> Pixels:
    return video.read(path, range(video.probe(path).frames))


def _side_by_side(clips: list[Pixels]) -> Pixels:
    """The clips' common frames next to each other, (F, H, W, 3)."""
    length = min(len(clip) for clip in clips)
    joined = np.concatenate([clip[:length] for clip in clips], axis=2)
    factor = max(1, -(-LEAST_HEIGHT // joined.shape[1]))
    return joined.repeat(factor, axis=1).repeat(factor, axis=2)
