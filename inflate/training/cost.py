"""What a run costs in memory and arithmetic: its own task, loss, optimiser and average, on a device or on paper."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from inflate.training import eight_bits
from inflate.training.loop import learn, place
from inflate.training.memory import Ledger, bytes_of, tensors_of
from inflate.training.noise import Noise
from inflate.training.paper import DEVICE, Paper
from inflate.training.player import Batch, Task, Trainee, at_rest, turn
from inflate.training.settings import Training

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
LOOKS = ("evaluate", "preview")
PHASES = ("encode", "forward", "backward", "update", *LOOKS)
"""encode: what a loss does before it calls the trained networks; update: clipping, optimiser, average."""


@dataclass(frozen=True)
class Cost:
    """Sizes in bytes; FLOPs are of an optimiser step and count a multiply-add as two.

    Peaks are those of an allocator that never fragments: kernels' workspaces and the device's own context come on top.
    """

    weights: int
    """of the trained networks, all their layers"""
    frozen: int
    """of encoders and other networks that each step needs"""
    trained: int
    """number (not bytes) of trained parameters"""
    gradients: int
    optimizer: int
    average: int
    peaks: dict[str, int]
    """highest use by phase, all that lies there included"""
    forward_flops: int
    """of one pass of the trained networks"""
    half_flops: int
    """done in half precision"""
    full_flops: int
    """done in full precision"""

    @property
    def peak(self) -> int:
        """The highest use of all."""
        return max(self.peaks.values())

    @property
    def limit(self) -> str:
        """The phase that needs it."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    @property
    def flops(self) -> int:
        """Of an optimiser step."""
        return self.half_flops + self.full_flops


class Watched(Task, Protocol):
    """A task that says what looking at it needs."""

    @property
    def visiting(self) -> Sequence[nn.Module]:
        """Networks that are on the device only while `evaluate` and `preview` run: the task moves them."""

    def drawn(self) -> Iterator[Any]:
        """What `preview` writes, made one after the other."""


class Desk:
    """What trainees ask of accelerate, for one process; `fused` is PyTorch's AdamW on a GPU (`Trainee`)."""

    num_processes = 1
    is_main_process = True
    device = DEVICE

    def __init__(self, settings: Training, fused: bool) -> None:
        self.settings, self.fused, self.state = settings, fused, SimpleNamespace(sharding=None)

    def prepare_model(self, network: nn.Module) -> nn.Module:
        """Put autocast around a network, as accelerate does."""
        if self.settings.precision in HALVES:
            autocast = torch.autocast(self.device.type, HALVES[self.settings.precision])
            network.forward = convert_outputs_to_fp32(autocast(network.forward))
        return network

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let PyTorch's optimiser do as on a GPU."""
        for group in optimizer.param_groups if isinstance(optimizer, torch.optim.AdamW) else ():
            group["fused"] = self.fused or None
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Gradients of a share of the step's loss."""
        (loss / self.settings.accumulate).backward()

    def unscale_gradients(self, optimizer: Any) -> None:
        """Nothing: what is scaled has the same size."""


def on_paper(task: Watched, settings: Training, batch: Batch, paper: Paper, looking: bool = True) -> Cost:
    """The cost of a task on paper; `looking` runs `evaluate` and `drawn`, too.

    Networks that come only to look are away before.
    """
    for network in _networks(task):
        paper.adopt(network)
    with paper.active():
        for network in task.visiting:
            network.to("meta")
        return measure(task, settings, batch, looking, paper.gpu)


