"""What an adapter's settings may be, and how a weight is written."""

from pathlib import Path
from typing import Any

import pytest

from inflate import shelves
from inflate.adapters.settings import FILE_NAME, AdapterSettings, Weighted, find
from inflate.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "adapter.rank=0"),
        ({"alpha": 0.0}, "adapter.alpha=0.0: must be positive"),
        ({"alpha": float("nan")}, "adapter.alpha=nan"),
        ({"dropout": 1.0}, "adapter.dropout=1.0"),
        ({"targets": []}, "adapter.kind=lora needs adapter.targets"),
        ({"kind": "none"}, "adapter.kind is none: set one of lora, dora"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdapterSettings(**{"kind": "lora", "targets": ["to_q"], **changes})


def test_alpha_is_the_rank_where_none_is_set() -> None:
    assert AdapterSettings("lora", rank=8, targets=["to_q"]).strength == 8
    assert AdapterSettings("lora", rank=8, alpha=2, targets=["to_q"]).strength == 2


def test_a_weight_stands_behind_a_colon(tmp_path: Path) -> None:
    assert Weighted.parse("a.safetensors") == Weighted(Path("a.safetensors"), 1.0)
    assert Weighted.parse("b/a.safetensors:-0.5") == Weighted(Path("b/a.safetensors"), -0.5)
    strange = tmp_path / "a:2"
    strange.touch()
    assert Weighted.parse(str(strange)) == Weighted(strange, 1.0)
    for text in ("a.safetensors:much", "a.safetensors:nan", "a.safetensors:"):
        with pytest.raises(ConfigError, match="write FILE or FILE:WEIGHT"):
            Weighted.parse(text)


@pytest.mark.parametrize(
    "place", ["pan.safetensors", f"pan/{FILE_NAME}", f"pan/export/{FILE_NAME}", "adapters/pan.safetensors",
              f"adapters/pan/{FILE_NAME}"],
)  # fmt: skip
def test_a_name_means_the_file_that_is_there(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no adapter pan: there is none of pan.safetensors, pan/pytorch_lora"):
        find("pan")
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).touch()
    assert Weighted.parse("pan:0.8") == Weighted(Path(place), 0.8)
    assert Weighted.parse("pan") == Weighted(Path(place), 1.0)


def test_a_name_is_told_where_no_shelf_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelves, "SHELVES", ("nowhere",))
    with pytest.raises(ConfigError, match="no adapter pam: there is none of .*, nor is it one that came with"):
        find("pam")


@pytest.mark.parametrize("name", ["~/pan.safetensors", "~/pan"])
def test_a_file_at_home_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of key=~/pan.safetensors as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pan.safetensors").touch()
    assert Weighted.parse(f"{name}:0.5") == Weighted(tmp_path / "pan.safetensors", 0.5)
