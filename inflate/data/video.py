"""Reading and writing of videos and stills: the only file that knows codecs.

Frame counts and times come from decoding, never from the container's word. Times are presentation times in seconds
from the first shown frame. Pixels are uint8 RGB, upright (the display matrix is applied), with square pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from inflate.errors import DataError
from inflate.files import new_file

Pixels = npt.NDArray[np.uint8]
EXTENSIONS = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".gif"})
IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
"""Stills, which are clips of one frame."""
MOST_PIXELS = 2**26
"""Pixels of the largest frame that is decoded, 8192 x 8192: a damaged header may claim any size."""
_BT709, _UNSPECIFIED, _BT2020 = 1, 2, (9, 10)
_HIGH_RANGE = 16, 18
"""Transfer characteristics of PQ and HLG."""


@dataclass(frozen=True)
class Embedded:
    """A video kept in a row of a table as bytes or a path, as in a Hugging Face dataset with `Video(decode=False)`."""

    table: Any
    row: int
    column: str
    name: str

    def load(self) -> bytes:
        """The file's bytes; raises DataError if the row holds none, or names a file that is not there."""
        value = self.table[self.row][self.column]
        held = value if isinstance(value, dict) else {"path": value}
        if held.get("bytes"):
            return bytes(held["bytes"])
        if not held.get("path"):
            raise DataError(f"{self.name}: the row holds no video")
        return Path(_checked_file(Path(held["path"]))).read_bytes()

    def __str__(self) -> str:
        return self.name


Media = Path | str | Embedded
Size = tuple[int, int]
"""(height, width) that frames are fitted to: scaled to cover with the aspect kept, then cropped about the centre."""
SizeOf = Callable[[int, int], Size]
"""Such a size by the upright width and height of the frames."""


@dataclass(frozen=True)
class Probe:
    """What decoding a whole video showed."""

    frames: int
    """frames that decode"""
    fps: float
    """average rate over the shown times"""
    width: int
    """upright and with square pixels, as are `height` and everything read"""
    height: int
    rotation: int
    """degrees counter-clockwise that were applied: 0, 90, 180 or 270"""
    times: tuple[float, ...]
    """seconds from the first frame, rising"""
    stamps: tuple[int, ...] | None
    """the container's time stamps; None where it has none that can be sought"""
    variable: bool
    """whether some interval differs from the median by more than a quarter"""

    @property
    def is_image(self) -> bool:
        """Whether it is a still; a video has two frames or more."""
        return self.frames == 1

    @property
    def duration(self) -> float:
        """Seconds, the last frame included."""
        return self.frames / self.fps

    @cached_property
    def typical_fps(self) -> float:
        """One over the median interval: the rate of a clip while it moves, though some frames stay longer."""
        return self.fps if self.is_image else 1 / float(np.median(np.diff(self.times)))

    def shown_at(self, times: npt.ArrayLike) -> list[int]:
        """The frames on screen at `times` (seconds); a quarter of a frame is forgiven for rounded time stamps."""
        forgiven = np.asarray(times, np.float64) + 0.25 / self.typical_fps
        found = np.searchsorted(self.times, forgiven, side="right") - 1
        return [int(i) for i in np.clip(found, 0, self.frames - 1)]


def probe(media: Media) -> Probe:
    """Decode a whole video: true frame count, times, upright size; raises DataError naming the file and the reason."""
    return scan(media)[0]


def codec(media: Media) -> str:
    """A video's codec and pixel format, such as h264/yuv420p; raises DataError."""
    with _opened(media) as (_, stream):
        return f"{stream.codec_context.name}/{stream.codec_context.pix_fmt}"


def has_sound(media: Media) -> bool:
    """Whether a video has a sound track; raises DataError."""
    with _opened(media) as (container, _):
        return bool(container.streams.audio)


def has_high_range(media: Media) -> bool:
    """Whether a video says that its colours are of high dynamic range (PQ or HLG); raises DataError."""
    with _opened(media) as (_, stream):
        return stream.codec_context.color_trc in _HIGH_RANGE


def is_image(media: Media) -> bool:
    """Whether the media is a still, by its extension."""
    return not isinstance(media, Embedded) and Path(media).suffix.lower() in IMAGES


