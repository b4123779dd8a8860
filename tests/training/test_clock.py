"""The shares of time, told by a time that only the networks and the losses of these tests let pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inflate.measures import SHARES
from inflate.training import clock
from inflate.training.clock import Clock

CPU = torch.device("cpu")


class Time:
    """Seconds that pass on demand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Slow(nn.Module):
    """Takes 3 seconds in its forward pass, and what another network takes that it calls."""

    def __init__(self, time: Time, inner: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.time, self.weight = time, nn.Parameter(torch.ones(()))
        self.inner = [inner] if inner else []  # not a child

    def forward(self, x: Tensor) -> Tensor:
        self.time.passes(3)
        for network in self.inner:
            x = network(x)
        return (self.weight * x).sin()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    now = Time()
    monkeypatch.setattr(clock, "perf_counter", now)
    return now


def seconds(made: Clock) -> dict[str, float]:
    """What passed, without what did not."""
    read = made.read()
    assert tuple(read) == SHARES
    return {share: value for share, value in read.items() if value}


def test_all_time_is_counted_towards_one_share_after_another(time: Time) -> None:
    network = Slow(time)
    made = Clock(CPU, [network])
    time.passes(1)
    for share, took in (("data_wait", 2), (None, 100), ("update", 4), ("other", 5)):
        made.begin(share)
        time.passes(took)
    made.begin("encode")
    time.passes(6)
    network(torch.ones(2))
    time.passes(7)
    made.begin("backward")
    time.passes(8)
    assert seconds(made) == {"data_wait": 2, "encode": 13, "forward": 3, "backward": 8, "update": 4, "other": 6}
    time.passes(1)
    assert seconds(made) == {"backward": 1}  # since the last reading only
    made.stop()
    made.begin("encode")
    network(torch.ones(2))
    assert seconds(made) == {"encode": 3}


def test_a_network_within_another_counts_once(time: Time) -> None:
    inner = Slow(time)
    outer = Slow(time, inner)
    wrapped = nn.Sequential(outer)  # as accelerate wraps a player's network
    made = Clock(CPU, [inner, outer, wrapped, inner])
    made.begin("encode")
    wrapped(torch.ones(2))
    time.passes(1)
    assert seconds(made) == {"encode": 1, "forward": 6}


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_checkpointing_computes_again_is_the_backward_pass(time: Time, reentrant: bool) -> None:
    network = Slow(time)
    made = Clock(CPU, [network])
    for _ in range(2):
        made.begin("encode")
        out = checkpoint(network, torch.ones(2, requires_grad=True), use_reentrant=reentrant)
        made.begin("backward")
        out.sum().backward()
        made.begin("other")
    assert seconds(made) == {"forward": 6, "backward": 6}


def test_a_network_used_outside_a_loss_is_left_alone(time: Time) -> None:
    network = Slow(time)
    made = Clock(CPU, [network])
    made.begin(None)
    network(torch.ones(2))
    made.begin("data_wait")
    network(torch.ones(2))
    assert seconds(made) == {"data_wait": 3}


def test_a_forward_pass_that_fails_ends_too(time: Time) -> None:
    def fail(_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    network = Slow(time, fail)
    made = Clock(CPU, [network])
    made.begin("encode")
    with pytest.raises(RuntimeError, match="out of memory"):
        network(torch.ones(2))
    time.passes(1)
    assert seconds(made) == {"encode": 1, "forward": 3}


def test_marks_do_not_pile_up_until_a_distant_entry(time: Time) -> None:
    made = Clock(CPU, [])
    for _ in range(3 * clock.MOST_MARKS):
        made.begin("other")
        time.passes(1)
    assert len(made.marks) <= clock.MOST_MARKS
    assert seconds(made) == {"other": 3 * clock.MOST_MARKS}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_devices_time() -> None:
    network = nn.Linear(4096, 4096, device="cuda")
    made = Clock(torch.device("cuda"), [network])
    x = torch.randn(4096, 4096, device="cuda")
    made.begin("encode")
    for _ in range(20):
        network(x)
    made.begin("backward")
    read = made.read()
    assert read["forward"] > 10 * read["encode"] > 0
