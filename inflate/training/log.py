"""What a run tells while it trains: progress bar, trackers, metrics.json and metrics.png."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inflate.curves import plot
from inflate.errors import DiskError, InflateError
from inflate.files import write_text
from inflate.measures import Overfitting, Rows, overfitting
from inflate.training.checkpoint import State, nearest, writing
from inflate.training.clock import Clock
from inflate.training.player import Batch, Player, Selected
from inflate.training.settings import Training

logger = logging.getLogger(__name__)

MUCH = 0.3
"""A share of time that is worth a warning."""


class Report:
    """Sums the tensors of each step on the device, and reads them out only when a log entry is due."""

    def __init__(
        self, settings: Training, accelerator: Any, state: State, clock: Clock, players: Sequence[Player]
    ) -> None:
        self.settings, self.accelerator, self.state, self.clock = settings, accelerator, state, clock
        self.remedies = remedies(players)
        self.sums: dict[str, Tensor] = {}
        self.clips, self.entries = 0, 0
        self.told: set[str] = set()
        self.written = ""
        hidden = not (settings.progress and accelerator.is_main_process)
        self.bar = tqdm(total=settings.steps, initial=state.step, unit="step", disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.bar.close()
        self.clock.stop()
        try:
            with self._writing("logs"):
                for tracker in self.accelerator.trackers:  # not end_training(), which would end the process group too
                    tracker.finish()
        except DiskError as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    def draw(self, batches: Iterator[Batch | InflateError]) -> Batch:
        """The next batch; the time spent waiting for it is counted. An InflateError in its place is raised."""
        self.clock.begin("data_wait")
        batch = next(batches)
        self.clock.begin("other")
        if isinstance(batch, InflateError):
            raise batch
        self.clips += len(batch["number"])
        return batch

    def add(self, terms: Mapping[str, Sequence[Selected]]) -> None:
        """Take what counts of each term into the means of the next log entry, without waiting for the device."""
        for name, parts in terms.items():
            for values, chosen in parts:
                sum_and_count = torch.stack([values.float().where(chosen, 0.0).sum(), chosen.float().sum()])  # (2,)
                self.sums[name] = self.sums[name] + sum_and_count if name in self.sums else sum_and_count

    def tick(self, step: int, rates: Mapping[str, float]) -> None:
        """Count a step; write a log entry if one is due."""
        self.bar.update(step - self.bar.n)
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            entry = self._entry() | {f"lr/{name}": value for name, value in rates.items()}
            self.state.history.append({"step": step, **entry})
            self._track(entry, step)
            self._show(entry)
            self._advise(entry)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Say before the progress bar what a run is busy with, which would else stand still without a word."""
        self.bar.set_description(what)
        try:
            yield
        finally:
            self.bar.set_description()

    def _entry(self) -> dict[str, float]:
        """The means since the last entry, over all processes: of what was logged, and of the shares of time."""
        seconds = self.clock.read()
        total = max(sum(seconds.values()), 1e-9)
        shares = torch.tensor([[value / total, 1.0] for value in seconds.values()], device=self.accelerator.device)
        rows = torch.stack([*self.sums.values(), *shares])  # (names, 2)
        sums = self.accelerator.reduce(rows, reduction="sum").tolist()  # the one device sync of logging
        named = zip([*self.sums, *seconds], sums, strict=True)
        speed = self.clips * self.accelerator.num_processes / total
        self.sums, self.clips = {}, 0
        return {name: value / count for name, (value, count) in named if count} | {"clips_per_second": speed}

    def _show(self, entry: Mapping[str, float]) -> None:
        shown = {name[5:]: f"{value:.4f}" for name, value in entry.items() if name.startswith("loss/")}
        speed = {"clips/s": f"{entry['clips_per_second']:.3g}"} | {
            name: f"{entry[name]:.0%}" for name in ("data_wait", "encode")
        }
        self.bar.set_postfix({**shown, **speed})

    def _advise(self, entry: Mapping[str, float]) -> None:
        """Name the remedy, once, where much time is wasted; the first entry counts the start as well."""
        self.entries += 1
        for name, remedy in self.remedies.items():
            if entry[name] > MUCH and self.entries > 1:
                self._warn(name, f"{name}: {entry[name]:.0%} of the time goes into {remedy}")

    def _warn(self, key: str, text: str) -> None:
        if self.accelerator.is_main_process and key not in self.told:
            self.told.add(key)
            logger.warning(text)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the speed."""
        self.clock.begin(None)
        yield
        self.clock.begin("other")

    def held_out(self, step: int, values: Mapping[str, float]) -> None:
        """Record held-out measurements of a step, in place of earlier ones of the same step."""
        self.state.held_out[:] = [row for row in self.state.held_out if row["step"] != step]
        self.state.held_out.append({"step": step, **{name: float(value) for name, value in values.items()}})
        self._track({f"held_out/{name}": float(value) for name, value in values.items()}, step)
        for one in found_overfitting(self.settings.output, self.state.held_out):
            self._warn(f"{one.measure} at step {one.step}", str(one))

    def write(self) -> None:
        """Write metrics.json and metrics.png into the output folder, from the main process, if there is news."""
        rows = {"history": self.state.history, "held_out": self.state.held_out}
        overfitted = [asdict(one) for one in found_overfitting(self.settings.output, self.state.held_out)]
        text = json.dumps({**rows, "overfitting": overfitted}, indent=1)
        if self.accelerator.is_main_process and any(rows.values()) and text != self.written:
            with self._writing("metrics.json"):
                write_text(self.settings.output / "metrics.json", text)
                plot(self.settings.output / "metrics.png", {"": rows})
            self.written = text

    def _track(self, values: Mapping[str, float], step: int) -> None:
        with self._writing("logs"):
            self.accelerator.log(values, step=step)

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return writing(self.settings.output / name, self.settings.output)


def remedies(players: Sequence[Player]) -> dict[str, str]:
    """What a share of time goes into, and what lessens it, for those that something does."""
    own = dict.fromkeys(player.remedy for player in players if player.remedy)
    general = "waiting for clips: raise training.workers, or, without data.cache, data.memory_megabytes"
    found = {"data_wait": ", or ".join([general, *own])}
    return found | {"encode": "what losses do outside the trained networks: " + ", or ".join(own)} if own else found


def found_overfitting(output: Path, held_out: Rows) -> list[Overfitting]:
    """What overfits in a run's held-out rows, with the checkpoints that the run's folder holds."""
    found = [(one, nearest(output, one.step)) for one in overfitting(held_out)]
    return [replace(one, checkpoint=folder.name if folder else "") for one, folder in found]
