"""The ladder of measures and the choice among its rungs, on costs made by hand; cards by name and by memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from inflate.errors import ConfigError
from inflate.training.cards import Card
from inflate.training.cost import Cost
from inflate.training.ladder import ALONE, BEFOREHAND, MEASURES, Rung, choose, steps, without
from inflate.training.memory_settings import Memory

RUN = {
    "stage": "image_to_video", "adapter.kind": "none", "training.batch": 2, "training.accumulate": 3,
    "training.precision": "no", "training.optimizer": "adamw", "training.ema": 0.99,
    "training.step_in_backward": False, "training.gradient_clip": 1.0, "data.cache": None, "data.cache_draws": 0,
    "image_to_video.trainable": "all", "memory.recompute": "units", "memory.feed_forward_parts": 1,
    "memory.offload": False, "memory.encode_frames": 0, "memory.decode_rows": 0, "memory.decode_bf16": False,
    "memory.base": "as_loaded",
}  # fmt: skip
ADAPTER = {**RUN, "adapter.kind": "lora"}
DECODER = {**RUN, "stage": "decoder"}


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
        "data.cache": "cache", "data.cache_draws": 4, "training.precision": "pure_bf16", "training.batch": 1,
        "training.accumulate": 6, "training.optimizer": "adamw8bit", "training.ema": 0.0, "memory.encode_frames": 1,
        "memory.decode_rows": 16, "memory.decode_bf16": True, "memory.recompute": "nested",
        "memory.feed_forward_parts": 8, "memory.offload": True,
    }  # fmt: skip


def applied(run: dict[str, Any]) -> set[str]:
    return {rung.measure for rung in steps(run)}


def test_measures_apply_to_the_runs_that_they_are_for() -> None:
    assert "steps in the backward pass" in applied({**RUN, "training.batch": 1, "training.accumulate": 1})
    whole, adapter, decoder = applied(RUN), applied(ADAPTER), applied(DECODER)
    assert {"moments in 8 bits", "no average"} <= whole - adapter
    assert adapter - whole == {"frozen weights in int8", "frozen weights in nf4"}
    assert "frozen weights in int8" in applied({**RUN, "image_to_video.trainable": "temporal"})
    temporal = {**RUN, "stage": "temporal"}
    assert "frozen weights in nf4" in applied(temporal)
    assert "frozen weights in nf4" not in applied({**temporal, "text_to_video.domain_adapter": "look.safetensors"})
    assert whole - applied({**RUN, "training.compile": True}) == {"nested recomputation"}
    assert decoder - whole == {"decoding by strips"}
    assert not decoder & {"weights in bf16", "previews by strips", "nested recomputation", "inputs of units on the CPU"}
    applying = whole | adapter | decoder | {"steps in the backward pass", "one preview at a time"}
    assert {measure.name for measure in MEASURES} <= applying | {"as asked"}


def test_every_rung_can_be_run() -> None:
    for run in (RUN, ADAPTER, DECODER, {**RUN, "memory.offload": True}):
        for rung in steps(run):
            asked = {name: value for name, value in {**run, **rung.changes}.items() if name.startswith("memory.")}
            memory = Memory(**{name.removeprefix("memory."): value for name, value in asked.items()})
            assert {name: getattr(memory, name.removeprefix("memory.")) for name in asked} == asked


def test_what_a_run_has_already_is_no_measure() -> None:
    last = steps(RUN)[-1]
    assert [rung.measure for rung in steps({**RUN, **last.changes})] == [
        "as asked", "without recomputation", "wide feed-forwards recomputed", "recomputation but for attention",
        "recomputation", "inputs of units on the CPU",
    ]  # fmt: skip
    half = steps({**RUN, "training.precision": "pure_bf16"})
    assert not [rung for rung in half if "training.precision" in rung.changes]


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
    able = without(steps(RUN), BEFOREHAND)
    assert not any(name.startswith("data.cache") for step in able for name in step.changes)
    assert [step.measure for step in able] == [
        step.measure for step in steps(RUN) if step.measure not in ("cached clips", "cached condition frames")
    ]
    alone = {**RUN, "training.batch": 1, "training.accumulate": 1}
    assert "training.gradient_clip" in steps(alone)[-1].changes
    assert "training.gradient_clip" not in without(steps(alone), ALONE)[-1].changes
