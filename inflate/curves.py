"""Plots of what runs recorded over their steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from inflate.files import new_file

Rows = Sequence[Mapping[str, float]]
"""Entries of a log, each with the key `step`."""
KINDS = {"history": "", "held_out": "held-out "}
"""The logs of a run, and what a panel's title says before the name of the quantity."""
COLUMNS, WIDTH, HEIGHT, LINE = 3, 12.0, 2.6, 0.22
"""Panels side by side; inches of the figure, of a row of panels, of a line of the legend."""


def plot(path: Path, runs: Mapping[str, Mapping[str, Rows]]) -> None:
    """Draw every recorded quantity over the steps, one panel each, with a line per run.

    runs: by label, each with its `history` (training) and `held_out` rows. A single run has one colour for training
    and another for held-out, several have a colour each and a legend. The suffix of `path` names the format.
    """
    panels = list(_panels(runs))
    rows, legend = -(-len(panels) // COLUMNS), LINE * len(runs) if len(runs) > 1 else 0.0
    height = HEIGHT * rows + legend
    figure = Figure(figsize=(WIDTH, height))
    figure.subplots_adjust(0.06, 0.5 / height, 0.98, 1 - (0.3 + legend) / height, 0.2, 0.5)
    for place, (kind, name) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        for number, run in enumerate(runs.values()):
            _line(axes, run[kind], name, f"C{number}" if legend else f"C{list(KINDS).index(kind)}")
        axes.set_title(_title(kind, name), fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    if legend:
        lines = [Line2D([], [], color=f"C{number}", label=label) for number, label in enumerate(runs)]
        figure.legend(handles=lines, loc="upper left", fontsize=8, frameon=False)
    with new_file(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."), dpi=100)


def _panels(runs: Mapping[str, Mapping[str, Rows]]) -> Iterator[tuple[str, str]]:
    """(log, quantity) of each panel: of training, then of held-out clips, in the order in which runs record them."""
    for kind in KINDS:
        names = dict.fromkeys(name for run in runs.values() for row in run[kind] for name in row if name != "step")
        yield from ((kind, name) for name in names)


def _line(axes: Axes, rows: Rows, name: str, colour: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axes.plot(steps, values, color=colour, marker="." if len(points) < 30 else None)


def _title(kind: str, name: str) -> str:
    return KINDS[kind] + name.removeprefix(KINDS[kind])