def scan(media: Media, size: Size | SizeOf | None = None, limit: int = 0) -> tuple[Probe, Pixels | None]:
    """Decode a whole video, or a still, once: its probe, and its frames if they fit.

    size: what the frames are fitted to, None for their own; limit: bytes of frames worth keeping, 0 for none.
    Returns (probe, uint8 (F, H, W, 3) or None). Raises DataError.
    """
    if is_image(media):
        return _scan_image(Path(str(media)), size, limit)
    kept: list[Pixels] | None = [] if limit else None
    stamps: list[int | None] = []
    first: VideoFrame | None = None
    fitted: Size | None = None
    with _opened(media) as (container, stream):
        counts = [0]
        for frame in _decoded(container, stream, media, counts):
            if first is None:
                first, fitted = frame, _size_for(size, *_upright(frame, stream))
            stamps.append(frame.pts)
            if kept is not None:
                kept.append(_pixels(frame, stream, fitted))
                kept = kept if kept[0].nbytes * len(kept) <= limit else None
        if first is None:
            raise DataError(f"{media}: no frame decodes (declared: {stream.frames})")
        found = _describe(media, stream, first, stamps)
        _check_whole(media, stream, container, counts[0], found)
    return found, None if kept is None else np.stack(kept)  # (F, H, W, 3)


def read(
    media: Media,
    indices: Sequence[int] | None = None,
    probe: Probe | None = None,
    size: Size | None = None,
) -> Pixels:
    """Read frames, seeking to the key frame before the first.

    indices: non-decreasing frame numbers, None for all; probe: of this media, if known (else it is decoded whole);
    size: what they are fitted to. Returns uint8 (F, H, W, 3). Raises DataError naming the file and the reason.
    """
    if probe is None or probe.is_image:
        found, frames = scan(media, size, limit=2**63)
        assert frames is not None
        return frames if indices is None else frames[_checked(media, indices, found)]
    wanted = _checked(media, range(probe.frames) if indices is None else indices, probe)
    got = _sought(media, wanted, probe, size) if probe.stamps and wanted[0] else {}
    if not got.keys() >= set(wanted):
        got = _walked(media, wanted, size)
    if missing := sorted(set(wanted) - got.keys()):
        raise DataError(f"{media}: frame {missing[0]} no longer decodes; did the file change since it was checked?")
    return np.stack([got[i] for i in wanted])  # (F, H, W, 3)


def walk(media: Media, together: int = 16) -> Iterator[Pixels]:
    """Yield all frames of a video, so many `together`, uint8 (F, H, W, 3): in little memory. Raises DataError."""
    with _opened(media) as (container, stream):
        arriving = (_pixels(frame, stream, None) for frame in _decoded(container, stream, media))
        while part := list(islice(arriving, together)):
            yield np.stack(part)


def read_image(path: Path | str, size: Size | None = None) -> Pixels:
    """Read a still upright, fitted like a video's frames: uint8 (H, W, 3); raises DataError."""
    image = _load_image(path)
    return np.asarray(image) if size is None else _fitted_image(image, size)


def write(path: Path | str, frames: Pixels, fps: float, quality: int = 18) -> Path:
    """Write frames as an H.264 mp4 that browsers play (yuv420p, BT.709, index in front), whole or not at all.

    frames: uint8 (F, H, W, 3); an odd height or width is padded by one repeated row or column, since yuv420p needs
    even sizes; fps: frames per second; quality: x264's constant rate factor, lower is better. Raises DataError.
    """
    return write_parts(path, [frames], fps, quality)


