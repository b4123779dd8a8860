"""Real processes over gloo, forked from the test: nothing is imported anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import debug_launcher
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
