"""Measures that make a run need less memory, from the fastest to the smallest, and the choice among them.

A measure is one entry of `MEASURES`: its name, the settings that it sets, and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from inflate.training.cards import Card
from inflate.training.cost import Cost

Settings = Mapping[str, Any]
"""All settings of a run, by dotted name."""


@dataclass(frozen=True)
class Measure:
    """Something that lessens a run's memory. `settings` gives, for a run's settings, those to change; none: no use."""

    name: str
    price: str
    settings: Callable[[Settings], dict[str, Any]]


def _set(**wanted: Any) -> Callable[[Settings], dict[str, Any]]:
    """Settings that are set where a run has them, in whatever group; the group stands before two underscores."""
    dotted = {name.replace("__", "."): value for name, value in wanted.items()}
    return lambda run: {name: value for name, value in dotted.items() if name in run and run[name] != value}


def _single_clips(run: Settings) -> dict[str, Any]:
    batch = run["training.batch"]
    accumulate = run["training.accumulate"]
    return {"training.batch": 1, "training.accumulate": batch * accumulate} if batch > 1 else {}


def _cached(run: Settings) -> dict[str, Any]:
    return {"data.cache": "cache"} if run["data.cache"] is None else {}


def _draws(run: Settings) -> dict[str, Any]:
    animates = run.get("stage") == "image_to_video" and not run["data.cache_draws"]
    return {"data.cache_draws": 4} if animates else {}


FASTEST = _set(memory__recompute="nothing")
"""What a ladder begins with: the run without measures that cost time."""
MEASURES = (
    Measure("cached clips", "`inflate data cache` first, and disk", _cached),
    Measure("cached condition frames", "4 noised first frames per window in place of ever new ones", _draws),
    Measure("half precision", "rounding to bf16", _set(training__precision="bf16")),
    Measure("one preview at a time", "fewer previews", _set(text_to_video__preview_clips=1)),
    Measure("one held-out clip at a time", "a coarser held-out loss", _set(
        image_to_video__held_out_clips=1, text_to_video__held_out_clips=1
    )),
    Measure("single clips", "more passes per step", _single_clips),
    Measure("recomputation", "a second forward pass", _set(memory__recompute="units")),
)  # fmt: skip
"""In the order in which they are taken."""
BEFOREHAND = ("data.cache", "data.cache_draws")
"""Settings of measures that take work before the run: it cannot choose them by itself."""


@dataclass(frozen=True)
class Step:
    """A run with the measures up to one."""

    measure: str
    price: str
    changes: dict[str, Any] = field(hash=False)
    """settings that differ from those of the run as asked"""


@dataclass(frozen=True)
class Rung(Step):
    """A step whose cost is known."""

    cost: Cost = field(hash=False)


def steps(run: Settings) -> list[Step]:
    """The run as asked, without measures that cost time, and then with one measure more at each step."""
    found = [Step("as asked", "", {})]
    changes = FASTEST(run)
    if changes:
        found.append(Step("without recomputation", "memory", changes))
    for measure in MEASURES:
        wanted = measure.settings({**run, **changes})
        merged = {**changes, **wanted}
        changes = {name: value for name, value in merged.items() if run[name] != value}
        if changes not in [step.changes for step in found]:
            found.append(Step(measure.name, measure.price, changes))
    return found


def without_preparation(found: Sequence[Step]) -> list[Step]:
    """Steps that a run can take by itself: without what would have to be done before it."""
    able = [replace(step, changes=_able(step.changes)) for step in found]
    return [step for place, step in enumerate(able) if step.changes not in [one.changes for one in able[:place]]]


def _able(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if name not in BEFOREHAND}


def choose(rungs: Sequence[Rung], card: Card) -> Rung | None:
    """The fastest of those that fit, the first of equally fast ones; None where none fits."""
    fitting = [rung for rung in rungs if rung.cost.peak <= card.usable]
    return min(fitting, key=lambda rung: card.seconds(rung.cost.half_flops, rung.cost.full_flops), default=None)
