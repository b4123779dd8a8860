"""Real processes over gloo, forked from the test: nothing is imported anew."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
"""What accelerate's launcher sets for recipes/accelerate/fsdp2.yaml."""


def launch(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """What `function(*arguments)` returns in each of the processes: tensors, numbers, words, lists and dictionaries."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        debug_launcher(_run, (folder, function, arguments), processes)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # the test may have run alone before
    result = function(*arguments)
    torch.save(result, folder / f"{torch.distributed.get_rank()}.pt")


ROOT = Path(__file__).parents[1]
OF_LAUNCHERS = re.compile(r"ACCELERATE_|FSDP_|PARALLELISM_|MASTER_|(LOCAL_)?(RANK|WORLD_SIZE)")


def start(words: list[str], log: Path, **environment: str) -> BaseProcess:
    """accelerate's own launcher, at work in the root folder; what is said goes to `log`."""
    process = multiprocessing.get_context("fork").Process(target=_start, args=(words, log, environment))
    process.start()
    return process


def _start(words: list[str], log: Path, environment: dict[str, str]) -> None:
    for name in filter(OF_LAUNCHERS.match, [*os.environ]):
        del os.environ[name]
    os.environ.update(environment, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    os.chdir(ROOT)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    launch_command(launch_command_parser().parse_args(["--quiet", *words]))


def free_port() -> str:
    """Of this machine."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


class Collectives(TorchDispatchMode):
    """Counts, by name, what processes exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, name = function.name().split("::")
        if space == "c10d":
            self.counts[name.strip("_")] = self.counts.get(name.strip("_"), 0) + 1
        return function(*args, **(kwargs or {}))
