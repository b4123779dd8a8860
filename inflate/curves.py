"""Plots of what runs recorded over their steps."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inflate.files import new_file
from inflate.measures import SHARES, TRAINING, Rows, overfitting

KINDS = {"history": "", "held_out": "held-out "}
"""The logs of a run, and what a panel's title says before the name of the quantity."""
COLUMNS, WIDTH, HEIGHT, LINE = 3, 12.0, 2.6, 0.22
"""Panels side by side; inches of the figure, of a row of panels, of a line of the legend."""
TIME = "shares of time"
ONE_OF_SEVERAL = re.compile(r"(.+) (at sigma|in) ([^/]+)(/.+)?")
"""A quantity at one noise level, or in one size: its name, which of both, the level or size, and the player."""


@dataclass(frozen=True)
class Line:
    """A quantity in a log, and what it is called beside others in the same panel."""

    kind: str
    name: str
    label: str = ""


def plot(path: Path, runs: Mapping[str, Mapping[str, Rows]]) -> None:
    """Draw every recorded quantity over the steps, and mark where a run began to overfit; nothing where there is none.

    runs: by label, each with its `history` (training) and `held_out` rows. The quantities of a single run that belong
    together share a panel: a loss at each noise level, held-out clips and training clips, the shares of time. Several
    runs have a colour each, a panel per quantity, and a legend. The suffix of `path` names the format.
    """
    panels = _panels(runs, together=len(runs) == 1)
    if not panels:
        return
    rows, legend = -(-len(panels) // COLUMNS), LINE * len(runs) if len(runs) > 1 else 0.0
    height = HEIGHT * rows + legend
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(0.06, 0.5 / height, 0.98, 1 - (0.3 + legend) / height, 0.2, 0.5)
    for place, (title, lines) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for number, run in enumerate(runs.values()):
            _draw(axes, run, lines, f"C{number}" if legend else "")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    if legend:
        handles = [Line2D([], [], color=f"C{number}", label=label) for number, label in enumerate(runs)]
        figure.legend(handles=handles, loc="upper left", fontsize=8, frameon=False)
    with new_file(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."), dpi=100)


def _panels(runs: Mapping[str, Mapping[str, Rows]], together: bool) -> dict[str, list[Line]]:
    """The lines of each panel, by title: of training, then of held-out clips, in the order in which runs record."""
    panels: dict[str, list[Line]] = {}
    for kind, name in _quantities(runs):
        title, label = _group(name) if together else (name, "")
        panels.setdefault(_title(kind, title), []).append(Line(kind, name, label))
    return panels


def _quantities(runs: Mapping[str, Mapping[str, Rows]]) -> Iterator[tuple[str, str]]:
    for kind in KINDS:
        names = dict.fromkeys(name for run in runs.values() for row in run[kind] for name in row if name != "step")
        yield from ((kind, name) for name in names)


def _group(name: str) -> tuple[str, str]:
    """The panel that a quantity of a single run is in, and what tells it from the others there."""
    if name in SHARES:
        return TIME, name
    if several := ONE_OF_SEVERAL.fullmatch(name):
        return f"{several[1]} {several[2]} ...{several[4] or ''}", several[3]
    for measure, on_training_clips in TRAINING.items():
        if name == on_training_clips:
            return measure, "training clips"
    if name.startswith("parent/"):
        return name.removeprefix("parent/"), "parent"
    measure, _, aside = name.partition(", ")
    return measure, aside or "held-out clips"


def _draw(axes: Axes, run: Mapping[str, Rows], lines: list[Line], colour: str) -> None:
    """The lines of a panel in one colour, or in a colour each with a legend, and the best step of what overfits."""
    if any(line.label in SHARES for line in lines):
        _stack(axes, run["history"], lines)
        return
    for number, line in enumerate(lines):
        alone = f"C{[*KINDS].index(line.kind)}"
        _line(axes, run[line.kind], line, colour or (alone if len(lines) == 1 else f"C{number}"))
    for one in overfitting(run["held_out"]):
        if any(line.name in (one.measure, TRAINING[one.measure]) for line in lines):
            axes.axvline(one.step, color=colour or "k", linestyle="--", linewidth=1, label=f"overfits from {one.step}")
    if not colour and len(lines) > 1:
        axes.legend(fontsize=7, framealpha=0.6)


def _line(axes: Axes, rows: Rows, line: Line, colour: str) -> None:
    points = [(row["step"], row[line.name]) for row in rows if line.name in row]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=colour, marker="." if len(points) < 30 else None, label=line.label)


def _stack(axes: Axes, rows: Rows, lines: list[Line]) -> None:
    """Shares of time above each other; in entries without them they are 0."""
    values = [[row.get(line.name, 0.0) for row in rows] for line in lines]
    axes.stackplot([row["step"] for row in rows], values, labels=[line.label for line in lines])
    axes.margins(0)
    axes.legend(fontsize=7, framealpha=0.6, ncols=3, loc="lower center")


def _title(kind: str, name: str) -> str:
    return KINDS[kind] + name.removeprefix(KINDS[kind])
