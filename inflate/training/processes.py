"""The processes of a run: that all that were started see each other, know the same, and stay in step.

Several ways of starting a run give one process instead of many, or many that each believe to be alone and write over
each other. What launchers leave in the environment tells: see `check_launch`.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, parse_flag_from_env
from torch.distributed import DistError

from inflate.errors import InflateError, TrainingError
from inflate.training.settings import Training
from inflate.training.sharding import asked, keep_from_accelerate

logger = logging.getLogger(__name__)

PATIENCE = timedelta(hours=6)
"""How long processes wait for one that evaluates, previews or exports. One that is gone is noticed at once by gloo, and
by the launcher, which then ends the others."""

MPI_COUNTS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
COUNTS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", *MPI_COUNTS, "SLURM_STEP_NUM_TASKS")
"""Where torchrun and accelerate, three kinds of MPI and srun write how many processes they started."""

SAME_NORM = 1e-3
"""Largest relative difference of one gradient's norm between processes: GPUs of different makes round differently."""


# --- starting ---------------------------------------------------------------------------------------------------------


def let_one_tell() -> None:
    """Join the processes of this run, of which the main one tells what all find; of the others warnings are shown."""
    if not join_processes().is_main_process:
        logging.getLogger().setLevel(logging.WARNING)


def join_processes() -> Any:
    """Join the processes of this run; accelerate's state of them, the same at each call.

    A script that uses accelerate before the training loop calls this first. Raises TrainingError where the launcher
    asked for what this process does not see, or for another way of sharding weights than `inflate.training.sharding`.
    """
    environment = dict(os.environ)  # accelerate writes its own counts into it
    sharding = asked(environment)
    keep_from_accelerate(os.environ)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)
    check_launch(environment, state.num_processes)
    if sharding and state.num_processes == 1:
        logger.warning("one process: there is nobody to spread the weights over, they stay whole")
        sharding = None
    state.sharding = sharding or getattr(state, "sharding", None)  # the first call took it out of the environment
    return state


def check_launch(environment: Mapping[str, str], seen: int) -> None:
    """Raise TrainingError if the environment tells of more processes than the `seen` ones, which would train apart."""
    command = "accelerate launch --multi_gpu --num_processes N"
    remedy = f"on GPUs start them by `{command}`, on a CPU by `ACCELERATE_USE_CPU=true {command}`"
    for variable in COUNTS:
        count = environment.get(variable, "")
        if count.isdecimal() and int(count) > seen:
            raise TrainingError(
                f"{variable}={count} processes were started, but each sees only {seen}: the processes do not see each "
                f"other and would all write to the same output; {remedy}"
            )
    if asked_in_vain(environment) and seen == 1:
        raise TrainingError(
            f"accelerate launch was asked for several processes, but started one: {remedy}; "
            "for one process, give --num_processes 1 and set neither MASTER_ADDR nor MASTER_PORT"
        )


def asked_in_vain(environment: Mapping[str, str]) -> bool:
    """Whether accelerate's launcher was asked for several processes and started only this one.

    Its launcher of a single process sets MASTER_PORT only if several were asked for (--cpu, no GPU, a config file
    without MULTI_GPU); its launchers of several also number them by LOCAL_RANK.
    """
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    return by_accelerate and "MASTER_PORT" in environment and not {"LOCAL_RANK", "WORLD_SIZE"} & environment.keys()


def start_accelerator(settings: Training) -> Any:
    """An Accelerator with this run's precision, accumulation and tracker; TrainingError if it cannot be had here."""
    state = join_processes()
    AcceleratorState._reset_state()  # it is global, and refuses a second run of another precision in the same process
    try:
        accelerator = Accelerator(
            mixed_precision="no" if settings.precision == "pure_bf16" else settings.precision,
            gradient_accumulation_steps=settings.accumulate,
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=settings.output / "logs",
        )
    except ValueError as error:
        asked = f"training.precision={settings.precision}, training.tracker={settings.tracker}"
        raise TrainingError(f"{asked}: {error}") from error
    if settings.tracker != "none" and not accelerator.log_with:
        raise TrainingError(f"training.tracker={settings.tracker} is not installed; install it, or set it to none")
    if settings.step_in_backward and accelerator.num_processes > 1:
        raise TrainingError(
            "training.step_in_backward=true: processes exchange gradients after the backward pass; set it to false, or "
            "start one process"
        )
    if accelerator.gradient_accumulation_steps != settings.accumulate:
        launcher = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accelerator.gradient_accumulation_steps}"
        raise TrainingError(f"{launcher} contradicts training.accumulate={settings.accumulate}; unset it")
    if state.is_main_process:
        announce(accelerator, settings)
    return accelerator


def announce(accelerator: Any, settings: Training) -> None:
    """Log how many processes train, on what, and what makes an optimiser step; and what of the launcher's is unused."""
    count = accelerator.num_processes
    how = f"{accelerator.device.type}, {accelerator.state.backend or 'alone'}"
    passes = f"{settings.accumulate * count} = training.accumulate {settings.accumulate} x {count}"
    logger.info("processes: %d (%s); forward passes per optimiser step: %s", count, how, passes)
    if accelerator.state.sharding:
        logger.info("weights: sharded over %d processes, %s", count, accelerator.state.sharding)
    here, used = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cuda" and here > used:
        logger.warning("%d of the %d visible GPUs are used; --multi_gpu --num_processes %d uses all", used, here, here)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", settings.precision):
        logger.warning("the launcher's mixed_precision=%s is not used: training.precision decides", launched)


# --- in step ----------------------------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Let all processes leave the block, or none: an InflateError of one is raised by all. Every process enters it."""
    own: InflateError | None = None
    try:
        yield
    except InflateError as error:
        own = error
    texts = gather_object([None if own is None else str(own)])
    if own is not None:
        raise own
    for process, text in enumerate(texts):
        if text is not None:
            raise TrainingError(f"process {process}: {text}")


def agree(facts: Mapping[str, object]) -> None:
    """Raise TrainingError, in every process, naming the first fact that they do not share. Every process calls it."""
    for process, other in enumerate(gather_object([dict(facts)])):
        for name, value in facts.items():
            if other[name] != value:
                own = PartialState().process_index
                raise TrainingError(
                    f"{name} is {value} for process {own}, but {other[name]} for process {process}: "
                    "all need the same versions, settings, clips and output folder, on every machine"
                )


def check_same_norms(names: Sequence[str], rows: Sequence[Sequence[float]]) -> None:
    """Raise TrainingError if the gradient norms of a player, (processes, players), differ between the processes."""
    for name, norms in zip(names, zip(*rows, strict=True), strict=True):
        if all(map(math.isfinite, norms)) and not math.isclose(min(norms), max(norms), rel_tol=SAME_NORM):
            shown = ", ".join(f"{norm:.6g}" for norm in norms)
            raise TrainingError(
                f"the gradients of player '{name}' differ between the processes (norms {shown}), which would each "
                "train a model of their own: its loss must call player.network(...), not the module inside it"
            )


@contextmanager
def noticing_losses() -> Iterator[None]:
    """Turn the failure of a collective, which is another process's end, into a TrainingError."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error)):  # gloo raises plain ones, with its source's name
            raise
        raise TrainingError(
            "another process has ended or cannot be reached; its own message, if it had time for one, stands above or "
            f"below ({error})"
        ) from error
