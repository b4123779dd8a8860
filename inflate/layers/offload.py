"""Where tensors rest that the backward pass needs much later: in the memory of the CPU, pinned for a GPU to reach it.

The copies run on a stream of their own. On the way out the computation waits for a copy before the next one begins, so
that its memory can be given away at once; on the way back a unit's tensors are asked for while the unit before it, in
the order of the backward pass, is still at work. For a network on the CPU a copy rests in the same memory: nothing is
gained there, and nothing is different.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_resting: ContextVar[bool] = ContextVar("resting", default=False)


@contextmanager
def resting() -> Iterator[None]:
    """Say that the tensors made meanwhile lie outside of the device that computes, whatever they call their device."""
    token = _resting.set(True)
    try:
        yield
    finally:
        _resting.reset(token)


def is_resting() -> bool:
    """Whether the tensors that are made now lie outside of the device that computes."""
    return _resting.get()


class Slot:
    """A tensor at rest, and its way there and back."""

    def __init__(self, tensor: Tensor) -> None:
        self.device = tensor.device
        with resting():
            self.host = torch.empty_like(tensor, device=_home(tensor), pin_memory=tensor.is_cuda)
            self.done = _copy(self.host, tensor)
        self.back: Tensor | None = None

    def fetch(self) -> None:
        """Begin to bring the tensor back, unless it is on its way."""
        if self.back is None:
            self.back = torch.empty_like(self.host, device=self.device)
            self.done = _copy(self.back, self.host)

    def take(self) -> Tensor:
        """The tensor on its device; the slot forgets it there."""
        self.fetch()
        self.settle()
        tensor, self.back = self.back, None
        assert tensor is not None
        return tensor

    def settle(self) -> None:
        """Let the computation wait for the last copy."""
        if self.done is not None:
            torch.cuda.current_stream(self.device).wait_event(self.done)


class Parcel:
    """What one unit put to rest, and the parcel of the unit before it, which is needed next on the way back."""

    def __init__(self, offload: Offload, before: Parcel | None) -> None:
        self.offload = offload
        self.before = (lambda: None) if before is None else weakref.ref(before)
        self.slots: list[Slot] = []

    def put(self, tensor: Tensor) -> Any:
        """A number in place of features (N,C,H,W); anything smaller stays."""
        if tensor.ndim != 4:
            return tensor
        self.slots.append(self.offload.slot(tensor))
        return len(self.slots) - 1

    def take(self, kept: Any) -> Tensor:
        """What `put` was given, while what is needed next sets out."""
        if isinstance(kept, Tensor):
            return kept
        self.offload.settle()
        tensor = self.slots[kept].take()
        before = self.before()
        for slot in before.slots if before else ():
            slot.fetch()
        return tensor


class Offload:
    """Puts to rest what checkpointed calls keep of their inputs; one for each network."""

    def __init__(self) -> None:
        self._latest: Callable[[], Parcel | None] = lambda: None
        self._leaving: tuple[Slot, Tensor] | None = None
        self._slots: dict[Any, tuple[Any, weakref.ref[Slot]]] = {}

    def around(self, recompute: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function whose inputs rest elsewhere."""

        def offloaded(function: Callable[..., Any], *tensors: Any) -> Any:
            parcel = Parcel(self, self._latest())
            self._latest = weakref.ref(parcel)
            # Within, the checkpoint's own hooks stand above these: only its inputs pass here.
            with saved_tensors_hooks(parcel.put, parcel.take):
                return recompute(function, *tensors)

        return offloaded

    def slot(self, tensor: Tensor) -> Slot:
        """Where a tensor rests; one that two units keep, as a skip connection is, rests once."""
        storage = tensor.untyped_storage()
        key = (storage._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version)
        known = self._slots.get(key)
        slot = known[1]() if known else None
        if slot is None:
            self.settle()
            slot = Slot(tensor)
            self._leaving = slot, tensor
            self._slots[key] = weakref.ref(storage, lambda _: self._slots.pop(key, None)), weakref.ref(slot)
        return slot

    def settle(self) -> None:
        """Let the computation wait for what is leaving, whose memory is given away after it."""
        if self._leaving is not None:
            self._leaving[0].settle()
            self._leaving = None


def _home(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_cuda else tensor.device


def _copy(to: Tensor, source: Tensor) -> torch.cuda.Event | None:
    """Copy on the side stream of the GPU that takes part; the event that it is done. Without a GPU, copy at once."""
    device = source.device if source.is_cuda else to.device
    if device.type != "cuda":
        to.copy_(source)
        return None
    side = _side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        to.copy_(source, non_blocking=True)
        return side.record_event()


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
