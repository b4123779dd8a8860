"""Samples by number: windows of frames out of checked clips, each a function of the seed and its number alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import numpy.typing as npt

from inflate.data import video
from inflate.data.buckets import Mixture, Schedule
from inflate.data.cache import ClipCache, EncodedClips, Encoder
from inflate.data.digest import digest
from inflate.data.motion import motion_score
from inflate.data.preflight import Checked, Decoded, Preflight, Progress, preflight
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.data.windows import Window, frames_of
from inflate.errors import DataError

if TYPE_CHECKING:  # torch takes seconds to import, and a clip check needs none of it
    from torch import Tensor

__all__ = ["Batch", "Checked", "ClipDataset", "Data", "Item", "Preflight", "collate", "preflight"]

Pixels = npt.NDArray[np.uint8]
_ORDER, _START, _STRIDE = 0, 1, 3
"""Purposes that keep the random streams of one seed apart; `buckets.py` has another."""
_ORDERS_KEPT = 8
"""Orders of epochs that are remembered at least: the buckets of a run need not be in the same one."""


Frames = Literal["all", "first", "none"]
"""Which frames of a sample's pixels are read beside what is cached of it."""


class Item(TypedDict):
    """One sample; `collate` stacks them. One of a cache also holds the tensors that the family's encoder named."""

    pixels: NotRequired[Tensor]
    """float32 (F, 3, H, W) in [-1, 1]; of a sample from a cache only if all its frames are asked for"""
    first: NotRequired[Tensor]
    """float32 (3, H, W), the first frame alone; of a sample from a cache, if that is asked for"""
    latents: NotRequired[Tensor]
    """scaled latents (F, C, h, w); of a sample from a cache"""
    fps: Tensor
    """float32 (), of the window: the clip's rate, or data.fps, over the stride"""
    stride: Tensor
    """float32 (), frames of the clip, or of what data.fps makes of it, from one frame of the window to the next"""
    motion: Tensor
    """float32 (), see `motion_score`"""
    origin: NotRequired[Tensor]
    """int64 (4,), height and width of the file's frames, and the top and left of what is cut out of them once scaled"""
    caption: str
    number: Tensor
    """int64 (), the sample number"""
    name: str


Batch = dict[str, Any]
"""Items stacked: a leading batch axis on each tensor, captions and names as lists."""