def write_parts(path: Path | str, parts: Iterable[Pixels], fps: float, quality: int = 18) -> Path:
    """Write frames that come part by part, (F, H, W, 3) of one size each, as `write` does in little memory."""
    path, arriving = Path(path), iter(parts)
    first = next(arriving, np.zeros((0, 1, 1, 3), np.uint8))
    _check_writable(path, first, fps)
    with _aside(path) as draft:
        with av.open(str(draft), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(65_535))
            height, width = _even(first).shape[1:3]
            _set_up_encoder(stream, height, width, quality)
            for part in chain([first], arriving):
                _check_writable(path, part, fps)
                for frame in _even(part):
                    image = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    container.mux(stream.encode(image.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
            container.mux(stream.encode())
    return path


def contact_sheet(
    path: Path | str, rows: Sequence[Pixels], labels: Sequence[str] | None = None, columns: int = 8
) -> Path:
    """Write a PNG with one video per row, evenly spaced frames from first to last.

    rows: uint8 (F, H, W, 3) each, all of one height and width; labels: one per row, written at its left;
    columns: most frames per row. Small frames are magnified by whole numbers. Raises DataError.
    """
    path = Path(path)
    if not rows or any(row.ndim != 4 or row.shape[1:] != rows[0].shape[1:] or not len(row) for row in rows):
        raise DataError(f"{path}: a contact sheet needs rows of (frames, height, width, 3) that agree in size")
    if labels is not None and len(labels) != len(rows):
        raise DataError(f"{path}: {len(labels)} labels for {len(rows)} rows")
    zoom = max(1, 128 // max(rows[0].shape[1:3]))
    strips = [_strip(row, columns, zoom) for row in rows]
    widest = max(strip.shape[1] for strip in strips)
    body = np.concatenate([_padded(strip, widest) for strip in strips])
    sheet = Image.fromarray(body) if labels is None else _labelled(body, labels)
    with _aside(path) as draft:
        sheet.save(draft, format="PNG")
    return path


def captioned_grid(rows: Sequence[Sequence[Pixels]], labels: Sequence[str]) -> Pixels:
    """Clips (F, H, W, 3) of one size in rows, under a label for each column: (F, text and rows * H, columns * W, 3).

    Small clips are magnified by whole numbers; a label that is too long is cut. DataError for sizes that differ.
    """
    if len({clip.shape for row in rows for clip in row}) != 1 or {len(row) for row in rows} != {len(labels)}:
        raise DataError("a grid needs clips of one size, and a label for each column")
    zoom = max(1, 128 // max(rows[0][0].shape[1:3]))
    grid = np.concatenate([np.concatenate(row, axis=2) for row in rows], axis=1).repeat(zoom, 1).repeat(zoom, 2)
    width = grid.shape[2] // len(labels)
    head = np.concatenate([_title(label, width) for label in labels], axis=1)  # (h, columns * W, 3)
    return np.concatenate([head[None].repeat(len(grid), 0), grid], axis=1)


# ---------------------------------------------------------------------------------------------------- reading


@contextmanager
def _opened(media: Media) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open for decoding on one thread (the loader's workers are the parallelism), refusing damaged data."""
    source = io.BytesIO(media.load()) if isinstance(media, Embedded) else _checked_file(Path(media))
    try:
        with av.open(source, "r", metadata_errors="replace") as container:
            stream = _video_stream(container, media)
            stream.codec_context.thread_count = 1
            # Without the first the decoder paints over what is missing.
            stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MOST_PIXELS)}
            yield container, stream
    except av.error.InvalidDataError as error:
        raise DataError(f"{media}: not a readable video: corrupt, cut short, or another kind of file") from error
    except av.error.EOFError as error:
        raise DataError(f"{media}: no frame decodes: the file ends after its header") from error
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{media}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def _checked_file(path: Path) -> str:
    if not path.exists():
        raise DataError(f"{path}: no such file")
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes)")
    return str(path)


def _video_stream(container: InputContainer, media: Media) -> VideoStream:
    """The first video stream that is not a cover picture."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            if stream.codec_context is None:
                raise DataError(f"{media}: its codec is unknown: corrupt, or a kind of video that is not supported")
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    held = f"only {' and '.join(kinds)}" if kinds else "nothing"
    raise DataError(f"{media}: no video stream; it holds {held}")


def _decoded(
    container: InputContainer, stream: VideoStream, media: Media, counts: list[int] | None = None
) -> Iterator[VideoFrame]:
    """Yield frames in order of presentation; counts[0] counts packets. Raises DataError at the first damaged one."""
    done = 0
    packet = None
    try:
        for packet in container.demux(stream):
            if counts is not None and packet.size:
                counts[0] += 1
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise DataError(f"{media}: corrupt: frame {done} is damaged")
                yield frame
                done += 1
    except av.error.FFmpegError as error:
        cut = packet is not None and packet.is_corrupt
        reason = "truncated: the file ends" if cut else "corrupt: decoding fails"
        whole = stream.frames or "an unknown number of"
        raise DataError(f"{media}: {reason} after {done} of {whole} frames") from error


def _describe(media: Media, stream: VideoStream, first: VideoFrame, stamps: list[int | None]) -> Probe:
    if len(stamps) == 1:
        raise DataError(f"{media}: only one frame decodes (declared: {stream.frames}); a clip needs two or more")
    known = [stamp for stamp in stamps if stamp is not None]
    usable = len(known) == len(stamps) and all(a < b for a, b in pairwise(known))
    if usable and stream.time_base:
        times = (np.asarray(known, np.float64) - known[0]) * float(stream.time_base)
    else:
        times = np.arange(len(stamps)) / float(stream.average_rate or stream.guessed_rate or 25)
    steps = np.diff(times)
    median = float(np.median(steps))
    width, height = _upright(first, stream)
    return Probe(
        frames=len(stamps),
        fps=(len(stamps) - 1) / float(times[-1]),
        width=width,
        height=height,
        rotation=90 * _turns(first),
        times=tuple(float(t) for t in times),
        stamps=tuple(known) if usable else None,
        variable=bool(np.abs(steps - median).max() > 0.25 * median),
    )


def _check_whole(media: Media, stream: VideoStream, container: InputContainer, packets: int, found: Probe) -> None:
    """Refuse a video that ends clearly before its container says."""
    if packets < 0.98 * stream.frames:
        raise DataError(f"{media}: truncated: {packets} of {stream.frames} declared frames are in the file")
    stated = _stated_duration(stream) if not stream.frames else 0.0
    end = found.times[-1] + 1 / found.fps
    if stated - end > max(0.25, 2 / found.fps):
        raise DataError(f"{media}: truncated: it ends at {end:.2f} s, its header says {stated:.2f} s")


def _stated_duration(stream: VideoStream) -> float:
    """Seconds that a Matroska header states for the stream (00:00:03.000000000), 0 if it does not."""
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        return sum(60.0**place * float(part) for place, part in enumerate(reversed(parts)))
    except ValueError:
        return 0.0


def _checked(media: Media, indices: Sequence[int], found: Probe) -> list[int]:
    wanted = [int(i) for i in indices]
    if not wanted or wanted[0] < 0 or wanted[-1] >= found.frames or wanted != sorted(wanted):
        raise DataError(f"{media}: frames {wanted[:3]}... asked of {found.frames}; they must rise from 0")
    return wanted


def _sought(media: Media, wanted: list[int], found: Probe, size: Size | None) -> dict[int, Pixels]:
    """The wanted frames by seeking; some or all are missing where the container's index misleads."""
    assert found.stamps is not None
    numbers = {found.stamps[i]: i for i in wanted}
    got: dict[int, Pixels] = {}
    try:
        with _opened(media) as (container, stream):
            container.seek(found.stamps[wanted[0]], stream=stream)
            for frame in _decoded(container, stream, media):
                if frame.pts in numbers:
                    got[numbers[frame.pts]] = _pixels(frame, stream, size)
                if frame.pts is not None and frame.pts >= found.stamps[wanted[-1]]:
                    break
    except DataError:  # frames before an open group of pictures cannot be decoded: start from the beginning instead
        return {}
    return got


def _walked(media: Media, wanted: list[int], size: Size | None) -> dict[int, Pixels]:
    numbers = set(wanted)
    got: dict[int, Pixels] = {}
    with _opened(media) as (container, stream):
        for number, frame in enumerate(_decoded(container, stream, media)):
            if number in numbers:
                got[number] = _pixels(frame, stream, size)
            if number >= wanted[-1]:
                break
    return got


# ---------------------------------------------------------------------------------------------------- stills


def _load_image(path: Path | str) -> Image.Image:
    """A still, upright and in RGB."""
    source = _checked_file(Path(path))
    try:
        with Image.open(source) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise DataError(f"{path}: claims {opened.width}x{opened.height} pixels, more than {MOST_PIXELS}")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error


def _fitted_image(image: Image.Image, size: Size) -> Pixels:
    width, height = _cover(image.width, image.height, size)
    return _crop(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)), size)


