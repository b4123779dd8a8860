"""Buckets: the sizes that clips are trained in, and which of them each optimiser step takes.

A bucket is one size, frames x height x width, perhaps at a rate of its own. All clips of an optimiser step come from
one bucket, on all processes and in all accumulated forward passes, so that no batch ever holds two sizes.

Buckets divide the clips among them, and take turns in the share of their windows; or they are a mixture, in which each
has a share of the steps and every clip serves in each bucket that it fills.
"""

from __future__ import annotations

import functools
import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from inflate.errors import ConfigError

Numbers = npt.NDArray[np.int64]
_FORMS = tuple(
    re.compile(size + r"(@(?P<fps>\d+(\.\d+)?)fps)?(:(?P<share>\d+))?")
    for size in (
        r"(?P<frames>\d+)x(?P<height>\d+)x(?P<width>\d+)",
        r"(?P<width>\d+)x(?P<height>\d+)@(?P<frames>\d+)",
    )
)
_EXAMPLES = (
    "write frames x height x width, 14x576x1024, or width x height @ frames, 1024x576@14, and behind it, if wanted, a "
    "rate and a share of the steps, 14x576x1024@8fps:5"
)
MOST_SHARE = 1000
"""Largest share that is written: in the sum of all shares, every bucket has exactly its own."""
_LATENT = 8 * 8
"""Pixels per latent position of Stable Diffusion's autoencoder."""
_STEPS = 2
"""Purpose that keeps the order of steps apart from the other random streams of a seed (see `clips.py`)."""


@dataclass(frozen=True)
class Bucket:
    """One size of training clips, and their rate."""

    frames: int
    height: int
    width: int
    fps: float | None = None
    """frames per second that its clips are resampled to; None as `data.fps` says"""
    share: int | None = field(default=None, compare=False)
    """of so many parts, all buckets' together, of the optimiser steps; None where the buckets are no mixture"""

    @property
    def is_still(self) -> bool:
        """Whether any frame of a video is an image here: in a mixture, where images are but one of its parts."""
        return self.frames == 1 and self.share is not None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), pixels."""
        return self.height, self.width

    def __str__(self) -> str:
        rate = "" if self.fps is None else f"@{self.fps:g}fps"
        return f"{self.frames}x{self.height}x{self.width}{rate}" + ("" if self.share is None else f":{self.share}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """The bucket that `14x576x1024`, `1024x576@14` or `14x576x1024@8fps:5` names; ValueError if it names none."""
        found = next((match for form in _FORMS if (match := form.fullmatch(text.strip()))), None)
        if found is None:
            raise ValueError(_EXAMPLES)
        parts = found.groupdict()
        sides = {name: int(parts[name]) for name in ("frames", "height", "width")}
        if min(sides.values()) < 1:
            raise ValueError("frames, height and width are 1 or more")
        return cls(**sides, fps=_rate(parts["fps"], sides["frames"]), share=_share(parts["share"]))

    def batch(self, tokens: int) -> int:
        """Clips whose latents have `tokens` positions together, or one where a single clip has more."""
        return max(1, tokens * _LATENT // (self.frames * self.height * self.width))


def _rate(written: str | None, frames: int) -> float | None:
    """Frames per second; ValueError for what is none."""
    if written is None:
        return None
    if frames == 1:
        raise ValueError("a single frame has no rate: leave it out")
    if not float(written):
        raise ValueError("a rate is more than 0")
    return float(written)


def _share(written: str | None) -> int | None:
    if written is None:
        return None
    if not 1 <= int(written) <= MOST_SHARE:
        raise ValueError(f"a share is a whole number from 1 to {MOST_SHARE}; leave out a bucket that is to have none")
    return int(written)


def parse_buckets(texts: Sequence[str]) -> tuple[Bucket, ...]:
    """The buckets of `data.buckets`; ConfigError with the place of the first that is wrong or listed before."""
    found: dict[Bucket, int] = {}
    for place, text in enumerate(texts, 1):
        where = f"data.buckets: entry {place} of {len(texts)}, {text!r}"
        try:
            bucket = Bucket.parse(text)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}") from None
        if bucket in found:
            raise ConfigError(f"{where}: is entry {found[bucket]} again; remove one")
        if found and (bucket.share is not None) != is_mixture([*found]):
            example = replace(bucket, share=bucket.share or 1)
            raise ConfigError(f"{where}: either every bucket has a share of the steps, such as {example}, or none has")
        found[bucket] = place
    return tuple(found)


def is_mixture(buckets: Sequence[Bucket]) -> bool:
    """Whether the buckets have shares of the steps, and clips serve in every one that they fill."""
    return any(bucket.share is not None for bucket in buckets)


def candidates(buckets: Sequence[Bucket], image: bool) -> list[Bucket]:
    """The buckets that an image, or a video, may go to.

    Images go to buckets of one frame. Videos go to the others: those of one frame take them, too, in a mixture and
    where all have one.
    """
    single = [bucket for bucket in buckets if bucket.frames == 1]
    if image or is_mixture(buckets):
        return single if image else [*buckets]
    return [bucket for bucket in buckets if bucket.frames > 1] or single


def of_its_shape(buckets: Sequence[Bucket], width: int, height: int) -> list[Bucket]:
    """Of the buckets that are equally long at one rate those whose aspect is nearest to a picture's; of each length."""
    alike: dict[tuple[int, float | None], list[Bucket]] = {}
    for bucket in buckets:
        alike.setdefault((bucket.frames, bucket.fps), []).append(bucket)
    return [bucket for group in alike.values() for bucket in nearest(group, width, height)]