class ClipDataset:
    """Samples by number, for the training loop or a torch DataLoader, with `collate`.

    The windows of all usable clips are listed in the order of the clips: place p of the list is in some bucket. Sample
    `n = e * len(dataset) + p` shows, in epoch e (from 0), a window of the bucket of place p: the one that an order of
    the bucket's windows, drawn from (seed, e), puts there. So each run of `len(dataset)` numbers visits every window
    once, and `dataset[n]` depends on the settings, the seed and n alone; the start of a random window, and its stride
    up to `data.stride_to`, are drawn from (seed, n). Without `shuffle` each place shows its own window.

    `numbers(step, ...)` says which samples form an optimiser step: all of one bucket, as `buckets.Schedule` has it, or
    for a mixture `buckets.Mixture`, in which a bucket may be in a later epoch than another.
    With one bucket they are the numbers in turn. A run that resumes at a step, on any number of reading processes, sees
    what it would have seen.
    """

    def __init__(self, settings: Data, seed: int = 0, shuffle: bool = True, progress: Progress | None = None) -> None:
        """Find and check the clips; raises DataError if they cannot be used (see `Preflight.refuse`)."""
        self.settings, self.seed, self.shuffle = settings, seed % 2**63, shuffle
        self.cache = ClipCache(settings.cache) if settings.cache else None
        if self.cache:
            self.cache.check_filled()
        known = self.cache.probe if self.cache else None
        self.preflight, self._decoded = preflight(find_clips(settings), settings, progress, known)
        self.preflight.refuse()
        self.preflight.tell()
        self.rows = self.preflight.used
        self.windows = [(row, window) for row in self.rows for window in row.windows]
        buckets = [window.bucket for _, window in self.windows]
        self.buckets = [bucket for bucket in settings.sizes if bucket in buckets]
        self._places = [np.flatnonzero([one == bucket for one in buckets]) for bucket in self.buckets]
        self._orders: dict[int, npt.NDArray[np.int64]] = {}
        self._scores: dict[tuple[str, Window, int], float] = {}
        self._encoded: EncodedClips | None = None
        self._frames_read: Frames = "all"

    def read_encoded(self, encoder: Encoder, frames: Frames) -> None:
        """Let samples hold what `data.cache` has of them, and of their pixels only these frames.

        DataError where there is no cache, or a clip is not in it as `encoder` would encode it now.
        """
        if self.cache is None:
            raise DataError("data.cache names no folder of encoded clips")
        self._encoded = EncodedClips(self.cache, self.rows, self.settings, encoder)
        self._frames_read = frames

    def __len__(self) -> int:
        """Windows of the usable clips: the samples of one epoch."""
        return len(self.windows)

    def __iter__(self) -> Iterator[Item]:
        """One epoch, from sample 0."""
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Item:
        """Sample `number` (0 or more, without end); raises DataError naming a clip that no longer reads."""
        import torch

        row, window = self.windows[self._place(int(number))]
        window = self._strided(int(number), window)
        start = self._start(int(number), window)
        content = self._shown(row, window, start) if self._encoded is None else self._from_cache(row, window, start)
        item = {
            **content,
            "fps": torch.tensor(window.fps, dtype=torch.float32),
            "stride": torch.tensor(window.stride, dtype=torch.float32),
            "motion": content["motion"].float(),
            "origin": torch.tensor(_origin(row, window), dtype=torch.int64),
            "caption": row.clip.caption,
            "number": torch.tensor(int(number), dtype=torch.int64),
            "name": row.clip.name,
        }
        return cast("Item", item)

    def numbers(self, step: int, lanes: int, batch: int) -> list[int]:
        """The samples of an optimiser step, for so many forward passes over all processes, each with its share in turn.

        batch: clips per forward pass, where `data.tokens` does not say how many of each bucket.
        """
        samples = tuple(lanes * self.settings.batch(bucket, batch) for bucket in self.buckets)
        shares = tuple(bucket.share for bucket in self.buckets if bucket.share is not None)
        schedule = Mixture(self.seed, shares) if shares else Schedule(self.seed, tuple(map(len, self._places)), samples)
        bucket, turn = schedule.step(step)
        places = self._places[bucket]
        epochs, turns = np.divmod(np.arange(turn * samples[bucket], (turn + 1) * samples[bucket]), len(places))
        return [int(number) for number in epochs * len(self) + places[turns]]

    def fingerprint(self) -> dict[str, str]:
        """What the numbers of a step rest on beside the seed: a run that resumes must find it unchanged."""
        counted = zip(self.buckets, self._places, strict=True)
        windows = ", ".join(f"{len(places)} of {bucket}" for bucket, places in counted)
        return {"windows": windows, "data.window": self.settings.window, "data.tokens": str(self.settings.tokens)}

    def motion_scores(self) -> npt.NDArray[np.float64]:
        """The motion score of each usable video's middle window (N,), for fitting motion buckets; images have none.

        In a mixture, that of its middle window in each bucket.
        """
        scores = []
        for row in self.rows:
            for bucket in dict.fromkeys(window.bucket for window in row.windows if window.bucket.frames > 1):
                taken = [window for window in row.windows if window.bucket == bucket]
                scores.append(self._middle_score(row, taken[(len(taken) - 1) // 2]))
        return np.asarray(scores, np.float64)

    def digest(self) -> str:
        """A hash of the used clips and the settings of their windows; see `inflate.data.digest`."""
        return digest(self.rows, self.settings)

    def __getstate__(self) -> dict[str, Any]:
        """Without the decoded clips: a worker that is started afresh decodes its own."""
        return self.__dict__ | {"_decoded": Decoded(0)}

    def _place(self, number: int) -> int:
        """The place in the list of the window that a sample shows."""
        if number < 0:
            raise DataError(f"sample numbers start at 0, not {number}")
        epoch, place = divmod(number, len(self.windows))
        return int(self._order(epoch)[place]) if self.shuffle else place

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The window that each place shows in an epoch: a permutation within each bucket."""
        if epoch not in self._orders:
            generator, order = np.random.default_rng([self.seed, _ORDER, epoch]), np.empty(len(self), np.int64)
            for places in self._places:
                order[places] = places[generator.permutation(len(places))]
            most = max(_ORDERS_KEPT, 2 * len(self.buckets))
            for old in list(itertools.islice(self._orders, max(0, len(self._orders) - most + 1))):
                del self._orders[old]
            self._orders[epoch] = order
        return self._orders[epoch]

    def _strided(self, number: int, window: Window) -> Window:
        """The window with the stride that a sample draws."""
        if not window.wider:
            return window
        return window.variants[int(np.random.default_rng([self.seed, _STRIDE, number]).integers(len(window.variants)))]

    def _start(self, number: int, window: Window) -> int:
        if len(window.starts) == 1:
            return window.starts[0]
        return int(np.random.default_rng([self.seed, _START, number]).integers(len(window.starts)))

    def _shown(self, row: Checked, window: Window, start: int) -> dict[str, Tensor]:
        """What the file gives of a window: `pixels` (F, 3, H, W) and `motion` ()."""
        import torch

        from inflate.data.pixels import to_float

        frames = self._read(row, window, self._numbers(row, window, start))  # (F, H, W, 3)
        score = torch.tensor(self._score(row, window, start, frames), dtype=torch.float64)
        return {"pixels": torch.from_numpy(to_float(frames)), "motion": score}

    def _from_cache(self, row: Checked, window: Window, start: int) -> dict[str, Tensor]:
        """What the cache has of a window, and the pixels of the frames that are asked for."""
        import torch

        from inflate.data.pixels import to_float

        assert self._encoded is not None
        numbers = self._numbers(row, window, start)
        found = self._encoded.read(row, window, start, numbers)
        if self._frames_read == "all":
            found["pixels"] = torch.from_numpy(to_float(self._read(row, window, numbers)))
        elif self._frames_read == "first":
            found["first"] = torch.from_numpy(to_float(self._read(row, window, numbers[:1])))[0]
        return found

    def _numbers(self, row: Checked, window: Window, start: int) -> list[int]:
        """The numbers of the frames that a window shows."""
        return frames_of(window, start, _probed(row), self.settings)

    def _read(self, row: Checked, window: Window, numbers: Sequence[int]) -> Pixels:
        """Frames of a clip at its bucket's size (N, H, W, 3)."""
        decoded = self._decoded.frames.get(row.clip.name)
        if decoded is not None and decoded.shape[1:3] == window.bucket.size:
            return np.asarray(decoded[numbers])
        return video.read(row.clip.media, numbers, row.probe, window.bucket.size)

    def _score(self, row: Checked, window: Window, start: int, frames: Pixels) -> float:
        key = row.clip.name, window, start
        if key not in self._scores:
            self._scores[key] = motion_score(frames, window.fps)
        return self._scores[key]

    def _middle_score(self, row: Checked, window: Window) -> float:
        known = self._scores.get((row.clip.name, window, window.middle))
        if known is not None:
            return known
        if self._encoded is not None:
            return self._encoded.motion(row, window, window.middle)
        frames = self._read(row, window, self._numbers(row, window, window.middle))
        return self._score(row, window, window.middle, frames)


def _probed(row: Checked) -> video.Probe:
    if row.probe is None:
        raise DataError(f"{row.clip.name}: was not decoded")
    return row.probe


def _origin(row: Checked, window: Window) -> tuple[int, int, int, int]:
    """The height and width of a clip's frames, and the top and left of what a window shows of them, once scaled."""
    probe = _probed(row)
    return probe.height, probe.width, *video.cut_from(probe, window.bucket.size)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items to a batch: pixels (B, F, 3, H, W); fps, motion, number (B,); captions and names as lists."""
    import torch

    columns = {name: [item[name] for item in items] for name in items[0]}  # type: ignore[literal-required]
    return {
        name: torch.stack(values) if isinstance(values[0], torch.Tensor) else values for name, values in columns.items()
    }
