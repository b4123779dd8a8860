"""The digest of the clips: what changes it and what does not."""

import shutil
from pathlib import Path

import pytest
from clip_files import numbered

from inflate.data.clips import ClipDataset, Data
from inflate.errors import DataError


@pytest.fixture
def folder(make_clip, tmp_path):
    for number in range(3):
        make_clip(f"clips/{number}.mp4", numbered(8, 32, 32))
        (tmp_path / "clips" / f"{number}.txt").write_text(f"clip {number}")
    return tmp_path / "clips"


def dataset(folder: Path, **changes: object) -> ClipDataset:
    return ClipDataset(Data(**({"path": str(folder), "frames": 4, "height": 32, "width": 32} | changes)))


def test_it_is_the_same_for_the_same_clips_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    first = dataset(folder).digest()
    assert first.startswith("sha256:")
    assert len(first) == len("sha256:") + 64
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert dataset(tmp_path / "elsewhere", memory_megabytes=0, max_dropped=0.5).digest() == first


def test_it_changes_with_the_windows_and_with_every_clip(make_clip, folder: Path) -> None:
    seen = [dataset(folder, **change).digest() for change in ({}, {"frames": 5}, {"stride": 2}, {"fps": 8.0})]
    (folder / "1.txt").write_text("another caption")
    seen.append(dataset(folder).digest())
    with (folder / "2.mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")  # an empty box: the same pictures in more bytes
    seen.append(dataset(folder).digest())
    make_clip("clips/2.mp4", numbered(9, 32, 32))
    seen.append(dataset(folder).digest())
    (folder / "0.mp4").rename(folder / "3.mp4")
    (folder / "0.txt").rename(folder / "3.txt")
    seen.append(dataset(folder).digest())
    (folder / "3.mp4").unlink()
    seen.append(dataset(folder).digest())
    assert len(set(seen)) == len(seen)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    data = dataset(folder)
    (folder / "0.mp4").unlink()
    with pytest.raises(DataError, match=r"0\.mp4: cannot be read"):
        data.digest()
