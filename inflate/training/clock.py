"""Where the time of training goes.

data_wait   waiting for the next batch
encode      all that a loss does outside the trained networks: frozen encoders, noise, distances
forward     within the trained networks, called by their own loss or by another's
backward    gradients, with what checkpointing computes again
update      gradient norms, the checks of a step, optimisers, averages
other       the rest: moving batches, logging

On a GPU it is the device's time, by events on its stream that are read at a log entry: it waits for nothing in between,
and what the host does while the device has work counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import nn

from inflate.measures import SHARES, Share
from inflate.training.gauge import Gauge

MOST_MARKS = 4096
"""Marks that wait to be read; a log entry is rarely that far off."""


class Clock:
    """Counts all time towards one share after another; hooks on the trained networks tell `forward` from `encode`.

    Only the outermost call of a network counts, and only within a loss: not another network's call inside it, nor the
    repeated one of gradient checkpointing in the backward pass. A gauge is told of the same phases.
    """

    def __init__(self, device: torch.device, networks: Iterable[nn.Module], gauge: Gauge | None = None) -> None:
        self.gauge = gauge or Gauge()
        self.on_gpu = device.type == "cuda"
        self.share: Share | None = "other"
        self.depth = 0
        self.seconds: dict[str, float] = dict.fromkeys(SHARES, 0.0)
        self.marks: list[tuple[Share | None, Any]] = [("other", self._now())]
        self.hooks = [
            hook
            for network in {*networks}
            for hook in (
                network.register_forward_pre_hook(self._enter),
                network.register_forward_hook(self._leave, always_call=True),
            )
        ]

    def begin(self, share: Share | None) -> None:
        """Count the time from here on towards a share; None = a pause, which counts for nothing."""
        self.share = share
        self.gauge.begin(share)
        self.marks.append((share, self._now()))
        if len(self.marks) > MOST_MARKS:
            self._settle()

    def read(self) -> dict[str, float]:
        """The seconds of each share since the last reading; it waits for the device to get here."""
        self.begin(self.share)
        self._settle()
        seconds, self.seconds = self.seconds, dict.fromkeys(SHARES, 0.0)
        return seconds

    def stop(self) -> None:
        """Leave the networks alone."""
        for hook in self.hooks:
            hook.remove()

    def _settle(self) -> None:
        if self.on_gpu:
            self.marks[-1][1].synchronize()
        for (share, begun), (_, ended) in pairwise(self.marks):
            if share is not None:
                self.seconds[share] += begun.elapsed_time(ended) / 1000 if self.on_gpu else ended - begun
        del self.marks[:-1]

    def _now(self) -> Any:
        if not self.on_gpu:
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, *_: Any) -> None:
        if self.share == "encode":
            self.begin("forward")
        if self.share == "forward":
            self.depth += 1

    def _leave(self, *_: Any) -> None:
        if self.share == "forward":
            self.depth -= 1
            if not self.depth:
                self.begin("encode")
