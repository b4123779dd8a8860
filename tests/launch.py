"""Real processes over gloo, forked from the test: nothing is imported anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState


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
