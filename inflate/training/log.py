"""What a run tells while it trains: progress bar, trackers, metrics.json and metrics.png."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from inflate.curves import plot
from inflate.errors import DiskError, InflateError
from inflate.files import write_text
from inflate.training.checkpoint import State, writing
from inflate.training.player import Batch
from inflate.training.settings import Training


class Report:
    """Sums the tensors of each step on the device, and reads them out only when a log entry is due."""

    def __init__(self, settings: Training, accelerator: Any, state: State) -> None:
        self.settings, self.accelerator, self.state = settings, accelerator, state
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.waited, self.begun, self.clips = 0.0, time.monotonic(), 0
        self.written = ""
        hidden = not (settings.progress and accelerator.is_main_process)
        self.bar = tqdm(total=settings.steps, initial=state.step, unit="step", disable=hidden, dynamic_ncols=True)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        self.bar.close()
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
        begun = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - begun
        if isinstance(batch, InflateError):
            raise batch
        self.clips += len(batch["number"])
        return batch

    def add(self, terms: Mapping[str, Sequence[Tensor]]) -> None:
        """Take the mean of each term of a step into the means of the next log entry, without waiting for the device."""
        for name, values in terms.items():
            value = torch.stack([part.detach().float().mean() for part in values]).mean()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def tick(self, step: int, rates: Mapping[str, float]) -> None:
        """Count a step; write a log entry if one is due."""
        self.bar.update(step - self.bar.n)
        if step % self.settings.log_every == 0 or step == self.settings.steps:
            entry = self._means() | {f"lr/{name}": value for name, value in rates.items()} | self._speed()
            self.state.history.append({"step": step, **entry})
            self._track(entry, step)
            shown = {name[5:]: f"{value:.4f}" for name, value in entry.items() if name.startswith("loss/")}
            speed = {"clips/s": f"{entry['clips_per_second']:.3g}", "wait": f"{entry['data_wait']:.0%}"}
            self.bar.set_postfix({**shown, **speed})

    def _means(self) -> dict[str, float]:
        names = list(self.sums)
        means = torch.stack([self.sums[name] / self.counts[name] for name in names])
        self.sums, self.counts = {}, {}
        values = self.accelerator.reduce(means, reduction="mean").tolist()  # the one device sync of logging
        return dict(zip(names, values, strict=True))

    def _speed(self) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(now - self.begun, 1e-9)
        clips = self.clips * self.accelerator.num_processes
        speed = {"clips_per_second": clips / seconds, "data_wait": self.waited / seconds}
        self.waited, self.begun, self.clips = 0.0, now, 0
        return speed

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of the speed."""
        begun = time.monotonic()
        yield
        self.begun += time.monotonic() - begun

    def held_out(self, step: int, values: Mapping[str, float]) -> None:
        """Record held-out measurements of a step, in place of earlier ones of the same step."""
        self.state.held_out[:] = [row for row in self.state.held_out if row["step"] != step]
        self.state.held_out.append({"step": step, **{name: float(value) for name, value in values.items()}})
        self._track({f"held_out/{name}": float(value) for name, value in values.items()}, step)

    def write(self) -> None:
        """Write metrics.json and metrics.png into the output folder, from the main process, if there is news."""
        rows = {"history": self.state.history, "held_out": self.state.held_out}
        text = json.dumps(rows, indent=1)
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
