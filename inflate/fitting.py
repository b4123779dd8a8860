"""Which measures make a run fit a card: as a table (`inflate plan`), or chosen at its start (`training.fit`)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from inflate.errors import ConfigError
from inflate.planning import MOST_WORKERS, Planner, adaptable, assignments, costs
from inflate.tables import aligned
from inflate.training.cards import USABLE, Card
from inflate.training.cost import PHASES
from inflate.training.ladder import ALONE, BEFOREHAND, Rung, Step, choose, without
from inflate.training.processes import join_processes, together

log = logging.getLogger(__name__)

GB = 1e9


def plan(
    planner: Planner, cards: Sequence[Card], say: Callable[[str], None], tell: Callable[[str], None] = log.info
) -> bool:
    """Print the table, and for each card the choice; whether there is one for all. `tell` hears how far it is."""
    found = rungs(planner, planner.steps(), tell)
    say(table(found, cards[0] if len(cards) == 1 else None))
    chosen = [(card, choose(found, card)) for card in cards]
    for card, rung in chosen:
        say("\n" + (refusal(planner, found, card) if rung is None else verdict(rung, card)))
    return all(rung is not None for _, rung in chosen)


def rungs(planner: Planner, wanted: Sequence[Step], tell: Callable[[str], None]) -> list[Rung]:
    """Steps with their costs; `tell` hears of each as it is found."""
    found = []
    for step, cost in zip(wanted, costs(planner, [step.changes for step in wanted]), strict=True):
        found.append(Rung(**vars(step), cost=cost))
        tell(f"{len(found)} of {len(wanted)}: {step.measure}, {cost.peak / GB:.2f} GB")
    return found


def first_fitting(planner: Planner, wanted: Sequence[Step], card: Card) -> tuple[Rung | None, list[Rung]]:
    """The fastest of the first steps of which one fits, and all that were looked at.

    As many at a time on any machine, whatever its processors: a run that goes on elsewhere is to choose the same.
    """
    seen: list[Rung] = []
    while len(seen) < len(wanted):
        seen += rungs(planner, wanted[len(seen) :][:MOST_WORKERS], log.info)
        if (chosen := choose(seen, card)) is not None:
            return chosen, seen
    return None, seen


def fitted(config: Any, recipe: Path, sources: Sequence[str]) -> tuple[Any, dict[str, int] | None]:
    """A run's settings with the fastest measures that fit the card of `training.fit`, and the peaks by phase to come.

    Without that setting, all as it is. Every process of a run calls it; the main one works it out. What is chosen says
    all: it is not to be fitted again where these settings are run again. ConfigError where nothing fits.
    """
    if config.training.fit is None:
        return config, None
    card = Card.parse(config.training.fit, "training.fit=")
    if join_processes().sharding:
        raise ConfigError("training.fit knows nothing of sharded weights: leave it out, and set the measures yourself")
    planner = Planner(recipe, sources, join_processes().device.type == "cuda")
    found: list[Rung | None] = [None]
    with together():
        if join_processes().is_main_process:
            log.info("looking for the fastest way that fits %s (training.fit)", card)
            barred = BEFOREHAND if join_processes().num_processes == 1 else (*BEFOREHAND, *ALONE)
            chosen, seen = first_fitting(planner, without(planner.steps(), barred), card)
            if chosen is None:
                raise ConfigError(f"training.fit={config.training.fit}: {refusal(planner, seen, card)}")
            found = [chosen]
    rung = broadcast_object_list(found)[0]
    log.info(verdict(rung, card))
    return planner.config({**rung.changes, "training.fit": None}), rung.cost.peaks


# --- what is told -----------------------------------------------------------------------------------------------------


def table(rungs: Sequence[Rung], card: Card | None) -> str:
    """The parts of the run as asked, then a line for each rung; sizes in GB."""
    asked = rungs[0].cost
    parts = {"weights": asked.weights, "frozen networks": asked.frozen, "gradients": asked.gradients,
             "optimiser": asked.optimizer, "average": asked.average}  # fmt: skip
    told = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    phases = [phase for phase in PHASES if any(phase in rung.cost.peaks for rung in rungs)]
    timed = card is not None and card.timed
    head = ("GB at most", *phases, "in all", "TFLOP/step", *(("s/step, estimated",) if timed else ()), "for")
    lines = aligned([head, *(_line(rung, phases, card if timed else None) for rung in rungs)])
    return "\n".join([f"as asked, GB: {told}; {asked.trained / 1e6:,.1f} M parameters are trained", "", *lines])


def _line(rung: Rung, phases: Sequence[str], card: Card | None) -> tuple[str, ...]:
    cost = rung.cost
    sizes = [f"{cost.peaks.get(phase, 0) / GB:.2f}" for phase in phases]
    time = [] if card is None else [f"{card.seconds(cost.half_flops, cost.full_flops):.2f}"]
    name = rung.measure if not rung.price else f"+ {rung.measure}"
    return name, *sizes, f"{cost.peak / GB:.2f}", f"{cost.flops / 1e12:.2f}", *time, rung.price


def verdict(rung: Rung, card: Card) -> str:
    """What to add to a run's command so that it fits."""
    added = " ".join(assignments(rung.changes))
    told = f"fits {card}: {rung.cost.peak / GB:.2f} of {card.usable / GB:.2f} GB ({USABLE:.0%} of its memory)"
    return f"{told}; {f'add {added}' if added else 'as asked'}"


def refusal(planner: Planner, rungs: Sequence[Rung], card: Card) -> str:
    """By how much the smallest rung does not fit, and what would help."""
    least = min(rungs, key=lambda rung: rung.cost.peak)
    over = (least.cost.peak - card.usable) / GB
    options = planner.smaller(least.changes)
    found = zip(options, costs(planner, [{**least.changes, **one} for one in options]), strict=True)
    helped = [f"{' '.join(assignments(one))} ({cost.peak / GB:.2f} GB)" for one, cost in found]
    helped += ["an adapter (adapters/temporal_lora.yaml)"] if adaptable(planner.config()) else []
    return (
        f"nothing fits {card}: with {' '.join(assignments(least.changes)) or 'the run as asked'} it needs "
        f"{least.cost.peak / GB:.2f} GB ({least.cost.limit}), {over:.2f} GB more than the {card.usable / GB:.2f} that "
        f"may be filled; smaller are {' or '.join(helped) or 'smaller data.buckets'}"
    )
