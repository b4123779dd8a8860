"""The settings of a training run; importable without torch, so that the command line checks them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inflate.errors import ConfigError


@dataclass
class Training:
    """How a run trains. `step` always means one optimiser step."""

    output: Path = Path("output")
    """Folder of the run, with all that it writes; new or empty, unless a run is resumed."""
    seed: int = 0
    """Decides the order of clips, the noise and the dropout."""
    steps: int = 1000
    """Optimiser steps in all, counted from the first start of the run."""
    batch: int = 1
    """Clips per process and forward pass."""
    accumulate: int = 1
    """Forward passes per optimiser step."""
    precision: Literal["no", "bf16", "fp16", "pure_bf16"] = "no"
    """Autocast of the trained networks, whose weights stay as loaded (fp16 needs a GPU and a single player); or
    pure_bf16: weights, activations and gradients in bfloat16, updates rounded at random, which costs precision."""
    fit: str | None = None
    """A card, by its memory (16GB) or its name: the fastest measures that make the run fit are chosen before it, as
    `inflate plan` shows them, and what they need is compared with their prediction; null = all as set."""
    compile: bool = False
    """Compile the inflated blocks of the trained networks (torch.compile), equal to rounding: minutes before the first
    step. Whether the steps are then faster, only a trial on the card tells."""
    attention: Literal["sdpa", "flash", "efficient", "cudnn", "xformers", "triton"] = "sdpa"
    """What computes attention, equal but for rounding: sdpa, a kernel that PyTorch chooses; flash, efficient or cudnn,
    that one of PyTorch's where it can be used and another elsewhere; xformers, in the trained networks; triton, our own
    over frames, and sdpa elsewhere. All but sdpa need a GPU."""
    channels_last: bool = False
    """Let the weights of 2D convolutions lie channels last in memory, as a GPU's tensor cores take them; equal but for
    rounding. On a CPU slower and larger, see benchmarks/README.md; on a GPU not measured."""
    lr: float = 1e-4
    """Learning rate, for every player that names none of its own."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up; cosine and linear end at 0."""
    warmup: int = 0
    """Steps over which the learning rate grows from 0."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """The optimiser of every player; adamw8bit keeps its two moments in 8 bits each, rounded, which takes 2 bytes per
    weight in place of 8."""
    step_in_backward: bool = False
    """Update each weight as soon as its gradient is there, which then goes: the same steps in less memory. It rules out
    clipping, accumulation and several processes, and a gradient that is not finite is told only once it did harm."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's running averages."""
    weight_decay: float = 0.01
    """AdamW's decay, of matrices and convolutions only."""
    gradient_clip: float = 1.0
    """Largest gradient norm of a player; 0 = never clip."""
    ema: float = 0.0
    """Decay of the averaged weights that are evaluated, previewed and exported; 0 = no average."""
    workers: int = 2
    """Processes per GPU that read clips; they do not change the data. 0 = read in the training process."""
    log_every: int = 10
    """Steps between log entries."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 = only at the end."""
    preview_every: int = 500
    """Steps between previews; 0 = only at the start and the end."""
    evaluate_every: int = 500
    """Steps between held-out measurements; 0 = only at the start and the end."""
    keep: int = 2
    """Newest checkpoints to keep; 0 = all."""
    sharded_checkpoints: bool = False
    """Where weights are sharded, every process writes its own share, and the main one gathers nothing, which else takes
    12 bytes per trained weight of its memory; all machines must see `output`. What is saved is the same to the bit."""
    resume: str | None = None
    """A checkpoint folder, or `latest`: the newest whole checkpoint of the output folder, if there is one."""
    tracker: str = "tensorboard"
    """An experiment tracker known to accelerate (tensorboard, wandb, trackio, ...), or `none`."""
    max_seconds: float | None = None
    """Stop training after this time; the final checkpoint, evaluation, preview and export follow it."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check(self)


AT_LEAST = {
    "steps": 1, "batch": 1, "accumulate": 1, "log_every": 1, "warmup": 0, "workers": 0, "checkpoint_every": 0,
    "preview_every": 0, "evaluate_every": 0, "keep": 0, "lr": 0.0, "weight_decay": 0.0, "gradient_clip": 0.0,
    "ema": 0.0,
}  # fmt: skip


def check(settings: Training) -> None:
    """Raise ConfigError naming the first setting that is out of range."""
    for name, least in AT_LEAST.items():
        value = getattr(settings, name)
        if not math.isfinite(value) or value < least:
            raise ConfigError(f"training.{name}={value}: must be a number of at least {least}")
    if settings.ema >= 1:
        raise ConfigError(f"training.ema={settings.ema}: a decay is below 1, such as 0.999; 0 turns the average off")
    if any(not 0 <= beta < 1 for beta in settings.betas):
        raise ConfigError(f"training.betas={settings.betas}: each must lie in [0, 1)")
    if settings.step_in_backward:
        check_step_in_backward(settings)
    if settings.max_seconds is not None and not settings.max_seconds > 0:
        raise ConfigError(f"training.max_seconds={settings.max_seconds}: must be positive, or null for no limit")


def check_step_in_backward(settings: Training) -> None:
    """Raise ConfigError for a setting that needs all gradients at once."""
    needed = {
        "accumulate": (settings.accumulate == 1, 1, "gradients of several passes are added up before a step"),
        "gradient_clip": (settings.gradient_clip == 0, 0, "the norm of all gradients is known after the steps"),
        "precision": (settings.precision != "fp16", "bf16", "gradients that overflow are looked for before a step"),
    }
    for name, (fits, remedy, reason) in needed.items():
        if not fits:
            raise ConfigError(
                f"training.{name}={getattr(settings, name)} beside training.step_in_backward=true: {reason}; set "
                f"training.{name}={remedy}, or step_in_backward=false"
            )


def rate(settings: Training, step: int, start: int = 0) -> float:
    """Share of the learning rate at a step, for a player that starts at `start`; a pure function, for exact resume."""
    since, total = step - start, max(settings.steps - start, 1)
    warm = min(1.0, (since + 1) / settings.warmup) if settings.warmup else 1.0
    course = {"constant": 1.0, "cosine": 0.5 + 0.5 * math.cos(math.pi * since / total), "linear": 1 - since / total}
    return warm * course[settings.schedule]
