"""A grid of training runs: one after the other, each resumed or skipped where an earlier sweep left it.

training.output/
    lr=1e-5__P_mean=0.0/    a run, named by the settings that vary
    sweep.json              every run with its settings, exit status and held-out numbers
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any

from inflate import config as configuration
from inflate import runs
from inflate.errors import CheckpointError, ConfigError
from inflate.files import write_text
from inflate.tables import aligned

if TYPE_CHECKING:
    from inflate.config import Schema

RECORD = "sweep.json"
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--quiet")
"""`accelerate launch` of this interpreter; a recipe and its arguments follow."""
STDERR = 2
"""Where the runs' own words go, so that standard output holds the table alone."""
OUTPUT, RESUME = "training.output", "training.resume"
UNIMPORTANT = (*runs.PLACES, "training.workers", "training.progress")
"""Settings that may differ from those that a run began with: they change nothing of its results."""
LENGTH = ("training.steps", "training.max_seconds")
"""Settings that may differ, too: a longer run goes on from a shorter one."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LONGEST = 150
"""Letters of a folder's name; a longer one is cut, and told from others by a hash."""
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""")


@dataclass(frozen=True)
class Planned:
    """One run of the grid."""

    name: str
    folder: Path
    varied: dict[str, str]
    """the settings that vary, by dotted name, as they were written"""
    arguments: list[str]
    """of the recipe"""
    settings: dict[str, Any]
    """all of them, by dotted name"""


@dataclass(frozen=True)
class Outcome:
    """How one run of the grid ended."""

    planned: Planned
    status: int | None
    """exit status; None = not started"""
    skipped: bool = False
    """whether it had finished before"""


# --- the grid ---------------------------------------------------------------------------------------------------------


def plan(recipe: Path, arguments: Sequence[str]) -> list[Planned]:
    """The runs that the arguments span, in the order in which they run; the last setting varies fastest.

    Every combination is read as the recipe will read it. Raises ConfigError for a recipe that cannot be swept, for
    settings that are wrong, that do not vary, or that give two runs the same name or the same settings.
    """
    schema = schema_of(recipe)
    sources = configuration.translate(schema, arguments)
    choices = [split(source) for source in sources]
    varied = [place for place, options in enumerate(choices) if len(options) > 1]
    if not varied:
        raise ConfigError("nothing varies: give several values with commas between them, as training.lr=1e-5,1e-4")
    keys = [sources[place].partition("=")[0] for place in varied]
    if {OUTPUT, RESUME} & {*keys}:
        raise ConfigError(f"{OUTPUT} and {RESUME} cannot vary: each run has a folder of its own, and is resumed there")
    grid = [_planned(schema, list(chosen), keys, varied) for chosen in itertools.product(*choices)]
    _refuse_doubles(grid)
    return grid


def schema_of(recipe: Path) -> Schema:
    """The dataclass of a recipe's settings; ConfigError where there is none, or one that no sweep can set."""
    if not recipe.is_file():
        raise ConfigError(f"{recipe}: no such recipe; name a script such as recipes/svd_finetune.py")
    schema = getattr(load_script(recipe), "Config", None)
    if schema is None or not (
        isinstance(schema, type) and is_dataclass(schema) and {OUTPUT, RESUME} <= {*configuration.names(schema)}
    ):
        raise ConfigError(f"{recipe}: not a recipe: it has no dataclass Config with {OUTPUT} and {RESUME}")
    return schema


def load_script(path: Path) -> ModuleType:
    """A script as a module, imported once: its definitions, without its `main`."""
    name = str(path.resolve())
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise ConfigError(f"{path}: not a Python script")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their own module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def split(source: str) -> list[str]:
    """The sources that one argument stands for: `key=a,b` for two; commas in brackets and quotes separate nothing."""
    if not configuration.is_argument(source):
        return [source]
    key, _, value = source.partition("=")
    pieces = list(_pieces(value))
    if len(pieces) > 1 and not all(pieces):
        raise ConfigError(f"argument {source}: a value is missing beside a comma; quote a text that holds commas")
    return [f"{key}={piece}" for piece in pieces]


