"""`training.fit`: the choice of a run's own measures, over costs made by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from inflate import fitting, planning
from inflate.errors import ConfigError
from inflate.planning import Planner
from inflate.training.cost import Cost

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "svd_finetune.py"
SOURCES = [str(ROOT / "recipes" / "svd_pocket.yaml"), "training.precision=no", "training.fit=16GB"]


def made_up(_: Planner, wanted: Sequence[Mapping[str, Any]]) -> Iterator[Cost]:
    """Full precision takes 10 GB and eight times as long as half precision, which takes 5."""
    for changes in wanted:
        half = "training.precision" in changes
        work = (10**12, 0) if half else (0, 2 * 10**12)
        yield Cost(0, 0, 0, 0, 0, 0, {"forward": (5 if half else 10) * 10**9}, 0, *work)


@pytest.mark.parametrize("processors", [1, 2, 64])
def test_the_choice_is_the_same_on_every_machine_and_is_not_made_again(
    processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(fitting, "costs", made_up)
    monkeypatch.setattr(planning.os, "cpu_count", lambda: processors)
    asked = Planner(RECIPE, SOURCES).config()
    config, foreseen = fitting.fitted(asked, RECIPE, SOURCES)
    assert (config.training.precision, config.training.fit) == ("bf16", None)
    assert foreseen == {"forward": 5 * 10**9}
    assert fitting.fitted(config, RECIPE, SOURCES) == (config, None)


def test_a_card_too_small_is_refused_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(fitting, "costs", made_up)
    sources = [*SOURCES, "training.fit=4GB"]
    with pytest.raises(ConfigError, match=r"training.fit=4GB: nothing fits 4GB: .* needs 5.00 GB \(forward\), 1.40 GB"):
        fitting.fitted(Planner(RECIPE, sources).config(), RECIPE, sources)
