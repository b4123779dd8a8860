"""Where clips and captions come from: folders, metadata tables, Hugging Face datasets.

Nothing is decoded here. What a user wrote wrongly (a file that is not there, a caption left out, a clip listed twice)
is an error that names the row; what is wrong inside a file is found by the preflight of `clips.py`.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from inflate.data.settings import Data
from inflate.data.video import EXTENSIONS, IMAGES, Embedded, is_image
from inflate.errors import DataError

VIDEO_COLUMNS = ("video", "video_path", "file_path", "file_name", "path", "media_path")
CAPTION_COLUMNS = ("caption", "text", "prompt", "cap")
TABLES = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Clip:
    """One video, or one image, with its caption."""

    media: Path | Embedded
    caption: str
    name: str
    """how tables and errors call it: the path below the folder, or dataset[row]"""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """the metadata's other columns"""


@dataclass(frozen=True)
class _Entry:
    """One row of a metadata table: where it stands and what it says."""

    place: str
    values: dict[str, Any]


def find_clips(settings: Data) -> list[Clip]:
    """List the clips that the settings name, in a fixed order; raises DataError naming the folder, file or row."""
    if settings.source == "huggingface":
        return _from_hub(settings)
    root = Path(settings.path).expanduser()
    if root.is_file():
        return _from_table(root, settings)
    folder = _split_folder(root, settings)
    tables = [folder / f"metadata{kind}" for kind in TABLES if (folder / f"metadata{kind}").is_file()]
    if len(tables) > 1:
        raise DataError(f"{folder}: has {_listed(t.name for t in tables)}; keep one, or name it in data.path")
    return _from_table(tables[0], settings) if tables else _from_pairs(folder, settings)


def _split_folder(root: Path, settings: Data) -> Path:
    split = settings.split
    if not root.is_dir():
        hint = "; `python datasets/build_demo.py` builds the demo clips" if root.name == "demo" else ""
        raise DataError(f"{root}: no such folder or metadata file (data.path){hint}")
    if split is None:
        return root
    if not (root / split).is_dir():
        others = _listed(_folders(root)) or "none"
        raise DataError(f"{root}: no sub-folder {split!r} ({_split_setting(settings)}); it has {others}")
    return root / split


def _split_setting(settings: Data) -> str:
    """The setting that the split comes from; `Data.evaluation` takes the held-out one for it."""
    return "data.split" if settings.split != settings.held_out else "data.held_out"


# ---------------------------------------------------------------------------------------------------- pairs


def _from_pairs(folder: Path, settings: Data) -> list[Clip]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    nested = sorted({path.parent.relative_to(folder).as_posix() for path in files if _is_metadata(path)})
    if nested:
        raise DataError(
            f"{folder}: its clips are in sub-folders; set data.split to {' or '.join(nested)}, or name that folder"
        )
    media = [path for path in files if path.suffix.lower() in EXTENSIONS | IMAGES]
    if not media:
        others = f"; it has {_listed(path.name for path in files)}" if files else "; it is empty"
        raise DataError(f"{folder}: no clips{others}. Clips end in {' '.join(sorted(EXTENSIONS | IMAGES))}")
    for kind in (True, False):  # a video and its still may share a caption
        _refuse_shared_captions([path for path in media if is_image(path) is kind])
    clips = [Clip(path, _caption_file(path), path.relative_to(folder).as_posix()) for path in media]
    return _with_captions(clips, settings, [f"{path}: no caption {path.stem}.txt" for path in media])


def _caption_file(clip: Path) -> str:
    path = clip.with_suffix(".txt")
    return _text(path).strip() if path.is_file() else ""


def _refuse_shared_captions(files: Sequence[Path]) -> None:
    seen: dict[Path, Path] = {}
    for path in files:
        first = seen.setdefault(path.with_suffix(""), path)
        if first is not path:
            raise DataError(f"{path}: duplicate of {first.name}: both would take {path.stem}.txt; rename or remove one")


# ---------------------------------------------------------------------------------------------------- metadata tables


def _from_table(table: Path, settings: Data) -> list[Clip]:
    if table.suffix.lower() not in TABLES:
        raise DataError(f"{table}: not a folder or a {', '.join(TABLES)} file (data.path)")
    entries = _entries(table)
    if not entries:
        raise DataError(f"{table}: no clips; the table has no rows")
    columns = list(dict.fromkeys(name for entry in entries for name in entry.values))
    video = _column(str(table), columns, VIDEO_COLUMNS, settings.video_column, "video_column")
    caption = _caption_column(str(table), columns, settings)
    paths = _listed_files(table, entries, video)
    clips = []
    for path, entry in zip(paths, entries, strict=True):
        extra = {k: v for k, v in entry.values.items() if k not in (video, caption)}
        clips.append(Clip(path, _words(entry, caption), str(entry.values[video]), extra))
    return _with_captions(clips, settings, [f"{entry.place}: no caption" for entry in entries])


def _entries(table: Path) -> list[_Entry]:
    kind = table.suffix.lower()
    if kind == ".parquet":
        return [_Entry(f"{table}: row {n}", row) for n, row in enumerate(_parquet(table), 1)]
    if kind == ".csv":
        return _csv(table)
    return [_json(f"{table}:{n}", line) for n, line in enumerate(_text(table).splitlines(), 1) if line.strip()]


def _parquet(table: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.ParquetFile(table).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table}: cannot be read as parquet ({error})") from error
    return rows


