"""However a run ends, the last completed step is on the disk and the last words say where: signals, and errors."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from inflate.errors import DataError, DiskError, InflateError, Interrupted, NotFiniteError
from inflate.files import remove_leftovers
from inflate.training import checkpoint
from inflate.training.checkpoint import State
from inflate.training.log import Report
from inflate.training.player import Trainee
from inflate.training.settings import Training

logger = logging.getLogger(__name__)
SIGNALS = ("SIGINT", "SIGTERM")
REASONS = ("", "max_seconds", *SIGNALS)


class Stop:
    """Turns a time limit and signals, SIGINT and SIGTERM alike, into the end of a run.

    The first signal and the limit stop between two steps. A second signal gives up the running step: it raises
    Interrupted there, or, where something is `held`, once that is done. The next one during what is held kills.
    The event `over` tells other processes that the run has ended, well or not.
    """

    def __init__(self, seconds: float | None, tells: bool = True) -> None:
        self.seconds, self.deadline, self.tells = seconds or float("inf"), float("inf"), tells
        self.signal, self.holding, self.number = "", "", 0
        self.running = "this step"
        self.ending = False
        """Whether the running step is given up: nothing is left to interrupt but the saving of what is done."""
        self.over = multiprocessing.Event()
        self.former: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            self.former = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, SIGNALS)}
            self._answer(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.over.set()

    def begin(self) -> None:
        """Count the time from here."""
        self.deadline = time.monotonic() + self.seconds

    def reason(self, accelerator: Any) -> str:
        """Why to stop now, or an empty string; the same on every process."""
        if self.ending:  # where Python drops what a handler raises, as in a finaliser
            self._give_up(self.number)
        own = self.signal or ("max_seconds" if time.monotonic() >= self.deadline else "")
        if accelerator.num_processes == 1:
            return own
        code = torch.tensor([REASONS.index(own)], device=accelerator.device)
        return REASONS[int(accelerator.gather(code).max())]

    @contextmanager
    def after(self, what: str) -> Iterator[None]:
        """Say, where the first signal comes inside, that the run stops after this, in place of the step."""
        before, self.running = self.running, what
        try:
            yield
        finally:
            self.running = before

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Let what happens inside come to its end before a second signal gives up the step."""
        self.holding = what
        try:
            yield
        finally:
            self.holding = ""
        if self.number and not self.ending:
            self._answer(self._receive)
            self._give_up(self.number)

    def _receive(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.signal and not self.ending:
            self.signal = name
            self._tell(f"{name}: stopping after {self.running}; once more to stop at once")
        elif not self.holding and not self.ending:
            self._give_up(number)
        else:
            self.number = self.number or number
            self._tell(f"{name}: waiting, {self.holding or 'the run ends'}; once more kills, and leaves what was whole")
            self._answer(signal.SIG_DFL)  # the system's own answer comes even where Python's would not

    def _give_up(self, number: int) -> NoReturn:
        self.ending, self.number = True, number
        raise Interrupted(number)

    def _answer(self, handler: Any) -> None:
        for number in self.former:
            signal.signal(number, handler)

    def _tell(self, text: str) -> None:
        """Write past Python's buffers, which a handler may have interrupted, and past a progress bar."""
        if self.tells:
            os.write(2, f"\n{text}\n".encode())


@dataclass
class Keeper:
    """Writes the checkpoints of a run; where the block inside ends in an error, one of the last completed step.

    What it then writes is what an undisturbed run has after that step, so that a resume is exact:
    - weights, averages, optimiser states, the loss scale and the number of the step change inside `completing` alone,
      and where that, or the way back from evaluation (`Trainee.resting`), was left half-way, nothing is written;
    - buffers (spectral norms' vectors, running statistics) change in each forward pass: they are put back to copies
      that were taken when the step was completed;
    - which samples a step sees, their noise and the dropout are functions of the seed and the number.
    It uses no collective, because the other processes may be gone: all hold the same weights, and the main one writes.
    Where weights are sharded that cannot be, and the last regular checkpoint counts.
    """

    settings: Training
    accelerator: Any
    trainees: Sequence[Trainee]
    report: Report
    state: State
    stop: Stop
    known: set[Path]
    """Checkpoints that this process has found whole, or wrote."""
    tried: int = field(init=False)
    """The last step whose checkpoint was written, or failed to be."""
    whole: bool = True
    """Whether all that belongs to a step is that of the step `state.step`."""

    def __post_init__(self) -> None:
        self.tried = self.state.step
        self.buffers = [(one.module, name) for one in self.trainees for name in one.buffers()]
        self.copies = self._copies()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        if error is not None:
            self.stop.ending = True
            told = str(error).splitlines()
            lines = dict.fromkeys(line for text in self._last_words(error) for line in text.splitlines())
            for line in lines:
                if line not in told:
                    error.add_note(line)

    @contextmanager
    def completing(self) -> Iterator[None]:
        """Where a step's updates are made, all or none that count."""
        with self.stop.held("the weights are being updated"):
            self.whole = False
            yield
            self.copies = self._copies()
            self.whole = True

    def save(self) -> None:
        """Write a checkpoint and the metrics up to it, from the main process, where all gather what is spread.

        With training.sharded_checkpoints nothing is gathered: every process writes what it holds of spread weights.
        """
        self.tried = self.state.step
        main, in_shares = self.accelerator.is_main_process, self._in_shares()
        contents = [] if in_shares else self._contents()
        with self.stop.held("a checkpoint is being written"):
            if in_shares:
                own = [held for one in self.trainees if (held := checkpoint.own_contents(one))]
                checkpoint.save_shares(self.settings.output, self.state, own, main, self.settings.keep, self.known)
            elif main:
                self._write(contents)
            if main:
                self.report.write()

    def _in_shares(self) -> bool:
        return self.settings.sharded_checkpoints and all(one.spread for one in self.trainees)

    def _contents(self) -> list[checkpoint.Contents]:
        return [checkpoint.contents(one) for one in self.trainees]

    def _write(self, contents: Sequence[checkpoint.Contents]) -> None:
        if self.accelerator.scaler is not None:
            self.state.scaler = self.accelerator.scaler.state_dict()
        checkpoint.save(self.settings.output, self.state, contents, self.settings.keep, self.known)

    def _last_words(self, error: BaseException) -> Iterator[str]:
        """Save what is not saved yet; what went wrong in that, and the checkpoint to go on from."""
        if not self.accelerator.is_main_process:
            yield "process 0 names the checkpoint to go on from"
            return
        due = self._is_due(error)
        with self.stop.held("the last completed step is being saved"):
            failures = [*(_failure(self._rescue) if due else ()), *_failure(self.report.write)]
        yield from map(str, failures)
        told = [*failures, *([] if due else [error])]
        if not any(isinstance(one, DiskError) for one in told):
            yield checkpoint.to_go_on_from(self.settings.output)
        if isinstance(error, DataError):
            yield "a run goes on with the clips that it began with: put them back first"

    def _is_due(self, error: BaseException) -> bool:
        """Whether the last completed step can be saved and is to be: not if a resume would meet the same value again.

        Of sharded weights no process has all.
        """
        settled = self.whole and not any(one.resting or one.spread for one in self.trainees)
        return settled and self.state.step > self.tried and not isinstance(error, NotFiniteError)

    def _rescue(self) -> None:
        with torch.no_grad():
            for (module, name), copy in zip(self.buffers, self.copies, strict=True):
                module.get_buffer(name).copy_(copy)
        self._write(self._contents())

    def _copies(self) -> list[Tensor]:
        return [module.get_buffer(name).clone() for module, name in self.buffers]


def _failure(act: Callable[[], object]) -> list[Exception]:
    """The error that an act ends with, beside one that is being handled, which it must not hide.

    RuntimeError is what a lost GPU raises; memory may be what the run ended by.
    """
    try:
        act()
    except (InflateError, RuntimeError, ValueError, ArithmeticError, MemoryError) as failure:
        return [failure]
    return []


def check_room(settings: Training, state: State, trainees: Sequence[Trainee]) -> None:
    """Raise DiskError where the disk cannot hold one checkpoint; warn where it cannot hold all that will be there.

    The new one stands beside those that are kept until it is whole.
    """
    remove_leftovers(settings.output, "checkpoint-*")
    steps = max(1, settings.steps - state.step)
    written = -(-steps // settings.checkpoint_every) if settings.checkpoint_every else 1
    count = min(written, settings.keep + 1) if settings.keep else written
    count = max(1, count - len(checkpoint.numbered(settings.output)))
    usage, each = shutil.disk_usage(settings.output), checkpoint.size(trainees)
    if usage.total and usage.free < count * each:  # some network file systems tell nothing
        room = f"{_gigabytes(usage.free)} are free for training.output={settings.output}"
        if usage.free < each:
            last = checkpoint.to_go_on_from(settings.output)
            raise DiskError(
                f"a checkpoint takes about {_gigabytes(each)}, but {room}; free space or name another\n{last}"
            )
        need = f"{count} checkpoints take about {_gigabytes(count * each)} (training.keep={settings.keep})"
        logger.warning("%s, but %s; free space, or lower training.keep", need, room)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
