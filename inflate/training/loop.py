"""The one training loop: any task, any number of players, over accelerate."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from inflate.errors import CheckpointError, InflateError, NotFiniteError, TrainingError
from inflate.files import is_leftover, new_folder, write_text
from inflate.training import changes, checkpoint, record
from inflate.training.attention import check_attention, choose_attention, preferring
from inflate.training.checkpoint import State, writing
from inflate.training.clock import Clock
from inflate.training.compiling import Compilation
from inflate.training.endings import SIGNALS, Keeper, Stop, check_room
from inflate.training.gauge import gauge_of
from inflate.training.layout import put_channels_last
from inflate.training.log import Report
from inflate.training.noise import Noise, seed_of
from inflate.training.player import (
    Batch,
    Founded,
    Player,
    Selected,
    Task,
    Trainee,
    at_rest,
    check_players,
    check_shardable,
    in_full_precision,
    selected,
    turn,
)
from inflate.training.processes import agree, check_same_norms, noticing_losses, start_accelerator, together
from inflate.training.settings import Training, check
from inflate.training.sharding import holding

__all__ = ["Batch", "Dataset", "Noise", "Numbers", "Player", "Result", "Task", "Training", "fit"]

logger = logging.getLogger(__name__)
Terms = dict[str, list[Selected]]


class Dataset(Protocol):
    """Samples by number: number n is the n-th sample that a run sees, in any epoch, and holds its own `number`."""

    def __len__(self) -> int:
        """Clips in one epoch."""

    def __getitem__(self, number: int, /) -> Any:
        """The sample of a number, the same at each call."""


@runtime_checkable
class Stepwise(Dataset, Protocol):
    """A dataset that says which samples form each optimiser step; those of a plain one are the numbers in turn."""

    def numbers(self, step: int, lanes: int, batch: int, /) -> Sequence[int]:
        """The numbers of a step: of `lanes` batches, one per forward pass of any process, of equal size one by one.

        `batch` is the size asked for; the dataset may give another. The numbers depend on the product of lanes and
        size alone, so that accumulation and processes can stand for one another.
        """

    def fingerprint(self) -> Mapping[str, str]:
        """What the numbers rest on beside the seed; a run that resumes must find it unchanged."""


class Phases(Protocol):
    """What is told of the phases of a step: a clock, or a ledger."""

    def begin(self, phase: Any, /) -> None:
        """Count towards a phase from here on: encode, backward, update, other."""


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, why it stopped (`finished`, `max_seconds`, `SIGINT`, `SIGTERM`), held-out
    measurements by step, and the exported folder (None after a signal).
    """

    step: int
    stopped: str
    held_out: list[dict[str, float]]
    export: Path | None
    peaks: dict[str, int] = field(default_factory=dict)
    """the highest use of memory by phase, bytes, where it was measured"""


def fit(
    task: Task,
    dataset: Dataset,
    settings: Training,
    collate: Callable[[list[Any]], Any] = default_collate,
    config: str = "",
    clips: str = "",
    predicted: Mapping[str, int] | None = None,
) -> Result:
    """Train the task's players until the last step, the time limit or a signal, and leave a checkpoint in each case.

    Where a step fails or is given up, too: the error then says so in a note (see `Keeper`).
    `collate` makes a batch with the key `number` (B,) of samples; `config` is kept in the output folder as config.yaml,
    `clips`, which says what became of each clip, as clips.txt; `inflate.training.record` writes environment.json, with
    the `predicted` peaks of memory by phase beside those measured.
    Every process of a run calls it. Raises ConfigError for a setting out of range, TrainingError for an output that
    cannot be used, processes that do not see each other, drift apart or end, and a value that is not finite,
    CheckpointError for a checkpoint that cannot be resumed, DiskError for a file that cannot be written, Interrupted
    for a second signal.
    """
    check(settings)
    check_players(task.players, settings)
    accelerator = start_accelerator(settings)
    check_shardable(task.players, settings, accelerator.state.sharding)
    check_attention(settings, accelerator.device)
    state, found = claim_output(task, dataset, settings, accelerator, {"config.yaml": config, "clips.txt": clips})
    trainees = [Trainee(player, settings) for player in task.players]
    place(task, trainees, accelerator)
    restore(found, state, settings, trainees, accelerator)
    compilation = Compilation(one.module for one in trainees) if settings.compile else None
    compared = predicted is not None and not settings.compile  # what follows tensors on a CPU cannot be compiled
    gauge = gauge_of(accelerator.device, compared, residents(task, trainees))
    networks = [network for one in trainees for network in (one.module, one.player.network)]
    clock = Clock(accelerator.device, networks, gauge)
    stop = Stop(settings.max_seconds, accelerator.is_main_process)
    report = Report(settings, accelerator, state, clock, task.players)
    keeper = Keeper(settings, accelerator, trainees, report, state, stop, {found} if found else set())
    batches = iter(loader(dataset, settings, accelerator, state.step, collate, stop.over))
    with preferring(settings.attention), stop, keeper, noticing_losses(), report, gauge:
        run = Run(task, settings, accelerator, trainees, report, state, keeper)
        reason, exported = run.to_its_end(batches, stop, compilation)
    if compilation:
        compilation.release()
    for one in trainees:
        one.release(accelerator)
    record.end(settings.output, accelerator, state.step, reason, dict(predicted or {}), gauge.peaks)
    return Result(state.step, reason, state.held_out, exported, gauge.peaks)