def measure(task: Watched, settings: Training, batch: Batch, looking: bool = False, gpu: bool = False) -> Cost:
    """The cost of one optimiser step of a task as it runs on the CPU, with the optimiser's state there already.

    Every player acts in it. Of accumulated passes two are run: the second meets the first one's gradients.
    """
    desk, ledger = Desk(settings, gpu), Ledger(DEVICE.type, workspaces=gpu)
    trainees = [Trainee(player, settings) for player in task.players]
    for one in trainees:
        one.forget_frozen()
    for signed in (True, False):
        eight_bits.table(signed, DEVICE)  # there for good once an optimiser has used it
    gc.collect()  # a dead cycle that is collected in mid-run would count as memory that the step gave back
    ledger.record(tensor for network in _networks(task) for tensor in tensors_of(network))
    ledger.record(batch.values())
    with ledger, _noting(ledger, [player.network for player in task.players]):
        place(task, trainees, desk)
        _prime(trainees)
        ledger.peaks.clear()
        gradients = _step(trainees, settings, batch, desk, ledger)
        if looking:
            _look(task, trainees, ledger)
    return _cost(task, trainees, settings, gradients, ledger)


def _networks(task: Task) -> list[nn.Module]:
    return [*task.frozen, *(player.network for player in task.players)]


def _prime(trainees: Sequence[Trainee]) -> None:
    """Let the optimisers have their state, as from the second step on."""
    for one in trainees:
        for parameter in one.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        one.optimizer.step()
        one.optimizer.zero_grad()


def _step(trainees: Sequence[Trainee], settings: Training, batch: Batch, desk: Desk, ledger: Ledger) -> int:
    """One optimiser step; the bytes of its gradients."""
    for _ in range(_passes(settings)):
        noise = Noise(settings.seed, batch["number"], desk.device)
        for one in trainees:
            with turn(one, trainees):
                learn(one, batch, noise, settings.steps, desk, ledger)
    gradients = bytes_of(p.grad for one in trainees for p in one.parameters.values() if p.grad is not None)
    ledger.begin("update")
    for one in trainees:
        one.update(settings.steps, one.gradient_norm(desk))
    return gradients


def _look(task: Watched, trainees: Sequence[Trainee], ledger: Ledger) -> None:
    ledger.record(tensor for network in task.visiting for tensor in tensors_of(network))
    with at_rest(trainees):
        ledger.begin("evaluate")
        task.evaluate()
        ledger.begin("preview")
        for _ in task.drawn():
            pass
    ledger.begin("other")


def _passes(settings: Training) -> int:
    return min(settings.accumulate, 2)


def _cost(task: Task, trainees: Sequence[Trainee], settings: Training, gradients: int, ledger: Ledger) -> Cost:
    share = settings.accumulate / _passes(settings)
    work = {key: round(flops * share) for key, flops in ledger.work.items() if key[0] not in LOOKS}
    forward = sum(flops for (phase, _), flops in ledger.work.items() if phase == "forward")
    parameters = [parameter for one in trainees for parameter in one.parameters.values()]
    return Cost(
        weights=bytes_of(tensor for one in trainees for tensor in tensors_of(one.module)),
        frozen=bytes_of(tensor for network in task.frozen for tensor in tensors_of(network)),
        trained=sum(parameter.numel() for parameter in parameters),
        gradients=gradients,
        optimizer=bytes_of(state for one in trainees for state in _states(one, ledger.device)),
        average=bytes_of(average for one in trainees for average in one.average.values()),
        peaks={phase: ledger.peaks[phase] for phase in PHASES if phase in ledger.peaks},
        forward_flops=forward // _passes(settings),
        half_flops=sum(flops for (_, half), flops in work.items() if half),
        full_flops=sum(flops for (_, half), flops in work.items() if not half),
    )


def _states(one: Trainee, device: str) -> Iterator[Tensor]:
    for state in one.optimizer.state.values():
        yield from (each for each in state.values() if isinstance(each, Tensor) and each.device.type == device)


@contextmanager
def _noting(ledger: Ledger, networks: Sequence[nn.Module]) -> Iterator[None]:
    """Tell what a loss does before it calls a network from the rest: what it encodes holds no graph yet."""

    def enter(*_: Any) -> None:
        if ledger.phase == "encode":
            ledger.begin("forward")

    with ExitStack() as stack:
        for network in networks:
            stack.callback(network.register_forward_pre_hook(enter).remove)
        yield
