"""The ladder of measures and the choice among its rungs, on costs made by hand; cards by name and by memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from inflate.errors import ConfigError
from inflate.training.cards import Card
from inflate.training.cost import Cost
from inflate.training.ladder import MEASURES, Rung, choose, steps, without_preparation

RUN = {
    "stage": "image_to_video", "training.batch": 2, "training.accumulate": 3, "training.precision": "no",
    "data.cache": None, "data.cache_draws": 0, "memory.recompute": "units",
    "image_to_video.held_out_clips": 32,
}  # fmt: skip


def cost(peak: float, half: float, full: float = 0.0) -> Cost:
    flops = {"half_flops": int(half * 1e12), "full_flops": int(full * 1e12)}
    return Cost(0, 0, 0, 0, 0, 0, {"forward": int(peak * 1e9), "update": 1}, 0, **flops)


def made_up(changes: Mapping[str, Any]) -> Cost:
    """Recomputing halves the memory for a third more work; each other measure takes 1 GB."""
    recomputing = changes.get("memory.recompute", "units") == "units"
    return cost((20 if recomputing else 40) - len(changes), 4 if recomputing else 3)


def test_a_ladder_begins_as_asked_and_ends_with_every_measure_that_applies() -> None:
    rungs = steps(RUN)
    assert [rung.measure for rung in rungs[:2]] == ["as asked", "without recomputation"]
    assert rungs[-1].changes == {
        "data.cache": "cache", "data.cache_draws": 4, "training.precision": "bf16", "training.batch": 1,
        "training.accumulate": 6, "image_to_video.held_out_clips": 1,
    }  # fmt: skip
    applied = {rung.measure for rung in rungs[2:]}
    assert applied == {measure.name for measure in MEASURES} - {"one preview at a time"}


def test_what_a_run_has_already_is_no_measure() -> None:
    cached = {**RUN, "data.cache": "mine", "data.cache_draws": 2, "training.batch": 1, "training.precision": "fp16"}
    changes = steps(cached)[-1].changes
    assert changes == {"image_to_video.held_out_clips": 1, "training.precision": "bf16"}
    least = {**cached, "image_to_video.held_out_clips": 1, "training.precision": "bf16"}
    assert [rung.measure for rung in steps(least)] == ["as asked", "without recomputation"]


def test_the_fastest_that_fits_is_chosen() -> None:
    rungs = [Rung(**vars(step), cost=made_up(step.changes)) for step in steps(RUN)]
    large, small, tiny = (choose(rungs, Card(f"{size}", int(size * 1e9))) for size in (80, 22, 5))
    assert large is not None
    assert large.measure == "without recomputation"
    assert small is not None
    assert small.cost.peak <= 22e9 * 0.9
    assert tiny is None


@pytest.mark.parametrize(("text", "memory"), [("16GB", 16), ("7.5 gb", 7.5), ("H100", 80), ("RTX-4090", 24)])
def test_a_card_is_named_or_sized(text: str, memory: float) -> None:
    assert Card.parse(text).memory == memory * 1e9


@pytest.mark.parametrize("text", ["0GB", "large", "-3GB", "16"])
def test_another_text_is_refused_with_the_cards_that_are_known(text: str) -> None:
    with pytest.raises(ConfigError, match=r"16GB, or one of H200"):
        Card.parse(text)


def test_half_precision_counts_for_less_time() -> None:
    card = Card.parse("H100")
    assert card.seconds(10**15, 0) < card.seconds(0, 10**15) / 10


def test_a_run_chooses_for_itself_only_what_needs_no_work_before_it() -> None:
    able = without_preparation(steps(RUN))
    assert not any(name.startswith("data.cache") for step in able for name in step.changes)
    assert [step.measure for step in able] == [
        step.measure for step in steps(RUN) if step.measure not in ("cached clips", "cached condition frames")
    ]