def _pieces(text: str) -> Iterator[str]:
    depth = start = place = 0
    while place < len(text):
        quoted = _QUOTED.match(text, place) if depth or place == start else None
        if quoted:
            place = quoted.end()
            continue
        depth += (text[place] in "[{") - (text[place] in "]}")
        if text[place] == "," and depth <= 0:
            yield text[start:place].strip()
            start = place + 1
        place += 1
    yield text[start:].strip()


def _planned(schema: Schema, sources: list[str], keys: Sequence[str], places: Sequence[int]) -> Planned:
    varied = {key: sources[place].partition("=")[2] for key, place in zip(keys, places, strict=True)}
    config: Any = configuration.load(schema, sources)
    if config.training.resume not in (None, "latest"):
        raise ConfigError(
            f"{RESUME}={config.training.resume}: a sweep resumes each of its runs in the run's own folder"
        )
    name = name_of(varied)
    folder = config.training.output / name
    arguments = [*sources, f"{OUTPUT}={folder}", f"{RESUME}=latest"]
    return Planned(name, folder, varied, arguments, configuration.flat(configuration.load(schema, arguments)))


def name_of(varied: Mapping[str, str]) -> str:
    """The folder's name: each setting by its last word, or by its whole name where two end alike, and its value."""
    words = [key.rpartition(".")[2] for key in varied]
    short = words if len({*words}) == len(words) else [*varied]
    text = "__".join(f"{word}={value}" for word, value in zip(short, varied.values(), strict=True))
    safe = re.sub(r"[^\w.=+-]+", "_", text)
    return safe if len(safe) <= LONGEST else f"{safe[:LONGEST]}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _refuse_doubles(grid: Sequence[Planned]) -> None:
    seen: dict[str, Planned] = {}
    for one in grid:
        settings = json.dumps([item for item in one.settings.items() if item[0] not in runs.PLACES])
        for key in (one.name, settings):
            other = seen.setdefault(key, one)
            if other is not one:
                raise ConfigError(f"{_said(other)} and {_said(one)} are one and the same run; name each value once")


def _said(planned: Planned) -> str:
    return " ".join(f"{key}={value}" for key, value in planned.varied.items())


def _changed(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Sequence[str]) -> list[str]:
    """The names of the settings that differ or that only one side has, but for those ignored."""
    return [
        name
        for name in dict.fromkeys([*before, *now])
        if name not in ignored and (name in before, before.get(name)) != (name in now, now.get(name))
    ]


# --- the runs ---------------------------------------------------------------------------------------------------------


def run(recipe: Path, grid: Sequence[Planned], tell: Callable[[str], None]) -> tuple[list[Outcome], int]:
    """Run what is not finished, one run after the other; how each ended, and the signal that stopped the sweep or 0.

    A run that fails is told and the others go on. sweep.json is written after each one. Raises, before anything starts,
    ConfigError where a folder holds a run of other settings and CheckpointError where sweep.json cannot be read.
    """
    for planned in grid:
        check_folder(planned)
    record = grid[0].folder.parent / RECORD
    former = read_record(record)
    outcomes, stopped = [Outcome(planned, None) for planned in grid], 0
    for place, planned in enumerate(grid):
        failed = former.get(planned.name, {}).get("exit_status") not in (0, None)
        tell(f"run {place + 1} of {len(grid)}: {planned.folder}")
        if not failed and is_finished(planned):
            outcomes[place] = Outcome(planned, 0, skipped=True)
            tell("finished before")
        else:
            status, stopped = launch([*LAUNCH, str(recipe), *planned.arguments])
            outcomes[place] = Outcome(planned, status)
            if status:
                tell(f"{planned.folder}: failed with exit status {status}")
        write_text(record, json.dumps({"runs": former | {one.planned.name: row(one) for one in outcomes}}, indent=1))
        if stopped:
            break
    return outcomes, stopped


