"""The adapters on the shelf do what they say, on the model that comes with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from inflate import shelves
from inflate.adapters import file, verify
from inflate.adapters.settings import find
from inflate.data.camera import MOVES
from inflate.families.svd import SVD
from inflate.models.unet import VideoUNet

SHIPPED = sorted((shelves.find() / "adapters").glob("*.safetensors"))


@pytest.fixture(scope="module")
def unet() -> VideoUNet:
    return SVD.load("pocket-svd").unet


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_adapter_of_the_shelf_is_proved_on_its_base(path: Path, unet: VideoUNet) -> None:
    outcome = verify.check(path, unet)
    assert outcome.max_abs_diff <= verify.TOLERANCE
    assert outcome.effect > 0.1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_adapter_of_the_shelf_tells_what_anyone_may_know(path: Path) -> None:
    about = file.read(path).about
    assert path.stem in MOVES
    assert (about["licence"], about["base"]["name"]) == ("apache-2.0", "pocket-svd")
    assert about["run"]["stopped"] == "finished"
    places = re.findall(r"(?:path|output|image_encoder|cache): (.+)", about["config"])
    assert len(places) >= 4
    assert not [place for place in places if Path(place).is_absolute()]


def test_an_adapter_of_the_shelf_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert SHIPPED
    assert all(find(path.stem) == path for path in SHIPPED)
