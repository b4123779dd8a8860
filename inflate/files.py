"""Files and folders that are whole or do not exist: written aside, flushed to the disk, renamed into place."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `folder`; on success it takes its place, and what stood there goes.

    Where the body or the renaming fails, what stood there is there again and the hidden folder is gone. A killed
    process leaves the hidden one behind, which the next writer of the same folder removes. OSError as the disk has it.
    """
    aside, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    discard(aside)
    aside.mkdir()
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            flush(path)
        discard(old)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)  # first, so that a failure below keeps it, too
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; on success it takes its place. OSError as the disk has it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def discard(folder: Path) -> None:
    """Remove a folder if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
