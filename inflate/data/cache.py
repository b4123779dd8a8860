"""Clips encoded once: what frozen networks make of their frames, kept in a `Store` and read instead of the files.

An entry belongs to one clip in one size, as one selection of windows shows it. Its key is a hash of all that its
content follows from: the file's bytes, the frames of every window and their rates, the size, the caption where it is
encoded, the networks' weights and settings, the precision, and VERSION. What changes makes another key, so a cache is
never stale: only entries of files and settings that are used now are found. Rows of its tensors are

    frames      every frame that some window shows, once, however many windows show it: `latents`, `frame_...`
    starts      every frame that some window begins with, with what is particular to the window: `motion`
    caption     one row

Beside them an entry `file/<hash>` holds what decoding the file showed, so that it need not be decoded again, and
`stamp/<place, size, time>` its hash, so that it need not be read again while its size and time of change stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from inflate.data import video
from inflate.data.motion import motion_of, reduced
from inflate.data.preflight import Checked, Progress
from inflate.data.settings import Data
from inflate.data.sources import Clip
from inflate.data.store import Store
from inflate.data.windows import Window, frames_of
from inflate.errors import DataError
from inflate.files import new_file, sha256

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
"""Of what is kept and how it is computed; one more makes every entry new."""
TOGETHER = 16
"""Frames that are read and encoded together."""
CAPTION = "caption"
"""Begins the names of tensors of the caption, of one row."""
FRAME = "frame_"
"""Begins the names of tensors that, as `latents`, have a row for every frame."""
FILL = (
    "run `inflate data cache` with the run's own files and settings: its stage, data and model, and what it sets of "
    "image_to_video or image_text_to_video"
)
_SHOWN = 5

Identity = Mapping[str, str]
Numbers = npt.NDArray[np.int64]


class Encoder(Protocol):
    """What frozen networks make of clips; where tensors come by name, each has one row for each thing given."""

    @property
    def identity(self) -> Identity:
        """All that the results depend on beside what is given: hashes of weights, precision, settings."""

    @property
    def reads_captions(self) -> bool:
        """Whether a caption is encoded, and an entry's key depends on it."""

    def latents(self, pixels: Tensor, /) -> Tensor:
        """Of frames (N, 3, H, W) in [-1, 1]: (N, ...)."""

    def of_frames(self, pixels: Tensor, /) -> dict[str, Tensor]:
        """What else is made of every frame, of the same; the names begin with FRAME."""

    def starts(self, pixels: Tensor, seeds: Sequence[str], /) -> dict[str, Tensor]:
        """Of first frames of windows (N, 3, H, W); what is random is a function of each one's seed."""

    def captions(self, texts: Sequence[str], /) -> dict[str, Tensor]:
        """Of captions; asked only where they are read."""


@dataclass(frozen=True)
class Sight:
    """One window of a clip from one start: the frames that it shows, and the rate that the model is told."""

    frames: list[int]
    fps: float


def by_size(row: Checked) -> list[Checked]:
    """A clip for each size that its windows have, with those windows: what an entry holds."""
    sizes = dict.fromkeys(window.bucket.size for window in row.windows)
    return [replace(row, windows=tuple(one for one in row.windows if one.bucket.size == size)) for size in sizes]


def sights(row: Checked, settings: Data) -> list[Sight]:
    """Every window of a clip from every start, in the order of the rows of an entry's starts."""
    assert row.probe is not None
    return [
        Sight(frames_of(window, start, row.probe, settings), window.fps)
        for window in _every(row)
        for start in window.starts
    ]


def shown(seen: Sequence[Sight]) -> list[int]:
    """Every frame that is shown, in order, once: the rows of an entry's latents."""
    return sorted({frame for sight in seen for frame in sight.frames})