@dataclass
class Run:
    """A run under way: its steps, and what happens beside them, looking at the model and saving it.

    Every process calls each method. Steps are of all; beside them the main one does the work, the others wait, and fail
    where it fails.
    """

    task: Task
    settings: Training
    accelerator: Any
    trainees: Sequence[Trainee]
    report: Report
    state: State
    keeper: Keeper

    def to_its_end(
        self, batches: Iterator[Batch | InflateError], stop: Stop, compilation: Compilation | None
    ) -> tuple[str, Path | None]:
        """Look, step until the last step or a reason to stop, look again, save and, but after a signal, export.

        Why it ended, and the exported folder.
        """
        if self.state.step == 0:
            with self.report.paused():
                self.look()
        stop.begin()
        reason = ""
        while self.state.step < self.settings.steps and not (reason := stop.reason(self.accelerator)):
            self.step(batches)
            if compilation:
                compilation.check()
            self.keep_up()
        completes = reason not in SIGNALS
        self.look(evaluate=completes, preview=False)
        self.save()
        return reason or "finished", self.finish() if completes else None

    def step(self, batches: Iterator[Batch | InflateError]) -> None:
        """Make one optimiser step of every player that acts by now, and log it."""
        settings, accelerator, report, state = self.settings, self.accelerator, self.report, self.state
        acting = [one for one in self.trainees if state.step >= one.player.start]
        torch.manual_seed(seed_of(settings.seed, state.step, accelerator.process_index))  # for dropout
        terms: Terms = {}
        numbers: list[int] = []
        with ExitStack() as stack:
            completing = partial(stack.enter_context, self.keeper.completing())
            ready = partial(check_loss, accelerator, state.step, numbers, completing)
            for _ in range(settings.accumulate):
                batch = report.draw(batches)
                numbers += batch["number"].tolist()
                noise = Noise(settings.seed, batch["number"], accelerator.device)
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with accelerator.accumulate(*(one.player.network for one in acting)):
                    for one in acting:
                        with turn(one, self.trainees):
                            loss, logs = learn(one, batch, noise, state.step, accelerator, report.clock, ready)
                        collect(terms, one, loss, logs)
            report.clock.begin("update")
            norms = [one.gradient_norm(accelerator) for one in acting]
            check_step(accelerator, state.step, acting, terms, norms, numbers)
            if not settings.step_in_backward:
                completing()
            for one, norm in zip(acting, norms, strict=True):
                one.update(state.step, norm)
                terms[f"gradient_norm/{one.player.name}"] = [selected(norm)]
            state.step += 1
        report.clock.begin("other")
        report.add(terms)
        report.tick(state.step, {name: rate for one in acting for name, rate in one.rates(state.step - 1).items()})

    def keep_up(self) -> None:
        """Do what is due after a step; what is due at the end is done at the end."""
        step, settings = self.state.step, self.settings
        if step == settings.steps:
            return
        with self.report.paused():
            self.look(due(step, settings.evaluate_every), due(step, settings.preview_every))
            if due(step, settings.checkpoint_every):
                self.save()

    def look(self, evaluate: bool = True, preview: bool = True) -> None:
        """Measure on held-out data and write a preview."""
        if not (evaluate or preview):
            return
        with together(), at_rest(self.trainees):
            if self.accelerator.is_main_process:
                self._look(evaluate, preview)

    def _look(self, evaluate: bool, preview: bool) -> None:
        gauge, stop = self.report.clock.gauge, self.keeper.stop
        if evaluate:
            gauge.begin("evaluate")
            with self.report.doing("measuring held-out clips"), stop.after("this measurement of held-out clips"):
                self.report.held_out(self.state.step, self.task.evaluate())
        left = stop.signal and not self.state.step  # a run that goes on from before its first step looks again
        if preview and not left:
            gauge.begin("preview")
            with self.report.doing("previews"), stop.after("these previews"):
                self._preview(self.settings.output / "samples" / f"step-{self.state.step:06}")
        gauge.begin(None)

    def _preview(self, folder: Path) -> None:
        with writing(folder, self.settings.output), new_folder(folder) as aside:
            self.task.preview(aside)

    def save(self) -> None:
        """Write a checkpoint and the metrics up to it."""
        with together():
            self.keeper.save()

    def finish(self) -> Path:
        """Preview the final model and export it; the exported folder."""
        self.look(evaluate=False)
        folder = self.settings.output / "export"
        with together(), at_rest(self.trainees, exact=True), in_full_precision(self.trainees):
            if self.accelerator.is_main_process:
                with self.report.doing("export"), writing(folder, self.settings.output), new_folder(folder) as aside:
                    self.task.export(aside)
        return folder


