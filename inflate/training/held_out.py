"""What tasks on clips share: batches by size, and losses on fixed noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from inflate.data.buckets import Bucket
from inflate.data.clips import ClipDataset, collate
from inflate.training.noise import Noise
from inflate.training.player import Batch

REMEDY = "cache what the frozen encoders make of the clips (`inflate data cache`)"
"""For a run whose time goes into encoding."""

TOGETHER = 4
"""Most clips that a held-out loss is measured on at once."""

Measure = Callable[[Batch, Noise], Tensor]
"""The loss of a batch at each noise level (B, levels)."""


def first_clips(clips: ClipDataset, count: int) -> list[Batch]:
    """The first clips of a dataset, at most so many, as batches of one."""
    return [collate([clips[number]]) for number in range(min(count, len(clips)))]


def is_image(batch: Batch) -> bool:
    """Whether a batch's clips have one frame."""
    return int(batch["latents" if "latents" in batch else "pixels"].shape[1]) == 1


def size_of(batch: Batch) -> tuple[int, int, int]:
    """Frames, height and width of a batch's clips, or of their latents where it holds no pixels."""
    _, frames, _, height, width = batch["pixels" if "pixels" in batch else "latents"].shape
    return frames, height, width


def same_size(batches: list[Batch], most: int) -> Iterator[list[int]]:
    """The places of batches whose clips have one size, at most so many together, the sizes in order of appearance."""
    sizes = [size_of(batch) for batch in batches]
    for size in dict.fromkeys(sizes):
        places = [place for place, one in enumerate(sizes) if one == size]
        yield from (places[start : start + most] for start in range(0, len(places), most))


def of_size(batches: list[Batch], bucket: Bucket) -> Batch:
    """The first clip of a bucket's size, whose rate an export remembers; the first of all where none has it.

    Where the bucket has a rate of its own, that is told instead, and not another bucket's of that size.
    """
    size = (bucket.frames, *bucket.size)
    found = next((batch for batch in batches if size_of(batch) == size), batches[0])
    return found if bucket.fps is None else found | {"fps": bucket.fps / found["stride"]}


def join(batches: list[Batch]) -> Batch:
    """Several batches of one size as one."""
    first = batches[0]
    return {
        key: torch.cat([b[key] for b in batches])
        if isinstance(first[key], Tensor)
        else sum((b[key] for b in batches), [])
        for key in first
    }


def band_name(low: float, high: float) -> str:
    """A range of noise levels in words."""
    if not low:
        return f"below {high:.3g}"
    return f"{low:.3g}-{high:.3g}" if math.isfinite(high) else f"above {low:.3g}"


def fixed_losses(
    clips: list[Batch], levels: int, seed: int, device: torch.device, measure: Measure, together: int
) -> Tensor:
    """What `measure` gives for each clip (N, levels), float64, with noise that the seed and the clip's number fix."""
    losses = torch.zeros(len(clips), levels, dtype=torch.float64)
    for places in same_size(clips, min(together, TOGETHER)):
        batch = join([clips[place] for place in places])
        losses[places] = measure(batch, Noise(seed, batch["number"], device)).double().cpu()
    return losses


def named_losses(
    losses: Tensor, bypassed: Tensor | None, known: Tensor, levels: Sequence[str], sizes: Sequence[tuple[int, int, int]]
) -> dict[str, float]:
    """Means of held-out losses (N, levels): over all, at each level, in each size where there are several.

    Those with the temporal layers bypassed, where any are passed, and those of clips that are trained on, if there are
    any, are told beside.
    """
    named = {"held-out loss": float(losses.mean())}
    if len(known):
        named["training-clip loss"] = float(known.mean())
    for place, level in enumerate(levels):
        named[f"held-out loss at {level}"] = float(losses[:, place].mean())
    for size in dict.fromkeys(sizes) if len(set(sizes)) > 1 else ():
        chosen = torch.tensor([one == size for one in sizes])
        named[f"held-out loss in {'x'.join(map(str, size))}"] = float(losses[chosen].mean())
    if bypassed is not None:
        named["held-out loss, temporal layers bypassed"] = float(bypassed.mean())
    return named