def _csv(table: Path) -> list[_Entry]:
    reader = csv.DictReader(_text(table).splitlines(keepends=True), strict=True)
    entries = []
    try:
        for row in reader:
            place = f"{table}:{reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{place}: its number of fields differs from the header's; quote texts with commas")
            entries.append(_Entry(place, row))
    except csv.Error as error:
        raise DataError(f"{table}:{reader.line_num + 1}: not valid CSV ({error})") from error
    return entries


def _json(place: str, line: str) -> _Entry:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise DataError(f"{place}: a JSON object is needed, with a file name and a caption")
    return _Entry(place, values)


def _listed_files(table: Path, entries: Sequence[_Entry], column: str) -> list[Path]:
    """The rows' files; raises DataError naming every row (up to five) without one, or with one listed before."""
    paths, problems = [], []
    places: dict[Path, str] = {}
    for entry in entries:
        value = entry.values.get(column)
        path = table.parent / value if isinstance(value, str) and value else None
        if path is None:
            problems.append(f"{entry.place}: column {column!r} names no file")
        elif not path.is_file():
            problems.append(f"{entry.place}: no such file {path}")
        else:
            first = places.setdefault(path.resolve(), entry.place)
            if first != entry.place:
                problems.append(f"{entry.place}: duplicate: {value} is listed before, at {first}")
            paths.append(path)
    _refuse(problems, "mend or remove these rows")
    return paths


# ---------------------------------------------------------------------------------------------------- Hugging Face


def _from_hub(settings: Data) -> list[Clip]:
    table = _open_dataset(settings)
    columns = list(table.column_names)
    video = _column(settings.path, columns, VIDEO_COLUMNS, settings.video_column, "video_column")
    caption = _caption_column(settings.path, columns, settings)
    table = _undecoded(table, video)
    others = table.remove_columns([video])
    names = [f"{settings.path}[{row}]" for row in range(len(table))]
    entries = [_Entry(name, dict(values)) for name, values in zip(names, others, strict=True)]
    clips = []
    for row, entry in enumerate(entries):
        extra = {k: v for k, v in entry.values.items() if k != caption}
        clips.append(Clip(Embedded(table, row, video, entry.place), _words(entry, caption), entry.place, extra))
    if not clips:
        raise DataError(f"{settings.path}: no clips; the dataset has no rows")
    return _with_captions(clips, settings, [f"{name}: no caption" for name in names])


def _library() -> Any:
    """Hugging Face's `datasets`, imported by name: type checkers take the shelf datasets/ of this repository for it."""
    return importlib.import_module("datasets")


def _open_dataset(settings: Data) -> Any:
    """A map-style dataset of one split, from disk (`save_to_disk`) or by name."""
    datasets = _library()
    local = Path(settings.path)
    saved = any((local / name).is_file() for name in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            found = datasets.load_from_disk(settings.path)
        else:
            found = datasets.load_dataset(settings.path, revision=settings.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{settings.path}: the Hugging Face dataset cannot be loaded ({error})") from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    names = _listed(found)
    if settings.split is None and len(found) == 1:
        return next(iter(found.values()))
    if settings.split not in found:
        missing = f"no split {settings.split!r} ({_split_setting(settings)})"
        asked = "set data.split" if settings.split is None else missing
        raise DataError(f"{settings.path}: {asked}; it has {names}")
    return found[settings.split]


def _undecoded(table: Any, column: str) -> Any:
    """Videos as path and bytes: decoding is ours, and the library's own needs torchcodec."""
    datasets = _library()
    if isinstance(table.features[column], datasets.Video):
        return table.cast_column(column, datasets.Video(decode=False))
    return table


# ---------------------------------------------------------------------------------------------------- shared


def _column(where: str, columns: Sequence[str], aliases: Sequence[str], chosen: str | None, setting: str) -> str:
    """The chosen column, or the one with a known name; raises DataError if there is none or more than one."""
    known = [chosen] if chosen is not None else list(aliases)
    found = [name for name in known if name in columns]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{where}: columns {' and '.join(found)} both qualify; choose one with data.{setting}")
    raise DataError(f"{where}: no column {' or '.join(known)}; it has {', '.join(columns)} (set data.{setting})")


def _caption_column(where: str, columns: Sequence[str], settings: Data) -> str | None:
    wanted = settings.caption_column
    absent = wanted is None and not set(CAPTION_COLUMNS) & set(columns)
    if absent and settings.captions == "optional":
        return None
    remedy = "caption_column, or data.captions=optional" if absent else "caption_column"
    return _column(where, columns, CAPTION_COLUMNS, wanted, remedy)


def _words(entry: _Entry, column: str | None) -> str:
    value = entry.values.get(column) if column is not None else None
    if value is not None and not isinstance(value, str):
        raise DataError(f"{entry.place}: the caption is not a text but {type(value).__name__} {value!r}")
    return (value or "").strip()


def _with_captions(clips: list[Clip], settings: Data, complaints: Sequence[str]) -> list[Clip]:
    if settings.captions == "required":
        problems = [text for clip, text in zip(clips, complaints, strict=True) if not clip.caption]
        _refuse(problems, "write them, or set data.captions=optional")
    return clips


def _refuse(problems: Sequence[str], remedy: str) -> None:
    if problems:
        more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError("\n".join(problems[:5]) + more + f"\n{remedy}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _is_metadata(path: Path) -> bool:
    return path.stem == "metadata" and path.suffix.lower() in TABLES


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