def due(step: int, every: int) -> bool:
    """Whether something done every so many steps (0 = never) is due after this one."""
    return every > 0 and step % every == 0


# --- before the first step --------------------------------------------------------------------------------------------


def claim_output(
    task: Task, dataset: Dataset, settings: Training, accelerator: Any, texts: Mapping[str, str]
) -> tuple[State, Path | None]:
    """Make sure that the output is writable and holds no other run; the state to start from and its checkpoint."""
    if not len(dataset):
        raise TrainingError("the dataset has no clip to train on")
    with together():
        if accelerator.is_main_process:
            check_output(settings)
    with together():
        digest = record.digest(dataset)
        fingerprint = fingerprint_of(task, dataset, settings, accelerator, digest)
        now = changes.all_settings(settings, texts["config.yaml"])
        found = find_checkpoint(settings)
        state = checkpoint.read_state(found) if found else State(fingerprint=dict(fingerprint))
        if found:
            checkpoint.check_fingerprint(found, state.fingerprint, fingerprint)
            changes.refuse(found, state.settings, now, state.directory)
    agree(
        {
            **fingerprint, "training.steps": settings.steps, "the checkpoint to go on from": found and found.name,
            "what the launcher asks for": holding(accelerator.state.sharding),
        }
    )  # fmt: skip
    told = [*changes.told(state.settings, now, state.directory, state.step)] if found else []
    if accelerator.is_main_process and settings.warmup >= settings.steps:
        logger.warning(
            "training.warmup=%d, of %d steps in all: the learning rate stays below training.lr; lower it to train",
            settings.warmup,
            settings.steps,
        )
    if found and accelerator.is_main_process:
        logger.info("going on from %s, after step %d", found, state.step)
    if accelerator.is_main_process:
        for change in told:
            logger.warning("%s", change)
    state.settings, state.directory = now, str(Path.cwd())
    record.begin(settings.output, len(dataset), digest, accelerator, state.step, told)
    with together():
        if accelerator.is_main_process:
            for name, text in texts.items():
                if text:
                    with writing(settings.output / name, settings.output):
                        write_text(settings.output / name, text)
    with together():
        check_shared(settings)
    accelerator.init_trackers("inflate")
    return state, found


