"""Files and folders that are whole or do not exist: written aside, flushed to the disk, renamed into place."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `folder`; on success it takes its place, and what stood there goes.

    Where the body or the renaming fails, what stood there is there again and the hidden folder is gone. What killed
    processes left of this folder is removed. OSError as the disk has it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent, glob.escape(folder.name))
    aside, old = _hidden(folder, "partial"), _hidden(folder, "old")
    aside.mkdir()
    try:
        yield aside
        mode = aside.stat().st_mode & 0o666
        for path in [*aside.rglob("*"), aside]:
            if path.is_file():
                path.chmod(mode)  # as the user's mask has it: safetensors lets nobody else read
            flush(path)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _hidden(path, "partial")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # as the user's mask has it: safetensors lets nobody else read
        yield aside
        aside.chmod(mode)
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_files(folder: Path, name: str) -> Iterator[Path]:
    """Yield an empty hidden folder in `folder`; on success what is in it goes there, and otherwise none of it does.

    Each file takes the place of one of its own name. What killed processes left by this `name` is removed. OSError as
    the disk has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, glob.escape(name))
    aside = _hidden(folder / name, "partial")
    aside.mkdir()
    try:
        yield aside
        for path in sorted(aside.iterdir()):
            path.replace(folder / path.name)
        flush(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder, which is never seen half-removed."""
    doomed = folder.rename(_hidden(folder, "partial"))
    shutil.rmtree(doomed)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Remove what killed processes of this machine left of files and folders that match a pattern, in `parent`.

    An old folder whose successor was never put in its place is put back.
    """
    for path in [*parent.glob(f".{pattern}.*.partial"), *parent.glob(f".{pattern}.*.old")]:
        name, process, kind = path.name[1:].rsplit(".", 2)
        if not process.isdigit() or _is_running(int(process)):
            continue
        if kind == "old" and not (parent / name).exists():
            path.rename(parent / name)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_leftover(path: Path) -> bool:
    """Whether a path is named as what is being written, or as what a killed process left of it."""
    return path.name.startswith(".") and path.suffix in (".partial", ".old")


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step."""
    with new_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


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