class ClipCache:
    """The cache in a folder, and the hashes of the files that it was asked about."""

    def __init__(self, folder: str | Path, trusting: bool = True) -> None:
        """Read the folder's index, if there is one; DataError where it is damaged.

        Unless `trusting`, files are hashed anew also where their size and time of change are those of before.
        """
        self.store, self.trusting = Store(Path(folder).expanduser()), trusting
        self._files: dict[str, str] = {}
        self._stamps: dict[str, str] = {}

    def check_filled(self) -> None:
        """Raise DataError where the folder holds nothing."""
        if not self.store.entries:
            what = "holds no encoded clips" if self.store.folder.is_dir() else "is no folder"
            raise DataError(f"data.cache={self.store.folder} {what}: {FILL}")

    def probe(self, clip: Clip) -> video.Probe | None:
        """What decoding the clip's file showed before, if it was; DataError for a file that cannot be read."""
        entry = self.store.entries.get(self._file_key(clip))
        return None if entry is None else _probe(entry.facts["probe"])

    def note(self, row: Checked) -> None:
        """Keep what decoding a clip's file showed; one that does not decode is tried again the next time.

        DataError where the file is no longer the one that was hashed.
        """
        if row.probe is None:
            return
        self.check_unchanged(row.clip)
        file, stamp = self._file_key(row.clip), self._stamps[row.clip.name]
        if file not in self.store:
            self.store.put(file, {}, {"probe": asdict(row.probe)})
        if stamp and self.store.facts(stamp) != {"sha256": self._file(row.clip)}:
            self.store.put(stamp, {}, {"sha256": self._file(row.clip)})

    def check_unchanged(self, clip: Clip) -> None:
        """Raise DataError where the clip's file is not as it was when it was hashed."""
        self._file(clip)
        if _stamp(clip.media) != self._stamps[clip.name]:
            raise DataError(f"{clip.media}: changed while the cache was filled; start again once nothing writes to it")

    def key(self, row: Checked, seen: Sequence[Sight], encoder: Encoder) -> str:
        """The key of a clip's entry."""
        parts = {
            "version": VERSION, "file": self._file(row.clip), "size": row.windows[0].bucket.size,
            "sights": [(sight.frames, sight.fps) for sight in seen], "encoder": dict(encoder.identity),
            "caption": row.clip.caption if encoder.reads_captions else None,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prepare(self) -> None:
        """Make the folder and tidy it, before any process writes; DataError where it cannot be written to."""
        try:
            with new_file(self.store.folder / "probe") as aside:
                aside.touch()
            (self.store.folder / "probe").unlink(missing_ok=True)
            self.store.tidy()
        except OSError as error:
            raise DataError(
                f"data.cache={self.store.folder} cannot be written: {error}; name another folder"
            ) from error

    def needed(self, rows: Sequence[Checked], keys: Iterable[str]) -> set[str]:
        """These keys, and those of what decoding the clips' files showed."""
        return {*keys, *(self._file_key(row.clip) for row in rows), *(self._stamps[row.clip.name] for row in rows)}

    def holds_file(self, clip: Clip) -> bool:
        """Whether the clip's file, as it is now, was decoded for this cache."""
        return self._file_key(clip) in self.store

    def _file_key(self, clip: Clip) -> str:
        kind = "still" if video.is_image(clip.media) else "video"
        return f"file/{VERSION}/{kind}/{self._file(clip)}"

    def _file(self, clip: Clip) -> str:
        """The hash of the clip's file, which is read only if it is not as it was when it was hashed before."""
        if clip.name not in self._files:
            self._stamps[clip.name] = _stamp(clip.media)  # before the hash: what changes in between is hashed again
            known = self.store.facts(self._stamps[clip.name]) if self.trusting else None
            self._files[clip.name] = _hash(clip.media) if known is None else known["sha256"]
        return self._files[clip.name]


@dataclass(frozen=True)
class Held:
    """A clip in one size: its windows there, the key of its entry, and the frames that are the rows of it."""

    row: Checked
    key: str
    shown: Numbers


class EncodedClips:
    """The entries of a run's clips, read sample by sample."""

    def __init__(self, cache: ClipCache, rows: Sequence[Checked], settings: Data, encoder: Encoder) -> None:
        """Find every clip's entry; DataError naming those that have none, and why."""
        self.store = cache.store
        self._held: dict[tuple[str, video.Size], Held] = {}
        missing = {}
        for part in (part for row in rows for part in by_size(row)):
            seen = sights(part, settings)
            held = Held(part, cache.key(part, seen, encoder), np.array(shown(seen), np.int64))
            self._held[part.clip.name, part.windows[0].bucket.size] = held
            if held.key not in self.store:
                missing[part.clip.name] = part
        if missing:
            raise DataError(_missing(cache, [*missing.values()], len(rows)))

    def read(self, row: Checked, window: Window, start: int, frames: Sequence[int]) -> dict[str, Tensor]:
        """All of one sample by name: what belongs to its frames (F, ...), to its start, and to its caption.

        DataError for what is damaged.
        """
        held = self._held[row.clip.name, window.bucket.size]
        key, at = held.key, _row_of(held.row, window, start)
        places = [int(place) for place in np.searchsorted(held.shown, frames)]
        names = self.store.entries[key].checks.keys()
        framed = {name for name in names if name == "latents" or name.startswith(FRAME)}
        others = {
            name: self.store.rows(key, name, [0 if name.startswith(CAPTION) else at])[0] for name in names - framed
        }
        return {**{name: self.store.rows(key, name, places) for name in framed}, **others}

    def motion(self, row: Checked, window: Window, start: int) -> float:
        """The motion score of a window."""
        held = self._held[row.clip.name, window.bucket.size]
        return float(self.store.rows(held.key, "motion", [_row_of(held.row, window, start)])[0])


def _row_of(row: Checked, window: Window, start: int) -> int:
    """The row that holds what belongs to a window's start."""
    every = _every(row)
    return sum(len(one.starts) for one in every[: every.index(window)]) + start - window.starts[0]


def _every(row: Checked) -> list[Window]:
    """The windows of a clip, of all strides."""
    return [one for window in row.windows for one in window.variants]


@dataclass
class Filled:
    """What became of the used clips, each in every size of its windows: their keys, and how many entries were there,
    were made, and of how many frames.
    """

    keys: list[str] = field(default_factory=list)
    found: int = 0
    made: int = 0
    frames: int = 0


def fill(
    cache: ClipCache, rows: Sequence[Checked], settings: Data, encoder: Encoder, progress: Progress | None = None
) -> Filled:
    """Encode every used clip that the cache does not hold; what was done stays if it is interrupted.

    Raises DataError where a file cannot be read or the cache cannot be written.
    """
    done, parts = Filled(), [part for row in rows for part in by_size(row)]
    try:
        for number, row in enumerate(parts, 1):
            seen = sights(row, settings)
            key = cache.key(row, seen, encoder)
            done.keys.append(key)
            if key in cache.store:
                done.found += 1
            else:
                facts = {"clip": row.clip.name, "bucket": str(row.windows[0].bucket), "starts": len(seen)}
                tensors = encoded(row, seen, encoder, key)
                cache.check_unchanged(row.clip)
                cache.store.put(key, tensors, {**facts, "encoder": dict(encoder.identity)})
                done.made, done.frames = done.made + 1, done.frames + len(shown(seen))
            if progress is not None:
                progress(number, len(parts))
    finally:
        cache.store.flush()
    return done


def encoded(row: Checked, seen: Sequence[Sight], encoder: Encoder, key: str) -> dict[str, Tensor]:
    """The tensors of a clip's entry, by name."""
    import torch

    from inflate.data.pixels import to_float

    frames = shown(seen)
    small = []
    framed: dict[str, list[Tensor]] = {}
    firsts: dict[tuple[str, int], Tensor] = {}
    wanted = {sight.frames[0] for sight in seen}
    for numbers, pixels in _read(row, frames):
        small.append(reduced(pixels))
        floats = torch.from_numpy(to_float(pixels))  # (N, 3, H, W)
        for name, tensor in {"latents": encoder.latents(floats), **encoder.of_frames(floats)}.items():
            framed.setdefault(name, []).append(tensor.cpu())
        chosen = [place for place, number in enumerate(numbers) if number in wanted]
        if chosen:
            of_starts = encoder.starts(floats[chosen], [f"{key}/{numbers[place]}" for place in chosen])
            for name, tensor in of_starts.items():
                firsts |= {(name, numbers[place]): one for place, one in zip(chosen, tensor.cpu(), strict=True)}
    grey = np.concatenate(small)
    scores = [motion_of(grey[np.searchsorted(frames, sight.frames)], sight.fps) for sight in seen]
    named = {name: torch.stack([firsts[name, sight.frames[0]] for sight in seen]) for name in {n for n, _ in firsts}}
    texts = encoder.captions([row.clip.caption]) if encoder.reads_captions else {}
    every = {name: torch.cat(parts) for name, parts in framed.items()}
    return {**every, "motion": torch.tensor(scores, dtype=torch.float64), **named, **texts}


def _read(row: Checked, frames: Sequence[int]) -> Iterator[tuple[Sequence[int], npt.NDArray[np.uint8]]]:
    """The frames' numbers and pixels (N, H, W, 3), some at a time."""
    for first in range(0, len(frames), TOGETHER):
        numbers = frames[first : first + TOGETHER]
        yield numbers, video.read(row.clip.media, numbers, row.probe, row.windows[0].bucket.size)


def _probe(facts: Mapping[str, Any]) -> video.Probe:
    stamps = facts["stamps"]
    return video.Probe(**{**facts, "times": tuple(facts["times"]), "stamps": None if stamps is None else tuple(stamps)})


def _stamp(media: video.Media) -> str:
    """What tells that a file is as it was: its place, size and time of change; nothing for what is no file."""
    if isinstance(media, video.Embedded):
        return ""
    try:
        found = Path(media).stat()
    except OSError as error:
        raise DataError(f"{media}: cannot be read ({error.strerror})") from error
    return f"stamp/{Path(media).absolute()}/{found.st_size}/{found.st_mtime_ns}"


def _hash(media: video.Media) -> str:
    if isinstance(media, video.Embedded):
        return hashlib.sha256(media.load()).hexdigest()
    try:
        return sha256(Path(media))
    except OSError as error:
        raise DataError(f"{media}: cannot be read ({error.strerror})") from error


def _missing(cache: ClipCache, missing: Sequence[Checked], whole: int) -> str:
    """Which clips have no entry, and why."""
    reasons = (
        f"{row.clip.name}: encoded for other windows, sizes, draws, weights or precision"
        if cache.holds_file(row.clip)
        else f"{row.clip.name}: its file is new, or has changed"
        for row in missing[:_SHOWN]
    )
    more = f"\n... and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    text = "\n".join(reasons) + more
    return (
        f"data.cache={cache.store.folder}: {len(missing)} of {whole} clips are not in it\n{text}\n"
        f"{FILL}, or set data.cache=null"
    )