def fingerprint_of(
    task: Task, dataset: Dataset, settings: Training, accelerator: Any, digest: str | None
) -> dict[str, int | str]:
    """What decides which clips each step sees and what a checkpoint holds; a run that goes on must find it the same."""
    first = step_numbers(dataset, 0, settings.accumulate * accelerator.num_processes, settings.batch)
    return {
        "training.seed": settings.seed, checkpoint.CLIPS_PER_STEP: len(first),
        "clips": len(dataset), "training.optimizer": settings.optimizer,
        "players": ", ".join(player.name for player in task.players),
        "averaged weights": "yes" if settings.ema else "no",
        **({"bfloat16 weights (training.precision=pure_bf16)": "yes"} if settings.precision == "pure_bf16" else {}),
        **({**dataset.fingerprint(), "order of clips": seed_of(*first)} if isinstance(dataset, Stepwise) else {}),
        **({"digest of the clips": digest} if digest else {}),
        **(task.fingerprint() if isinstance(task, Founded) else {}),
    }  # fmt: skip


def check_output(settings: Training) -> None:
    """Create the output folder; raise DiskError if it cannot be written, TrainingError if it holds what is not to be
    gone on with.
    """
    output = settings.output
    if settings.resume not in (None, "latest") and not Path(settings.resume).is_dir():
        remedy = "name a checkpoint-N of a run, or latest"
        raise CheckpointError(f"training.resume={settings.resume}: no such folder; {remedy}")
    with writing(output, output):
        output.mkdir(parents=True, exist_ok=True)
        probe = output / ".probe"
        if any(path != probe and not is_leftover(path) for path in output.iterdir()):
            check_contents(settings)
        probe.touch()
        probe.unlink()


def check_shared(settings: Training) -> None:
    """Raise TrainingError if this process is to write its share of checkpoints, but does not see the run's folder."""
    if settings.sharded_checkpoints and not (settings.output / record.NAME).is_file():
        raise TrainingError(
            f"training.sharded_checkpoints: training.output={settings.output} of process 0 is not the folder of that "
            f"name on {socket.gethostname()}: name one that all machines share, or set it to false"
        )


def check_contents(settings: Training) -> None:
    """Raise TrainingError unless `resume` says to go on with the run in the output folder, and it holds one."""
    output, resume = settings.output, settings.resume
    checkpoints = checkpoint.numbered(output)
    if resume is None:
        holds_run = checkpoints or (output / record.NAME).is_file()
        remedy = "set training.resume=latest to go on with its run, or name" if holds_run else "name"
        raise TrainingError(f"training.output={output} is not empty; {remedy} another folder")
    if not checkpoints and not (output / record.NAME).is_file():
        raise TrainingError(f"training.output={output} holds other files and no run to go on with; name another folder")
    if checkpoints and resume != "latest" and Path(resume).resolve().parent != output.resolve():
        remedy = "set training.resume=latest to go on with that one, or name another folder"
        raise TrainingError(f"training.output={output} holds a run with checkpoints of its own; {remedy}")


def find_checkpoint(settings: Training) -> Path | None:
    """The whole checkpoint that `resume` means, or None to start afresh."""
    if settings.resume is None:
        return None
    if settings.resume == "latest":
        found = checkpoint.latest(settings.output)
        if not found:
            check_beginning(settings.output)
        return found
    folder = Path(settings.resume)
    checkpoint.verify(folder)
    existing = checkpoint.numbered(settings.output)
    names = [path.resolve() for path in existing]
    if folder.resolve() in names and folder.resolve() != names[-1]:
        raise TrainingError(
            f"{existing[-1]} is later than training.resume={folder}; move it away or name another output"
        )
    return folder


def check_beginning(output: Path) -> None:
    """Say that a run without a checkpoint starts afresh; CheckpointError if it had begun from one elsewhere."""
    starts = record.starts(output / record.NAME)
    if starts and starts[-1]["step"]:
        raise CheckpointError(
            f"{output} holds no checkpoint, but its run had begun from one of step {starts[-1]['step']}; "
            "name that one in training.resume"
        )
    if starts:
        logger.warning("%s holds a run that was cut off before its first checkpoint: it starts afresh", output)


