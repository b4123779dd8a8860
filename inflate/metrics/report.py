"""What an evaluation leaves: means with intervals, a table, and everything as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inflate.errors import CheckpointError
from inflate.files import write_text
from inflate.measures import better
from inflate.tables import aligned

PACKAGES = ("inflate-video", "torch", "transformers", "av", "numpy")
RESAMPLES = 2000
"""Bootstrap samples that an interval is taken from."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was measured."""

    protocol: dict[str, Any]
    """what the numbers depend on beside the generated clips' pixels"""
    means: dict[str, dict[str, Any]]
    """by measure: mean, low and high end of its 95 % interval (None for a single clip), clips, better direction"""
    sets: dict[str, Any]
    """fvd, kvd and their protocol in one line; empty without real videos and a network"""
    clips: dict[str, dict[str, Any]]
    """by generated clip: its measures, its scene's and its object's motion, the direction that this is called"""
    real: dict[str, dict[str, Any]]
    """the same by real clip"""
    notes: list[str]

    def write(self, file: Path) -> None:
        """Write all of it as JSON."""
        versions = {name: version(name) for name in PACKAGES}
        content = {"versions": versions, **asdict(self)}
        write_text(file, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def table(self, before: Mapping[str, Any] | None = None) -> str:
        """The means in columns, beside those of an earlier evaluation, then the FVD's protocol."""
        old = before["means"] | _as_means(before["sets"]) if before else {}
        rows = [["measure", "mean", "95 % interval", "clips", *(["before"] if before else []), "better"]]
        for name, row in (self.means | _as_means(self.sets)).items():
            interval = f"{row['low']:.4g} to {row['high']:.4g}" if row["low"] is not None else "-"
            earlier = [f"{old[name]['mean']:.4g}" if name in old else "-"] if before else []
            rows.append([name, f"{row['mean']:.4g}", interval, str(row["clips"]), *earlier, row["better"]])
        protocol = [f"FVD protocol: {self.sets['protocol']}"] if self.sets else []
        return "\n".join([*aligned(rows), *protocol])


def means_of(prefix: str, rows: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
    """Mean and interval of each measure over the clips that have it."""
    names = list(dict.fromkeys(key for row in rows.values() for key, value in row.items() if isinstance(value, float)))
    found = {}
    for name in names:
        values = np.asarray([row[name] for row in rows.values() if name in row])
        low, high = interval(values, seed)
        place = {"mean": float(values.mean()), "low": low, "high": high, "clips": len(values)}
        found[prefix + name] = place | {"better": better(prefix + name)}
    return found


def interval(values: npt.NDArray[np.float64], seed: int) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of values (N,) by the percentile bootstrap; (None, None) for a single one."""
    if len(values) < 2:
        return None, None
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


def read_earlier(file: Path) -> dict[str, Any]:
    """The JSON of an earlier evaluation; CheckpointError where it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read as an evaluation's JSON ({error})") from error
    if not isinstance(content, dict) or not {"protocol", "means", "sets"} <= content.keys():
        raise CheckpointError(f"{file}: is not the JSON of `inflate evaluate -o`")
    return content


def _as_means(sets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Distances of sets as rows of the table."""
    empty = {"low": None, "high": None, "clips": "all"}
    return {name: {"mean": sets[name], **empty, "better": better(name)} for name in ("fvd", "kvd") if name in sets}