def _scan_image(path: Path, size: Size | SizeOf | None, limit: int) -> tuple[Probe, Pixels | None]:
    image = _load_image(path)
    found = Probe(1, 1.0, image.width, image.height, 0, (0.0,), None, False)
    fitted = _size_for(size, image.width, image.height)
    frame = np.asarray(image) if fitted is None else _fitted_image(image, fitted)
    return found, frame[None] if frame.nbytes <= limit else None  # (1, H, W, 3)


# ---------------------------------------------------------------------------------------------------- pixels


def _size_for(size: Size | SizeOf | None, width: int, height: int) -> Size | None:
    return size(width, height) if callable(size) else size


def _upright(frame: VideoFrame, stream: VideoStream) -> tuple[int, int]:
    """(width, height) of a frame once it is upright, with square pixels."""
    width, height = _square_width(frame, stream), frame.height
    return (height, width) if _turns(frame) % 2 else (width, height)


def _turns(frame: VideoFrame) -> int:
    """Quarter turns counter-clockwise that make the frame upright."""
    return round(frame.rotation / 90) % 4


def _square_width(frame: VideoFrame, stream: VideoStream) -> int:
    ratio = stream.sample_aspect_ratio
    return max(1, round(frame.width * float(ratio))) if ratio else frame.width


