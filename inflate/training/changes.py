"""Which settings may change where a run goes on from a checkpoint.

Most of a task's settings decide what the weights become, and must not change. Those of the training itself may, from
one start to the next: each change is told. Where a run lies, what it shows and how fast it reads is nobody's concern.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from inflate import config as configuration
from inflate.data.digest import WHERE
from inflate.errors import CheckpointError
from inflate.training.settings import Training

Settings = Mapping[str, Any]

FREE = (
    "training.output", "training.resume", "training.workers", "training.progress", "training.tracker", "training.keep",
    "training.max_seconds", "training.*_every", "data.path", "data.seconds_per_clip", "data.memory_megabytes",
    "sampling.*", "*.previews", "*.preview_clips", "memory.*",
)  # fmt: skip
"""Settings on which no weight rests."""
RESTS = ("memory.base",)
"""Those of them on which weights rest all the same."""
TOLD = (
    "training.*",
    *RESTS,
    *(f"data.{name}" for name in WHERE),
    "*.lr",
    "*.discriminator_lr",
    "*.held_out_*",
    "*.train_clips",
    "*.bands",
    "*.domain_adapter",
)
"""Settings that a run may go on with changed: how it learns, and what it is measured on. What they must not change all
the same, as the clips and an adapter's tensors, is in the run's fingerprint."""


def all_settings(settings: Training, config: str) -> dict[str, Any]:
    """What a run is started with, by dotted name, as JSON gives it back: the loop's settings and those of its script.

    Raises ConfigError for a `config` that is no YAML.
    """
    own = {f"training.{name}": value for name, value in configuration.flat(settings).items()}
    found: dict[str, Any] = json.loads(json.dumps(configuration.parse(config, "config") | own, default=str))
    return found


def refuse(folder: object, then: Settings, now: Settings, directory: str) -> None:
    """Raise CheckpointError naming every changed setting that must not change; `directory` is where `then` was set."""
    changed = [name for name in _changed(then, now, directory) if name in then and name in now and not _any(name, TOLD)]
    if changed:
        changes = "; ".join(f"{name} was {_shown(then[name])}, is {_shown(now[name])}" for name in changed)
        raise CheckpointError(f"{folder} was made with other settings: {changes}; put them back, or start a new output")


def told(then: Settings, now: Settings, directory: str, step: int) -> Iterator[str]:
    """A line for each setting that changes from a step on; a setting that only one side knows is another version's."""
    for name in _changed(then, now, directory):
        before, after = (_shown(side[name]) if name in side else "not a setting" for side in (then, now))
        yield f"{name} was {before}, is {after} from step {step} on"


def _changed(then: Settings, now: Settings, directory: str) -> list[str]:
    names = [name for name in dict.fromkeys([*then, *now]) if _any(name, RESTS) or not _any(name, FREE)]
    return [name for name in names if not _same(then.get(name), now.get(name), directory)]


def _same(then: Any, now: Any, directory: str) -> bool:
    """Whether two values are equal, or name the same file or folder, the first as seen from `directory`."""
    if isinstance(then, str) and isinstance(now, str) and then and now:
        places = [os.path.join(directory, os.path.expanduser(then)), os.path.expanduser(now)]
        if all(map(os.path.exists, places)):
            return os.path.realpath(places[0]) == os.path.realpath(places[1])
    return bool(then == now)


def _any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
