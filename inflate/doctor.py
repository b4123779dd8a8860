"""Checks a cluster, or several GPUs of one machine, in a small training made of what the training loop is made of.

    accelerate launch --multi_gpu --num_processes N -m inflate.doctor --output DIR

Every process makes every check and comes to the same verdicts; the main one prints them. `inflate doctor` checks one
machine's installation, in one process.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from inflate.errors import InflateError, TrainingError, report_errors
from inflate.files import write_text
from inflate.findings import Checks, Finding, all_pass, failed, quieten, warning
from inflate.installation import LAUNCH, MACHINE, SVD_PARAMETERS, nearest
from inflate.models.weights import tensors_sha256
from inflate.training.checkpoint import State
from inflate.training.clock import Clock
from inflate.training.endings import Keeper, Stop
from inflate.training.log import Report
from inflate.training.loop import find_checkpoint, place, restore
from inflate.training.noise import Noise
from inflate.training.player import Batch, Task, Trainee
from inflate.training.processes import SAME_NORM, agree, join_processes, noticing_losses, start_accelerator, together
from inflate.training.record import device_name, versions
from inflate.training.settings import Training
from inflate.training.sharding import Sharding, holding, own, whole

LAUNCHED = ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS", "DYNAMO_BACKEND", "USE_CPU")
"""What accelerate's launcher sets on each machine, as ACCELERATE_..."""

SECONDS_PER_CHECK = 300.0
"""After which a check is given up; processes that wait for each other for good cannot say so otherwise."""
STEPS, BATCH = 8, 2
WIDE, REPEATS = 2**24, 5
"""Float32 values in the all-reduce that bandwidth is measured by (64 MiB), and how often."""
SAMPLED = 256
"""Values of each gradient that are compared between all processes."""


# --- what the checks work on ------------------------------------------------------------------------------------------


