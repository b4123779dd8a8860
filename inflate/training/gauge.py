"""The highest use of memory in each phase of a run, as it was measured.

On a GPU its allocator counts, at no cost. A CPU has none that does: there a ledger follows every tensor, which slows
the run down, so it does so only where a prediction is to be compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from inflate.training.memory import Ledger


class Gauge:
    """Bytes in use at most, by phase; this one measures nothing."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self.phase: str | None = None

    def begin(self, phase: str | None) -> None:
        """Count towards a phase from here on; None = a pause, which counts for nothing.

        Once the trained network was called, a loss holds its graph: what follows counts as forward until the backward.
        """
        after = (self.phase, phase) == ("forward", "encode")
        self.end()
        self.phase = "forward" if after else phase

    def end(self) -> None:
        """Enter what the phase under way needed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.begin(None)


class AllocatorGauge(Gauge):
    """Reads the allocator of a GPU at the end of each phase."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def end(self) -> None:
        """Enter what the phase under way needed."""
        if self.phase is not None:
            highest = torch.cuda.max_memory_allocated(self.device)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), highest)
        torch.cuda.reset_peak_memory_stats(self.device)


class LedgerGauge(Gauge):
    """Follows the tensors of a run on a CPU, those included that there are already."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.ledger, self.stack = Ledger("cpu"), ExitStack()
        self.ledger.record(tensors)

    def begin(self, phase: str | None) -> None:
        """Count towards a phase from here on, as `Gauge.begin`."""
        super().begin(phase)
        self.ledger.begin(self.phase or "")

    def end(self) -> None:
        """Enter what the phase under way needed."""
        self.peaks = {name: peak for name, peak in self.ledger.peaks.items() if name}

    def __enter__(self) -> Self:
        self.stack.enter_context(self.ledger)
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()
        self.begin(None)


def gauge_of(device: torch.device, compared: bool, tensors: Iterable[Tensor]) -> Gauge:
    """What measures the memory of a run on a device; on a CPU only where it is `compared` with a prediction."""
    if device.type == "cuda":
        return AllocatorGauge(device)
    return LedgerGauge(tensors) if compared else Gauge()