def place(task: Task, trainees: Sequence[Trainee], accelerator: Any) -> None:
    """Move everything to the device; choose kernels and the order of memory; wrap what is trained."""
    settings, trained = trainees[0].settings, [one.module for one in trainees]
    choose_attention(trained, settings, accelerator.device)
    for network in [*task.frozen, *trained] if settings.channels_last else ():
        put_channels_last(network)
    for module in task.frozen:
        module.to(accelerator.device).eval()
    for one in trainees:
        one.prepare(accelerator)


def residents(task: Task, trainees: Sequence[Trainee]) -> Iterator[Tensor]:
    """What lies on the device between steps, as far as it is there already."""
    for network in (*task.frozen, *(one.module for one in trainees)):
        yield from (*network.parameters(), *network.buffers())
    for one in trainees:
        yield from one.average.values()
        yield from (
            value for state in one.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        )


def restore(
    found: Path | None, state: State, settings: Training, trainees: Sequence[Trainee], accelerator: Any
) -> None:
    """Load the checkpoint that was found, if any; make sure that there is room for the next ones."""
    with together():
        if found:
            checkpoint.load(found, trainees)
        if accelerator.is_main_process:
            check_room(settings, state, trainees)
    if found and accelerator.scaler is not None and state.scaler:
        accelerator.scaler.load_state_dict(state.scaler)


class Numbers:
    """Sample numbers of one process, batch by batch from a step on; a pure function of the step, for exact resume.

    The numbers of a step fall to its forward passes in turn, and within each to the processes in turn.
    """

    def __init__(self, dataset: Dataset, settings: Training, processes: int, process: int, step: int) -> None:
        self.dataset, self.settings = dataset, settings
        self.processes, self.process, self.step = processes, process, step

    def __len__(self) -> int:
        return (self.settings.steps - self.step) * self.settings.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        lanes = self.processes * self.settings.accumulate
        for step in range(self.step, self.settings.steps):
            numbers = step_numbers(self.dataset, step, lanes, self.settings.batch)
            size = len(numbers) // lanes
            for lane in range(self.process, lanes, self.processes):
                yield list(numbers[lane * size : (lane + 1) * size])


def step_numbers(dataset: Dataset, step: int, lanes: int, batch: int) -> Sequence[int]:
    """The sample numbers of an optimiser step: as the dataset says, or the next ones."""
    if isinstance(dataset, Stepwise):
        return dataset.numbers(step, lanes, batch)
    return range(step * lanes * batch, (step + 1) * lanes * batch)


def loader(
    dataset: Dataset, settings: Training, accelerator: Any, step: int, collate: Callable[[list[Any]], Any], over: Any
) -> DataLoader[Batch | InflateError]:
    """Batches of this process from a step on, the same for any number of workers; a user error comes in its place.

    `over` is the event of the run's end.
    """
    return DataLoader(
        Readable(dataset),  # type: ignore[arg-type]  # torch asks for its own base class, and uses only these two methods
        batch_sampler=Numbers(dataset, settings, accelerator.num_processes, accelerator.process_index, step),
        collate_fn=partial(collate_or_error, collate),
        num_workers=settings.workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=partial(leave_signals, over),
        generator=torch.Generator().manual_seed(settings.seed),  # or it would draw from the global one
    )


@dataclass(frozen=True)
class Readable:
    """A dataset that returns a user error as a value: torch would put a reader process's traceback into its text."""

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except InflateError as error:
            return error


def collate_or_error(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """A batch of samples, or the first user error among them or of `collate` itself."""
    try:
        return next((item for item in items if isinstance(item, InflateError)), None) or collate(items)
    except InflateError as error:
        return error


def leave_signals(over: Any, _: int) -> None:
    """Let a reader process leave Ctrl-C and SIGTERM to the training process, which still saves, until that is `over`.

    Terminals, torchrun and cluster schedulers send them to the whole process group; a reader that ended would be an
    error in the training process.
    """

    def end(*_: object) -> None:
        if over.is_set():
            os._exit(128 + signal.SIGTERM)

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, error, trace)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    sys.excepthook = tell  # the thread that hands batches over would tell of a training process that lets go of one


