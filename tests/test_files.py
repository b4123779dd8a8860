"""Files and folders that are whole or do not exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from inflate.files import new_file, new_folder, write_text


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


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "half").touch()
    with new_folder(tmp_path / "a") as aside:
        (aside / "new").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["new"]


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
