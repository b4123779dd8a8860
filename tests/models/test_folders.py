"""Where names of models point, and how exports are written."""

from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from inflate.errors import CheckpointError
from inflate.models import folders
from inflate.models.unet import VideoUNet


def test_shipped_names_stand_for_folders_of_the_package() -> None:
    package = Path(folders.__file__).parents[1]
    assert folders.resolve("pocket") == package / "pocket"
    assert folders.SHIPPED["pocket-t2v"] == package / "pocket_t2v"
    assert folders.holds("pocket", UNet2DConditionModel)
    assert not folders.holds("pocket", VideoUNet)


def test_a_name_whose_folder_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(folders.SHIPPED, "pocket-t2v", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="pocket-t2v does not exist"):
        folders.resolve("pocket-t2v")


@pytest.mark.parametrize("mark", ["model_index.json", "inflate.json"])
def test_an_export_is_replaced_and_other_files_are_not(tmp_path: Path, mark: str) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="holds other files"):
        folders.write(target, lambda aside: None)
    (target / mark).touch()
    folders.write(target, lambda aside: (aside / "new").touch())
    assert [path.name for path in target.iterdir()] == ["new"]