# --- within a step ----------------------------------------------------------------------------------------------------


def learn(
    one: Trainee,
    batch: Batch,
    noise: Noise,
    step: int,
    accelerator: Any,
    clock: Phases,
    ready: Callable[[Trainee, Tensor], None] | None = None,
) -> tuple[Tensor, Mapping[str, Tensor | Selected]]:
    """Add the gradients of a player's loss on a batch to its own; the loss (B,) and what is logged of it.

    Where the backward pass updates the weights, `ready` is called with player and loss before it.
    """
    one.begin(step)
    clock.begin("encode")
    loss, logs = one.player.loss(batch, noise, step)  # (B,)
    clock.begin("backward")
    if one.in_backward is not None and ready is not None:
        ready(one, loss)
    accelerator.backward(loss.mean())
    clock.begin("other")
    return loss, logs


def collect(terms: Terms, one: Trainee, loss: Tensor, logs: Mapping[str, Tensor | Selected]) -> None:
    """Keep a micro-step's loss and logged tensors, without their graphs, under `name/player`."""
    for name, logged in {"loss": loss, **logs}.items():
        terms.setdefault(f"{name}/{one.player.name}", []).append(selected(logged))


def check_loss(
    accelerator: Any, step: int, numbers: Sequence[int], completing: Callable[[], object], one: Trainee, loss: Tensor
) -> None:
    """Before a backward pass that updates the weights: `check_step` of its loss, then begin `completing`."""
    check_step(accelerator, step, [], {f"loss/{one.player.name}": [selected(loss)]}, [], numbers)
    completing()


def check_step(
    accelerator: Any,
    step: int,
    acting: Sequence[Trainee],
    terms: Terms,
    norms: Sequence[Tensor],
    numbers: Sequence[int],
) -> None:
    """Raise NotFiniteError, before the optimisers touch the weights, for a value that is not finite, naming the first
    such tensor, and TrainingError for gradients that differ between the processes.

    Reading one row per optimiser step is a device sync; it keeps the weights of a failed run usable. fp16 gradients
    may overflow: the scaler then skips the step, so only the losses count. Where the backward pass has updated the
    weights already, it is too late for them.
    """
    watched = [losses for name, losses in terms.items() if name.startswith("loss/")]
    flags = [loss.values.isfinite().all() for losses in watched for loss in losses]
    flags += [norm.isfinite() for norm in norms] if accelerator.scaler is None else []
    own = torch.stack([(~torch.stack(flags)).sum().float(), *(norm.float() for norm in norms)])  # (1 + players,)
    rows = accelerator.gather(own.unsqueeze(0)).tolist()  # (processes, 1 + players): all processes stop together
    if any(failed for failed, *_ in rows):
        remedy = (
            "resume from the last checkpoint with a lower training.lr or another precision, or leave these clips out"
        )
        late = any(one.in_backward for one in acting)
        told = "the weights in memory are spoilt (training.step_in_backward)" if late else "nothing was updated"
        raise NotFiniteError(f"step {step}: {name_not_finite(acting, terms, numbers)}; {told}; {remedy}")
    check_same_norms([one.player.name for one in acting], [found for _, *found in rows])


def name_not_finite(acting: Sequence[Trainee], terms: Terms, numbers: Sequence[int]) -> str:
    """Which tensor is not finite, the earliest in the computation first: weights, logged terms, losses, gradients."""
    for one in acting:
        for name, parameter in one.parameters.items():
            if not parameter.isfinite().all():
                return f"parameter {one.player.name}.{name} is not finite"
    for name in sorted(terms, key=lambda name: name.startswith("loss/")):
        finite = torch.cat([(values.isfinite() | ~chosen).reshape(-1) for values, chosen in terms[name]])
        if not finite.all():
            samples = [n for n, good in zip(numbers, finite.tolist(), strict=False) if not good]
            where = f" for sample numbers {samples}" if len(finite) == len(numbers) else ""
            return f"{name} is not finite{where}"
    for one in acting:
        for name, parameter in one.parameters.items():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {one.player.name}.{name} is not finite"
    return "a gradient norm overflowed, or another process met a value that is not finite"