@dataclass
class Rehearsal:
    """One process's part in a small training: the loop's own parts, any of which may be unsound."""

    accelerator: Any
    settings: Training
    """`settings.output` is where checkpoints go"""
    task: Task
    batches: Sequence[Batch]
    """of this process, one per forward pass of the first steps"""
    draw: Callable[[Batch], Noise]
    """the noise of a batch"""
    trainees: list[Trainee] = field(init=False)

    def __post_init__(self) -> None:
        self.trainees = [Trainee(player, self.settings) for player in self.task.players]

    def checks(self) -> Checks:
        """All checks by name, in the order in which they must be made; every process makes them together."""
        return {
            "processes": self.processes,
            "versions and settings": self.versions,
            "sample numbers": self.numbers,
            "noise": self.noise,
            "weights": self.weights,
            "gradients": self.gradients,
            "bandwidth": self.bandwidth,
            "output folder": self.folder,
            "checkpoint": self.checkpoint,
        }

    def processes(self) -> Finding:
        """Who takes part."""
        rows = gather_object([(device_name(self.accelerator.device), socket.gethostname())])
        parts = [f"{count} x {device} on {host}" for (device, host), count in Counter(rows).items()]
        found = f"{len(rows)} see each other by {self.accelerator.state.backend}: {', '.join(parts)}"
        if len({device for device, _ in rows}) > 1:
            return warning(found, "the slowest sets the pace")
        return Finding(found)

    def versions(self) -> Finding:
        """That all run the same code, launched alike."""
        launched = {f"ACCELERATE_{name}": os.environ.get(f"ACCELERATE_{name}", "unset") for name in LAUNCHED}
        asked = holding(self.accelerator.state.sharding)
        agree({**versions(), **launched, "device": self.accelerator.device.type, "what the launcher asks for": asked})
        return Finding(", ".join(f"{name} {value}" for name, value in versions().items() if value))

    def numbers(self) -> Finding:
        """That every sample of the first steps is seen, and by one process only."""
        rows = gather_object([[int(number) for batch in self.batches for number in batch["number"]]])
        if shared := twins(rows, overlap):
            return failed(f"the sample numbers of {shared}", "each process must read its own share of each step")
        every = sorted(number for row in rows for number in row)
        if every != list(range(len(every))):
            return failed(f"the processes see the sample numbers {every}", "each must be seen once")
        return Finding(f"{len(every)} in {STEPS} steps, each seen by one process")

    def noise(self) -> Finding:
        """That no two processes draw the same noise."""
        with locally():
            draws = [self.draw(batch).normal("noise", 4).tolist() for batch in self.batches]
        rows = gather_object([[tuple(values) for draw in draws for values in draw]])
        if shared := twins(rows, overlap):
            return failed(f"the noise draws of {shared}", "draw by inflate.training.noise.Noise")
        return Finding(f"{sum(map(len, rows))} draws, all different")

    def weights(self) -> Finding:
        """That all begin with the same weights, frozen ones too, which nothing would make equal later; places them, and
        looks whether they lie as the launcher asked.
        """
        modules = [*self.task.frozen, *(one.module for one in self.trainees)]
        digests = gather_object([tensors_sha256(named for module in modules for named in module.state_dict().items())])
        (one,) = self.trainees
        every = sum(parameter.numel() for parameter in one.module.parameters())
        place(self.task, self.trainees, self.accelerator)
        if odd := [process for process, digest in enumerate(digests) if digest != digests[0]]:
            remedy = "all must load the same files and create new layers from the same seed"
            return failed(f"{named(odd)} built other weights than process 0", remedy)
        held = sum(own(weight).numel() for weight in one.spread.values()) if one.spread else every
        return judge_shares(gather_object([held]), every, self.accelerator.state.sharding)

    def gradients(self) -> Finding:
        """That the gradients are the same everywhere, and the mean of what each process computes from its own batch."""
        (one,) = self.trainees
        with self.filled(one), locally():
            alone = self.alone(one)
        with locally():
            loss, called = self.loss(one)
        if bare := [process for process, calls in enumerate(gather_object([called])) if not calls]:
            remedy = "a loss must call player.network(...), not the module inside it"
            return failed(f"{named(bare)} bypassed the wrapper that exchanges gradients", remedy)
        self.accelerator.backward(loss.mean())
        with locally():
            one.gradient_norm(self.accelerator)
        gradients = {name: parameter.grad for name, parameter in one.parameters.items() if parameter.grad is not None}
        exchanged = flat(self.joined(gradient, one.spread.get(name)) for name, gradient in gradients.items())
        return self.judge_gradients(exchanged, alone)

    def joined(self, tensor: Tensor, like: DTensor | None) -> Tensor:
        """All of a tensor of which each process may hold a share."""
        return whole(tensor, like, self.accelerator.device, everywhere=True)

    @contextmanager
    def filled(self, one: Trainee) -> Iterator[None]:
        """Have whole weights in the bare module, which is empty where they are sharded."""
        parameters = dict(one.module.named_parameters())
        for name, weight in one.spread.items():
            parameters[name].data = self.joined(own(weight), weight)
        try:
            yield
        finally:
            for name in one.spread:
                parameters[name].data = parameters[name].data.new_empty(0)

    def judge_gradients(self, exchanged: Tensor, alone: Tensor) -> Finding:
        """What the exchanged gradient (P,) and the one computed from this process's batch alone (P,) mean."""
        first = broadcast(exchanged.clone(), from_process=0)
        mean = self.accelerator.reduce(alone, reduction="mean")
        own = torch.stack([distance(exchanged, first), distance(exchanged, mean)])
        apart = self.accelerator.gather(own.unsqueeze(0)).tolist()  # (processes, 2)
        sampled = self.accelerator.gather(alone[:: max(1, len(alone) // SAMPLED)].unsqueeze(0))  # (processes, values)
        if odd := [process for process, (other, _) in enumerate(apart) if not other <= SAME_NORM]:
            remedy = "gradients are not exchanged: each process trains a model of its own"
            return failed(f"{named(odd)} got other gradients than process 0", remedy)
        if odd := [process for process, (_, off) in enumerate(apart) if not off <= SAME_NORM]:
            return failed(f"{named(odd)} did not get the mean over the processes", "gradients are exchanged wrongly")
        if same := twins(list(sampled), near):
            return failed(f"the gradients of {same}", "each process must train on other clips and noise")
        other, off = (max(column) for column in zip(*apart, strict=True))
        equal = "bit for bit" if other == 0 else f"to {other:.1e}"
        return Finding(f"equal {equal}, and to {off:.1e} the mean of what each process computes alone")

    def alone(self, one: Trainee) -> Tensor:
        """The gradient (P,) of this process's first batch, not exchanged."""
        wrapped, one.player.network = one.player.network, one.module
        try:
            loss, _ = one.player.loss(self.batches[0], self.draw(self.batches[0]), 0)  # (B,)
            parameters = dict(one.module.named_parameters())
            return flat(torch.autograd.grad(loss.mean(), [parameters[name] for name in one.parameters]))
        finally:
            one.player.network = wrapped

    def loss(self, one: Trainee) -> tuple[Tensor, int]:
        """The loss (B,) of the first batch as the loop has it, and how often the wrapped network was called for it."""
        calls: list[None] = []
        hook = one.player.network.register_forward_hook(lambda *_: calls.append(None))
        loss, _ = one.player.loss(self.batches[0], self.draw(self.batches[0]), 0)  # (B,)
        hook.remove()
        return loss, len(calls)

    def bandwidth(self) -> Finding:
        """How fast, and whether rightly, tensors are summed over the processes."""
        wide, right = self.all_reduce(WIDE, REPEATS)
        short, _ = self.all_reduce(1, 4 * REPEATS)
        if odd := [process for process, good in enumerate(gather_object([right])) if not good]:
            remedy = "NCCL_P2P_DISABLE=1 helps where GPUs reach each other wrongly over PCIe"
            return failed(f"{named(odd)} got a wrong sum", remedy)
        rate, gradient = 4 * WIDE / wide, 4 * SVD_PARAMETERS
        measured = f"{4 * WIDE >> 20} MiB are summed in {wide * 1e3:.1f} ms: {rate / 1e9:.2f} GB/s"
        whole = f"the gradient of Stable Video Diffusion's whole UNet, {gradient / 1e9:.1f} GB in float32"
        return Finding(
            f"{measured}; latency {short * 1e6:.0f} us; {whole}, would take {gradient / rate:.1f} s per step"
        )

    def all_reduce(self, values: int, repeats: int) -> tuple[float, bool]:
        """Median seconds to sum so many float32 values over all processes, and whether each sum was right."""
        count, seconds, right = self.accelerator.num_processes, [], True
        for _ in range(1 + repeats):  # the first sets up connections
            tensor = torch.full((values,), self.accelerator.process_index + 1.0, device=self.accelerator.device)
            self.accelerator.wait_for_everyone()
            begun = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            tensor[0].item()  # waits for a GPU
            seconds.append(time.perf_counter() - begun)
            right &= bool((tensor == count * (count + 1) / 2).all())
        return statistics.median(seconds[1:]), right

    def folder(self) -> Finding:
        """That all processes see what the main one writes to the output folder."""
        token, probe = same_for_all(os.urandom(8).hex()), self.settings.output / "seen"
        with locally():
            if self.accelerator.is_main_process:
                write_text(probe, token)
        with locally():
            sees = probe.is_file() and probe.read_text(encoding="utf-8") == token
        rows = gather_object([(sees, f"{probe.parent.parent} on {socket.gethostname()}")])
        blind = [process for process, (seen, _) in enumerate(rows) if not seen]
        if blind:
            places = ", ".join(sorted({rows[process][1] for process in blind}))
            remedy = f"{places} must be the folder that process 0 has as {rows[0][1]}: name one that all machines share"
            return failed(f"{named(blind)} cannot see what process 0 writes", remedy)
        return Finding(f"{rows[0][1]}, seen by all processes")

    def checkpoint(self) -> Finding:
        """That what all save, all load."""
        state = State()
        saved = self.held()
        clock = Clock(self.accelerator.device, [])
        with Report(self.settings, self.accelerator, state, clock, self.task.players) as report:
            stop = Stop(None, self.accelerator.is_main_process)
            keeper = Keeper(self.settings, self.accelerator, self.trainees, report, state, stop, set())
            with together():
                keeper.save()
        for parameter in (parameter for one in self.trainees for parameter in one.parameters.values()):
            parameter.data.zero_()
        with together():
            found = find_checkpoint(self.settings)
        agree({"the checkpoint that was just saved": found and found.name})
        restore(found, state, self.settings, self.trainees, self.accelerator)
        if odd := [process for process, same in enumerate(gather_object([self.held() == saved])) if not same]:
            return failed(f"{named(odd)} loaded other weights than were saved", "is the disk sound?")
        return Finding("saved by all and loaded by all, with equal weights")

    def held(self) -> str:
        """A digest of what this process holds of the trained weights."""
        return tensors_sha256(named for one in self.trainees for named in (one.parameters | one.buffers()).items())


@contextmanager
def rehearse(output: Path) -> Iterator[Rehearsal]:
    """A sound rehearsal, in a folder of its own below `output`, or below the nearest parent that there is."""
    from inflate.training.rehearsal import batches, pocket_task, settings  # imports models, which `quieten` is ahead of

    state = join_processes()
    with limited("processes"):  # the first message between them: where a network is shut, it is never answered
        name = same_for_all(f".doctor-{os.urandom(8).hex()}")
    training = settings(nearest(output) / name, steps=STEPS, batch=BATCH, resume="latest")
    accelerator = start_accelerator(training)

    def draw(batch: Batch) -> Noise:
        return Noise(training.seed, batch["number"], accelerator.device)

    own = batches(training, state.num_processes, state.process_index)
    try:
        yield Rehearsal(accelerator, training, pocket_task(training), own, draw)
    finally:
        if accelerator.is_main_process:
            shutil.rmtree(training.output, ignore_errors=True)


def judge_shares(held: Sequence[int], every: int, asked: Sharding | None) -> Finding:
    """Whether processes that hold so many of `every` weights hold them as the launcher asked."""
    copies = asked.replicas if asked else len(held)
    if sum(held) != copies * every:
        found = f"{holding(asked)} were asked for, but there are {sum(held) / every:.3g} copies of them, not {copies}"
        return failed(found, "launch by a file of recipes/accelerate, and make no Accelerator ahead of inflate's")
    share = f", {max(held) / every:.0%} in each" if asked else ""
    return Finding(f"the same in all processes before the first step; {holding(asked)}{share}")


# --- between the processes --------------------------------------------------------------------------------------------


@contextmanager
def locally() -> Iterator[None]:
    """Let all processes leave the block, or none: what this machine does to one is raised by all as a TrainingError."""
    with together(), machine_errors():
        yield


@contextmanager
def machine_errors(naming: bool = False) -> Iterator[None]:
    """Turn what is raised for reasons of the machine into a TrainingError, `naming` the process where no other does."""
    try:
        yield
    except InflateError:
        raise
    except MACHINE as error:
        process = f"{this_process()}: " if naming else ""
        raise TrainingError(f"{process}{type(error).__name__}: {error}") from error


@contextmanager
def limited(name: str, seconds: float = SECONDS_PER_CHECK) -> Iterator[None]:
    """End this process with status 1 and a line on standard error if the block takes longer."""
    timer = threading.Timer(seconds, give_up, [name, seconds])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def give_up(name: str, seconds: float) -> None:
    """End this process, which waits inside torch and hears of no exception."""
    waits = f"{this_process()} has waited for {seconds:.0f} s"
    remedy = "one that says nothing is the one that others wait for; NCCL_DEBUG=INFO tells of the network"
    sys.stderr.write(failed(waits, remedy).line(name) + "\n")
    sys.stderr.flush()
    os._exit(1)


def this_process() -> str:
    """Its number and host, also before the processes have met."""
    met = torch.distributed.is_initialized()
    rank = torch.distributed.get_rank() if met else os.environ.get("RANK", "0")
    return f"process {rank} on {socket.gethostname()}"


def same_for_all(value: str) -> str:
    """The main process's value, in every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]


# --- comparing --------------------------------------------------------------------------------------------------------


def named(processes: Sequence[int]) -> str:
    """Processes in words."""
    return f"process{'es' if len(processes) > 1 else ''} {', '.join(map(str, processes))}"


def twins(rows: Sequence[Any], alike: Callable[[Any, Any], bool]) -> str:
    """In words, each process whose row is like an earlier one's; empty where there is none."""
    found = []
    for process, row in enumerate(rows):
        earlier = next((other for other in range(process) if alike(row, rows[other])), None)
        if earlier is not None:
            found.append(f"process {process} are those of process {earlier}")
    return ", ".join(found)


def overlap(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two sequences have an element in common."""
    return not set(one).isdisjoint(other)


def distance(one: Tensor, other: Tensor) -> Tensor:
    """How far a vector is from another, as a share of the other's length; not a number where that is 0."""
    return (one - other).norm() / other.norm()


def near(one: Tensor, other: Tensor) -> bool:
    """Whether two vectors differ by rounding only."""
    return bool(distance(one, other) <= SAME_NORM)


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors as one vector of float32."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors])


# --- the command ------------------------------------------------------------------------------------------------------


@report_errors()
def main(
    output: Annotated[Path, typer.Option(help="Where runs will be written; a folder that all machines share.")] = Path(
        "output"
    ),
) -> None:
    """Check the processes that were launched with this command: that together they train one model. Status 1 if not."""
    quieten()
    with noticing_losses(), machine_errors(naming=True):
        with limited("processes"):
            state = join_processes()
        if state.num_processes == 1:
            typer.echo(warning("one, alone: nothing to compare", f"for several: {LAUNCH}").line("processes"))
            return
        passed = examine(output, typer.echo if state.is_main_process else lambda _: None)
        state.wait_for_everyone()  # or a launcher that sees one fail would end the others while they tidy up
        state.destroy_process_group()
    if not passed:
        sys.exit(1)


def examine(output: Path, say: Callable[[str], None]) -> bool:
    """Make all checks, each within its time; whether none failed."""
    with rehearse(output) as rehearsal:
        checks = {name: limited(name)(check) for name, check in rehearsal.checks().items()}
        return all_pass(checks, (InflateError,), say)


if __name__ == "__main__":
    typer.run(main)
