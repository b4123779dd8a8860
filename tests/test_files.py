"""Files and folders that are whole or do not exist."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inflate.files import discard, new_file, new_files, new_folder, remove_leftovers, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_new_folder_replaces_a_whole_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with new_folder(tmp_path / "deep" / "a") as aside:
            assert names(aside) == []
            (aside / name).touch()
    assert names(tmp_path / "deep") == ["a"]
    assert names(tmp_path / "deep" / "a") == ["new"]


def test_a_failure_leaves_what_stood_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()

    def fill() -> None:
        with new_folder(tmp_path / "a") as aside:
            (aside / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]


def test_what_stood_there_comes_back_if_the_new_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").touch()
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["old"]


def test_new_files_appear_together(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fill(whole: bool) -> None:
        with new_files(tmp_path, "a") as aside:
            (aside / "a").write_text("new")
            if not whole:
                raise KeyboardInterrupt
            (aside / "b").touch()

    with pytest.raises(KeyboardInterrupt):
        fill(whole=False)
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")
    fill(whole=True)
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a", "b"], "new")


def left_by_the_dead(folder: Path, kind: str) -> Path:
    """What a killed process leaves; its number is above any that a system gives."""
    path = folder.with_name(f".{folder.name}.99999999.{kind}")
    path.mkdir()
    (path / "file").touch()
    return path


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left_by_the_dead(tmp_path / "a", "partial")
    with new_folder(tmp_path / "a") as aside:
        (aside / "new").touch()
    left_by_the_dead(tmp_path / "a", "old")
    remove_leftovers(tmp_path, "*")
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


def test_a_folder_killed_between_its_two_renamings_is_put_back(tmp_path: Path) -> None:
    left_by_the_dead(tmp_path / "a", "old")
    remove_leftovers(tmp_path, "*")
    assert names(tmp_path / "a") == ["file"]


def test_what_another_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".a.{os.getppid()}.partial"
    other.mkdir()
    with new_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == [other.name, "a"]


def test_a_discarded_folder_is_gone(tmp_path: Path) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    discard(tmp_path / "a")
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"

    def fill() -> None:
        with new_file(path) as aside:
            aside.write_text("half")
            raise OSError("full")

    write_text(path, "old")
    with pytest.raises(OSError, match="full"):
        fill()
    assert (names(path.parent), path.read_text()) == (["a.txt"], "old")
    write_text(path, "new")
    assert (names(path.parent), path.read_text()) == (["a.txt"], "new")


def test_what_is_written_may_be_read_by_whom_the_mask_lets(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        with new_file(tmp_path / "one") as aside:
            aside.write_text("")
            aside.chmod(0o600)
        with new_folder(tmp_path / "many") as aside:
            (aside / "deep").mkdir()
            (aside / "deep" / "file").touch(mode=0o600)
    finally:
        os.umask(former)
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "many" / "deep" / "file").stat().st_mode & 0o777 == 0o644