def check_folder(planned: Planned) -> None:
    """Raise ConfigError where the run's folder holds a run that began with other settings."""
    file = planned.folder / runs.CONFIG
    before = configuration.dotted(file) if file.is_file() else planned.settings
    changes = [
        f"{name} was {json.dumps(before.get(name))}, is {json.dumps(planned.settings.get(name))}"
        for name in _changed(before, planned.settings, (*UNIMPORTANT, *LENGTH))
    ]
    if changes:
        remedy = f"put them back, or name another {OUTPUT}"
        raise ConfigError(f"{planned.folder} holds a run of other settings: {'; '.join(changes)}; {remedy}")


def is_finished(planned: Planned) -> bool:
    """Whether the run's folder holds the whole run, of just these settings."""
    if not all((planned.folder / name).is_file() for name in (runs.CONFIG, runs.METRICS)):
        return False
    found = runs.read(planned.folder)
    return found.finished and not _changed(found.settings, planned.settings, UNIMPORTANT)


def read_record(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a sweep.json by the runs' names; none where there is no file. Raises CheckpointError."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["runs"]
        return {str(name): dict(row) for name, row in rows.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not the record of a sweep ({error!r}); move it away") from error


def row(outcome: Outcome) -> dict[str, Any]:
    """What sweep.json says of a run."""
    planned = outcome.planned
    numbers = {name: {"first": first, "last": last} for name, (first, last) in measures(planned.folder).items()}
    return {
        "settings": planned.varied,
        "arguments": planned.arguments,
        "exit_status": outcome.status,
        "held_out": numbers,
    }


def table(outcomes: Sequence[Outcome]) -> str:
    """A line per run: the settings that vary, its last held-out numbers, and its exit status."""
    every = [measures(outcome.planned.folder) for outcome in outcomes]
    names = list(dict.fromkeys(name for numbers in every for name in numbers))
    lines = [[*outcomes[0].planned.varied, *names, "exit status"]]
    for outcome, numbers in zip(outcomes, every, strict=True):
        values = [runs.number(numbers[name][1]) if name in numbers else "-" for name in names]
        status = "not started" if outcome.status is None else f"{outcome.status}{' (before)' * outcome.skipped}"
        lines.append([*outcome.planned.varied.values(), *values, status])
    return "\n".join(aligned(lines))


def measures(folder: Path) -> dict[str, tuple[float | None, float]]:
    """The first and last held-out numbers of a run; where its folder holds several stages, named by them."""
    found: dict[str, tuple[float | None, float]] = {}
    for place in runs.below(folder):
        stage = "" if place == folder else f"{place.relative_to(folder)}/"
        found |= {f"{stage}{name}": pair for name, pair in runs.read(place).measures.items()}
    return found


# --- one process ------------------------------------------------------------------------------------------------------


def launch(command: Sequence[str]) -> tuple[int, int]:
    """Run a command to its end; its exit status (128 + n where signal n ended it), and the signal received or 0.

    SIGINT, SIGTERM and SIGHUP reach the processes that the command has started, as SIGINT: training answers it with a
    checkpoint, a launcher would leave it behind.
    """
    started: list[int] = []
    with listening(lambda: interrupt(*started)) as received:
        process = subprocess.Popen(command, stdout=STDERR, start_new_session=True)
        started.append(process.pid)
        if received:  # meanwhile
            interrupt(process.pid)
        status = process.wait()
    return status if status >= 0 else 128 - status, received[0] if received else 0


@contextmanager
def listening(act: Callable[[], object]) -> Iterator[list[int]]:
    """Call `act` on each of SIGNALS, whose numbers come into the list, instead of what they do."""
    received: list[int] = []

    def receive(number: int, _: FrameType | None) -> None:
        received.append(number)
        act()

    former = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)


def interrupt(*launchers: int) -> None:
    """Send SIGINT to all that each process has started, or to itself while it has started nothing."""
    import psutil

    for launcher in launchers:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(launcher)
            for one in process.children(recursive=True) or [process]:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(signal.SIGINT)