def nearest(buckets: Sequence[Bucket], width: int, height: int) -> list[Bucket]:
    """The buckets whose aspect is nearest, by the logarithm of the ratio, to a picture's; all that are equally near."""
    distances = [abs(math.log(width / height) - math.log(bucket.width / bucket.height)) for bucket in buckets]
    return [bucket for bucket, distance in zip(buckets, distances, strict=True) if distance == min(distances)]


def largest(buckets: Sequence[Bucket], width: int, height: int) -> Bucket:
    """The bucket of most frames; among equals the largest that the picture need not be enlarged to, else the smallest.

    What is left equal is decided by the order of the list.
    """

    def rank(bucket: Bucket) -> tuple[int, bool, int]:
        fills, area = bucket.width <= width and bucket.height <= height, bucket.width * bucket.height
        return bucket.frames, fills, area if fills else -area

    return max(buckets, key=rank)


def check_multiples(buckets: Sequence[Bucket], factor: int) -> None:
    """Raise ConfigError naming a bucket whose pixels do not make whole latents, of `factor` pixels a side."""
    for bucket in buckets:
        if bucket.height % factor or bucket.width % factor:
            raise ConfigError(f"data: bucket {bucket}: height and width must be multiples of {factor}")


@dataclass(frozen=True)
class Schedule:
    """The bucket of each optimiser step, for buckets of `windows` windows and steps of `samples` samples.

    Each bucket has an endless stream of samples of its own: pass after pass over its windows, each pass in a new
    order, cut into steps of equal length. Epoch e (from 0) holds the steps that end within the first e + 1 passes of
    their bucket and belong to no earlier epoch, of all buckets, in an order drawn from (seed, e). So every pass visits
    every window of the bucket once; the samples at the end of a pass that fill no step are not dropped but are the
    first of the bucket's next step, in the next epoch. A bucket with fewer windows than a step has samples waits as
    many epochs as it takes, and its steps then hold windows more than once. All is a function of (seed, step).
    """

    seed: int
    windows: tuple[int, ...]
    samples: tuple[int, ...]

    def step(self, number: int) -> tuple[int, int]:
        """(bucket, how many steps it had before) of the optimiser step `number`, counted from 0."""
        surely = (number + 1) * self.samples[0] // self.windows[0] + 2  # by then the first bucket alone has had more
        epoch = bisect_right(range(surely), number, key=self._before) - 1
        had, have = self._each_before(epoch), self._each_before(epoch + 1)
        counts = tuple(after - before for before, after in zip(had, have, strict=True))
        buckets, turns = _order(self.seed, epoch, counts)
        place = number - sum(had)
        bucket = int(buckets[place])
        return bucket, had[bucket] + int(turns[place])

    def _each_before(self, epoch: int) -> list[int]:
        """The steps of each bucket before an epoch."""
        return [epoch * windows // samples for windows, samples in zip(self.windows, self.samples, strict=True)]

    def _before(self, epoch: int) -> int:
        return sum(self._each_before(epoch))


@dataclass(frozen=True)
class Mixture:
    """The bucket of each optimiser step, for buckets that have shares of the steps.

    As many steps as the shares' sum form a round, in which every bucket has exactly its share, in an order drawn from
    (seed, round). So shares are of the steps, whatever clips a bucket has. Each bucket has an endless stream of samples
    of its own, as in a `Schedule`, which its steps take in turn: there is no epoch of all buckets. All is a function of
    (seed, step).
    """

    seed: int
    shares: tuple[int, ...]

    def step(self, number: int) -> tuple[int, int]:
        """(bucket, how many steps it had before) of the optimiser step `number`, counted from 0."""
        rounds, place = divmod(number, sum(self.shares))
        buckets, turns = _order(self.seed, rounds, self.shares)
        bucket = int(buckets[place])
        return bucket, rounds * self.shares[bucket] + int(turns[place])


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, counts: tuple[int, ...]) -> tuple[Numbers, Numbers]:
    """The bucket of each step of an epoch, or a round, and how many steps of it the bucket had before."""
    buckets = np.repeat(np.arange(len(counts)), counts)
    buckets = np.random.default_rng([seed, _STEPS, epoch]).permutation(buckets)
    turns = np.empty_like(buckets)
    for bucket, count in enumerate(counts):
        turns[buckets == bucket] = np.arange(count)
    return buckets, turns
