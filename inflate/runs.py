"""What runs have left behind: found, told, compared. Nothing heavy is imported to look at them.

A run's folder holds config.yaml and metrics.json; environment.json beside them says how it ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inflate import config as configuration
from inflate.errors import CheckpointError, ConfigError
from inflate.measures import Overfitting, better, remark
from inflate.tables import aligned

CONFIG, METRICS, ENVIRONMENT = "config.yaml", "metrics.json", "environment.json"
COMPLETE = ("finished", "max_seconds")
"""Ends of a run after which its model was measured and exported."""
PARENT = "parent/"
"""Begins the names of measures of the model that training started from, which do not change."""
PLACES = ("training.output", "training.resume")
"""Settings that say where a run lies and not what it does."""
SURROUNDINGS = ("versions", "platform", "devices", "processes", "git", "data")
"""What two records of environment.json are compared by."""

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """What one run's folder says."""

    folder: Path
    settings: dict[str, Any]
    """by dotted name"""
    history: list[Row]
    held_out: list[Row]
    environment: dict[str, Any]
    """the record of its last start; empty where there is none"""
    overfitting: list[Overfitting]

    @property
    def step(self) -> int:
        """Steps done, as far as they are recorded."""
        ended = (self.environment.get("ended") or {}).get("step", 0)
        return int(max([ended, *(row["step"] for row in [*self.history, *self.held_out])]))

    @property
    def finished(self) -> bool:
        """Whether its last start got to the end, its model measured and exported."""
        return self._reason in COMPLETE

    @property
    def state(self) -> str:
        """How its last start ended."""
        if not self.environment:
            return f"end unknown ({ENVIRONMENT} is missing)"
        if self.finished:
            return "finished" if self._reason == "finished" else f"finished at its {self._reason}"
        return f"cut off by {self._reason}" if self._reason else "cut off, or at work"

    @property
    def measures(self) -> dict[str, tuple[float | None, float]]:
        """The last held-out numbers by name, each after the first ones (None where they were not measured then)."""
        if not self.held_out:
            return {}
        first, last = self.held_out[0], self.held_out[-1]
        names = [name for name in last if name != "step" and not name.startswith(PARENT)]
        return {name: (first.get(name), last[name]) for name in names}

    @property
    def _reason(self) -> str:
        return str((self.environment.get("ended") or {}).get("reason", ""))


def find(folder: Path) -> list[Path]:
    """The folders of all runs in `folder`, itself included; CheckpointError where it is none or holds none."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; name one that holds runs")
    found = below(folder)
    if not found and not unmeasured(folder):
        raise CheckpointError(f"{folder}: holds no run, which is a folder with {CONFIG} and {METRICS}")
    return found


def below(folder: Path) -> list[Path]:
    """The folders of the runs in a folder that may hold none."""
    return sorted(file.parent for file in folder.rglob(METRICS) if (file.parent / CONFIG).is_file())


def unmeasured(folder: Path) -> list[Path]:
    """The folders in `folder` of runs that have begun and written no metrics yet."""
    return sorted(file.parent for file in folder.rglob(ENVIRONMENT) if not (file.parent / METRICS).is_file())


def read(folder: Path) -> Run:
    """What a run's folder says; CheckpointError or ConfigError naming the file that is missing or cannot be read."""
    missing = [name for name in (CONFIG, METRICS) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: not a run: {' and '.join(missing)} missing; `inflate runs` lists the runs")
    metrics = _json(folder / METRICS)
    history, held_out = (_rows(folder / METRICS, metrics.get(name)) for name in ("history", "held_out"))
    settings, environment = configuration.dotted(folder / CONFIG), _environment(folder / ENVIRONMENT)
    return Run(folder, settings, history, held_out, environment, _overfitting(folder / METRICS, metrics))


def describe(run: Run) -> str:
    """A run in a line; its held-out numbers at its first measurement and at its last, a line each; what overfits."""
    stage, steps = run.settings.get("stage"), run.settings.get("training.steps", "?")
    facts = [*([str(stage)] if stage else []), f"{run.step} of {steps} steps", run.state]
    rows = [
        (f"    {name}", f"{number(first)} -> {number(last)}", remark(name))
        for name, (first, last) in run.measures.items()
    ]
    return "\n".join([f"{run.folder}: {', '.join(facts)}", *aligned(rows), *(f"    {one}" for one in run.overfitting)])


def compare(runs: Sequence[Run]) -> str:
    """Tables of what differs between runs, settings and surroundings, and of their last held-out numbers."""
    labels = names(runs)
    settings = [{name: value for name, value in run.settings.items() if name not in PLACES} for run in runs]
    kept = [{name: run.environment[name] for name in SURROUNDINGS if name in run.environment} for run in runs]
    surroundings = [dict(configuration.leaves(record)) for record in kept]
    steps = ["step", *(number(run.held_out[-1]["step"]) if run.held_out else "-" for run in runs), ""]
    measured = [{name: last for name, (_, last) in run.measures.items()} for run in runs]
    numbers = [[name, *(number(row.get(name)) for row in measured), better(name)] for name in _names(measured)]
    tables = [
        [["setting", *labels], *_differing(settings)], [["environment", *labels], *_differing(surroundings)],
        [["held out", *labels, "better"], steps, *numbers],
    ]  # fmt: skip
    nothing = "the settings are the same"
    texts = ["\n".join(aligned(table)) for table in tables if len(table) > 1]
    return "\n\n".join(texts if len(tables[0]) > 1 else [nothing, *texts])


def names(runs: Sequence[Run]) -> list[str]:
    """What tells the runs' folders apart; ConfigError where one is named twice."""
    folders = [run.folder.resolve() for run in runs]
    for folder, run in zip(folders, runs, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"{run.folder}: named twice; name different runs")
    common = os.path.commonpath([folder.parent for folder in folders])
    return [os.path.relpath(folder, common) for folder in folders]


def number(value: float | None) -> str:
    """A measured value for a table, in four digits; a dash for none."""
    return "-" if value is None else f"{value:.4g}"


def _differing(every: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each name whose values are not all the same: the name, then each one's value, or a dash."""
    rows = []
    for name in _names(every):
        cells = [_shown(one[name]) if name in one else "-" for one in every]
        if len(set(cells)) > 1:
            rows.append([name, *cells])
    return rows


def _names(every: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    return iter(dict.fromkeys(name for one in every for name in one))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _rows(path: Path, rows: Any) -> list[Row]:
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise CheckpointError(f"{path}: not a run's metrics: a list of numbers by name, with their step, is missing")
    return rows


def _overfitting(path: Path, metrics: Mapping[str, Any]) -> list[Overfitting]:
    try:
        return [Overfitting(**one) for one in metrics.get("overfitting", [])]
    except TypeError as error:
        raise CheckpointError(f"{path}: not a run's metrics: what it says of overfitting is wrong ({error})") from error


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and "step" in row and all(isinstance(value, int | float) for value in row.values())


def _environment(path: Path) -> dict[str, Any]:
    record = _json(path) if path.is_file() else {}
    ended = record.get("ended")
    if ended is not None and not (isinstance(ended, dict) and isinstance(ended.get("step"), int)):
        raise CheckpointError(f"{path}: not a run's record: it does not say at which step the run ended")
    return record


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: cannot be read: it holds no JSON object")
    return content