def _pixels(frame: VideoFrame, stream: VideoStream, size: Size | None) -> Pixels:
    turns, width, height = _turns(frame), _square_width(frame, stream), frame.height
    if size is not None:
        covered = _cover(*_upright(frame, stream), size)
        width, height = (covered[1], covered[0]) if turns % 2 else covered
    scaled = frame.reformat(
        width, height, format="rgb24", src_colorspace=_matrix(frame), interpolation=Interpolation.BICUBIC
    )
    image = np.rot90(np.asarray(scaled.to_ndarray(), np.uint8), turns)  # (H, W, 3)
    return np.ascontiguousarray(image if size is None else _crop(image, size))


def _matrix(frame: VideoFrame) -> Colorspace:
    """The YUV matrix of a frame; an untagged one is read as players do, by its height."""
    if frame.colorspace == _BT709 or (frame.colorspace == _UNSPECIFIED and frame.height > 576):
        return Colorspace.ITU709
    return Colorspace.BT2020 if frame.colorspace in _BT2020 else Colorspace.ITU601


def _cover(width: int, height: int, size: Size) -> tuple[int, int]:
    """The (width, height) that just covers `size` (height, width) with the aspect kept."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[1], round(width * scale)), max(size[0], round(height * scale))


def cut_from(probe: Probe, size: Size) -> tuple[int, int]:
    """The top and left, in pixels, of what is cut out of a medium's frames once they are scaled to cover `size`."""
    width, height = _cover(probe.width, probe.height, size)
    return _corner((height, width), size)


def _corner(covered: Size, size: Size) -> tuple[int, int]:
    return (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2


def _crop(image: Pixels, size: Size) -> Pixels:
    top, left = _corner((image.shape[0], image.shape[1]), size)
    return image[top : top + size[0], left : left + size[1]]  # (height, width, 3)


# ---------------------------------------------------------------------------------------------------- writing


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """Give a draft's path beside `path`, which takes its place once it is whole; DataError where that fails."""
    try:
        with new_file(path) as draft:
            yield draft
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: cannot be written ({getattr(error, 'strerror', None) or error})") from error


def _check_writable(path: Path, frames: Pixels, fps: float) -> None:
    if path.suffix.lower() != ".mp4":
        raise DataError(f"{path}: videos are written as .mp4, not {path.suffix or 'without an extension'}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
        raise DataError(f"{path}: frames must be uint8 (frames, height, width, 3), not {frames.dtype} {frames.shape}")
    if not (math.isfinite(fps) and fps > 0):
        raise DataError(f"{path}: fps must be a positive number, not {fps}")


def _even(frames: Pixels) -> Pixels:
    return np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")


def _set_up_encoder(stream: VideoStream, height: int, width: int, quality: int) -> None:
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    context = stream.codec_context
    # The same bytes each time: one thread, and no macroblock tree, which reads memory that x264 never set.
    context.options = {"crf": str(quality), "preset": "medium", "x264-params": "mbtree=0"}
    context.thread_count = 1
    context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1  # BT.709, limited range


def _strip(row: Pixels, columns: int, zoom: int) -> Pixels:
    chosen = np.unique(np.linspace(0, len(row) - 1, min(columns, len(row))).round().astype(int))
    cells = [np.pad(row[i].repeat(zoom, 0).repeat(zoom, 1), ((1, 1), (1, 1), (0, 0))) for i in chosen]
    return np.concatenate(cells, axis=1)


def _title(label: str, width: int) -> Pixels:
    """A line of text (22, width, 3)."""
    image = Image.new("RGB", (width, 22), "white")
    ImageDraw.Draw(image).text((4, 11), label, fill="black", font=ImageFont.load_default(size=14), anchor="lm")
    return np.asarray(image)


def _padded(strip: Pixels, width: int) -> Pixels:
    return np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)))


def _labelled(body: Pixels, labels: Sequence[str]) -> Image.Image:
    font = ImageFont.load_default(size=14)
    margin = 8 + max(math.ceil(font.getlength(label)) for label in labels)
    height = body.shape[0] // len(labels)
    sheet = Image.new("RGB", (body.shape[1] + margin, body.shape[0]), "white")
    sheet.paste(Image.fromarray(body), (margin, 0))
    draw = ImageDraw.Draw(sheet)
    for number, label in enumerate(labels):
        draw.text((4, (number + 0.5) * height), label, fill="black", font=font, anchor="lm")
    return sheet
