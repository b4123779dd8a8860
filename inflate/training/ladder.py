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


ASKED = {
    "memory.decode_rows": (0,), "memory.encode_frames": (0,), "memory.base": ("as_loaded", "bf16", "int8"),
    "training.precision": ("no", "bf16"),
}  # fmt: skip
"""Values in whose place a measure may put its own; others were asked for, and go as far or further."""


def _set(**wanted: Any) -> Callable[[Settings], dict[str, Any]]:
    """Settings that are set where a run has them, in whatever group; the group stands before two underscores."""
    dotted = {name.replace("__", "."): value for name, value in wanted.items()}
    return lambda run: {
        name: value
        for name, value in dotted.items()
        if name in run and run[name] != value and run[name] in ASKED.get(name, (run[name],))
    }


def _where(condition: Callable[[Settings], bool], **wanted: Any) -> Callable[[Settings], dict[str, Any]]:
    """The same, for the runs of which a condition holds."""
    change = _set(**wanted)
    return lambda run: change(run) if condition(run) else {}


def _decodes(run: Settings) -> bool:
    """Whether a decoder is trained, which has no transformers but one."""
    return run.get("stage") == "decoder"


def _denoises(run: Settings) -> bool:
    return not _decodes(run)


def _nests(run: Settings) -> bool:
    """Whether a block may be recomputed in two levels, which cannot be compiled."""
    return _denoises(run) and not run.get("training.compile", False)


def _learns_whole(run: Settings) -> bool:
    """Whether the model's own weights learn: enough of them that their optimiser counts."""
    return run.get("adapter.kind", "none") == "none"


def _steps_by_itself(run: Settings) -> bool:
    """Whether each backward pass makes one step of one network."""
    return _learns_whole(run) and _denoises(run) and run["training.accumulate"] == 1


def _has_frozen(run: Settings) -> bool:
    """Whether layers of the trained network stay as they are, and may be rounded."""
    stage = run.get("stage")
    some_stay = "temporal" in (run.get("image_to_video.trainable"), stage) or stage in ("context", "adapt")
    merged = run.get("text_to_video.domain_adapter") is not None  # into weights that are then not to be rounded
    return _denoises(run) and not merged and (some_stay or not _learns_whole(run))


def _single_clips(run: Settings) -> dict[str, Any]:
    batch = run["training.batch"]
    accumulate = run["training.accumulate"]
    return {"training.batch": 1, "training.accumulate": batch * accumulate} if batch > 1 else {}


def _cached(run: Settings) -> dict[str, Any]:
    return {"data.cache": "cache"} if run["data.cache"] is None else {}


def _draws(run: Settings) -> dict[str, Any]:
    animates = run.get("stage") == "image_to_video" and not run["data.cache_draws"]
    return {"data.cache_draws": 4} if animates else {}


def _halved(run: Settings) -> dict[str, Any]:
    return {"training.precision": "bf16"} if run["training.precision"] == "no" else {}


FASTEST = _set(memory__recompute="nothing", memory__offload=False, memory__feed_forward_parts=1)
"""What a ladder begins with: the run without measures that cost time."""
MEASURES = (
    Measure("cached clips", "`inflate data cache` first, and disk", _cached),
    Measure("cached condition frames", "4 noised first frames per window in place of ever new ones", _draws),
    Measure("frames encoded one by one", "smaller calls of the encoder", _set(memory__encode_frames=1)),
    Measure("previews by strips", "a tenth more arithmetic in previews", _where(_denoises, memory__decode_rows=16)),
    Measure("half precision", "rounding to bf16", _halved),
    Measure("one preview at a time", "fewer previews", _set(
        text_to_video__preview_clips=1, image_text_to_video__preview_clips=1, i2vgen_xl__preview_clips=1
    )),
    Measure("single clips", "more passes per step", _single_clips),
    Measure("weights in bf16", "those that learn whole are rounded at random", _where(
        _denoises, training__precision="pure_bf16"
    )),
    Measure("previews in bf16", "they are rounded", _where(_denoises, memory__decode_bf16=True)),
    Measure("wide feed-forwards recomputed", "a fifth of a forward pass", _where(
        _denoises, memory__recompute="feed_forward", memory__feed_forward_parts=8
    )),
    Measure("recomputation but for attention", "most of a second forward pass", _where(
        _denoises, memory__recompute="all_but_attention"
    )),
    Measure("recomputation", "a second forward pass", _set(memory__recompute="units")),
    Measure("decoding by strips", "a third forward pass", _where(_decodes, memory__decode_rows=16)),
    Measure("moments in 8 bits", "rounding", _where(_learns_whole, training__optimizer="adamw8bit")),
    Measure("no average", "the last weights in its place", _where(_learns_whole, training__ema=0.0)),
    Measure("steps in the backward pass", "no clipping of gradients", _where(
        _steps_by_itself, training__step_in_backward=True, training__gradient_clip=0.0
    )),
    Measure("inputs of units on the CPU", "its memory, and copies beside the arithmetic", _where(
        _denoises, memory__offload=True
    )),
    Measure("frozen weights in int8", "rounding to 8 bits, read twice per step", _where(
        _has_frozen, memory__base="int8"
    )),
    Measure("nested recomputation", "a third forward pass of transformers", _where(
        _nests, memory__recompute="nested"
    )),
    Measure("frozen weights in nf4", "rounding to 4 bits: over the weights as loaded an adapter is worse", _where(
        _has_frozen, memory__base="nf4"
    )),
)  # fmt: skip
"""In the order in which they are taken: first what costs next to nothing, then exact ones and those that round by what
they cost in time and in precision."""
BEFOREHAND = ("data.cache", "data.cache_draws")
"""Settings of measures that take work before the run: it cannot choose them by itself."""
ALONE = ("training.step_in_backward", "training.gradient_clip")
"""Settings of measures that only a run of one process may take."""


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


def without(found: Sequence[Step], settings: Sequence[str]) -> list[Step]:
    """Steps without these settings; those that then repeat an earlier one are left out."""
    able = [
        replace(step, changes={name: value for name, value in step.changes.items() if name not in settings})
        for step in found
    ]
    return [step for place, step in enumerate(able) if step.changes not in [one.changes for one in able[:place]]]


def choose(rungs: Sequence[Rung], card: Card) -> Rung | None:
    """The fastest of those that fit, the first of equally fast ones; None where none fits."""
    fitting = [rung for rung in rungs if rung.cost.peak <= card.usable]
    return min(fitting, key=lambda rung: card.seconds(rung.cost.half_flops, rung.cost.full_flops), default=None)
