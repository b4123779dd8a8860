"""Which settings may change when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from inflate.errors import CheckpointError, ConfigError
from inflate.training.changes import all_settings, refuse, told
from inflate.training.settings import Training


def test_all_settings_are_those_of_the_script_and_of_the_loop(tmp_path: Path) -> None:
    found = all_settings(Training(output=tmp_path, betas=(0.5, 0.9)), "model: {path: pocket}\nday: 2025-01-01\n")
    assert found["model.path"] == "pocket"
    assert found["training.betas"] == [0.5, 0.9]
    assert found["day"] == "2025-01-01"
    with pytest.raises(ConfigError, match="config:1: not valid YAML"):
        all_settings(Training(), "a: [")


@pytest.mark.parametrize("name", ["model.path", "decoder.l1", "image_to_video.P_mean", "stage", "data.frames"])
def test_what_decides_the_weights_must_not_change(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"x was made with other settings: {name} was a, is 2; put them back"):
        refuse("x", {name: "a", "same": 1}, {name: 2, "same": 1}, "")


@pytest.mark.parametrize("name", ["training.lr", "training.betas", "data.held_out", "decoder.lr", "memory.base"])
def test_how_it_learns_may_change_and_is_told(name: str) -> None:
    refuse("x", {name: 1}, {name: None}, "")
    assert list(told({name: 1}, {name: None}, "", 7)) == [f"{name} was 1, is null from step 7 on"]


@pytest.mark.parametrize("name", ["training.workers", "training.evaluate_every", "data.path", "memory.recompute"])
def test_what_no_weight_rests_on_may_change(name: str) -> None:
    refuse("x", {name: 1}, {name: 2}, "")
    assert list(told({name: 1}, {name: 2}, "", 7)) == []


def test_a_setting_of_another_version_is_told() -> None:
    then: dict[str, Any] = {"decoder.old": 1}
    refuse("x", then, {"decoder.new": 2}, "")
    assert list(told(then, {"decoder.new": 2}, "", 7)) == [
        "decoder.old was 1, is not a setting from step 7 on", "decoder.new was not a setting, is 2 from step 7 on",
    ]  # fmt: skip


def test_paths_are_compared_by_where_they_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("model", "other/model"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "other")
    for now in ("../model", str(tmp_path / "model")):
        refuse("x", {"model.path": "model"}, {"model.path": now}, str(tmp_path))
    with pytest.raises(CheckpointError, match=r"model\.path was model, is model"):
        refuse("x", {"model.path": "model"}, {"model.path": "model"}, str(tmp_path))
    refuse("x", {"model.path": "moved/model"}, {"model.path": "moved/model"}, str(tmp_path / "gone"))
