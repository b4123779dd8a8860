"""What a recipe tells at its end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from inflate.adapters.file import NAME as ADAPTER
from inflate.measures import remark
from inflate.tables import aligned
from inflate.training.log import found_overfitting
from inflate.training.loop import Result
from inflate.training.processes import join_processes

WRONG = 0.1
"""A difference between predicted and measured memory that is worth a word."""


def say(result: Result, stage: str, output: Path, predicted: Mapping[str, int] | None = None) -> None:
    """Name the results on standard output, memory beside its prediction; end every process after a signal."""
    tells = join_processes().is_main_process
    if result.export is None:
        if tells:
            saved = output / f"checkpoint-{result.step}"
            print(
                f"stopped by {result.stopped} at step {result.step}; {saved} is whole: training.resume=latest goes on"
            )
        sys.exit(130 if result.stopped == "SIGINT" else 143)
    if not tells:
        return
    first, last = result.held_out[0], result.held_out[-1]
    print(f"\n{stage}: {result.step} steps; measured, before -> after:")
    for name in last:
        if name in first and name != "step" and not name.startswith("parent/"):
            print(f"  {name}: {first[name]:.4g} -> {last[name]:.4g} {remark(name)}".rstrip())
    for one in found_overfitting(output, result.held_out):
        print(f"  {one}")
    for line in compared(predicted or {}, result.peaks):
        print(f"  {line}")
    adapter = result.export / ADAPTER
    for name, path in (
        ("before/after video", output / "before_after.mp4"), ("as a picture", output / "before_after.png"),
        ("plot", output / "metrics.png"), ("numbers", output / "metrics.json"), ("card", output / "README.md"),
        ("adapter", adapter) if adapter.is_file() else ("model", result.export),
    ):  # fmt: skip
        if path.exists():
            print(f"  {name}: {path}")


def compared(predicted: Mapping[str, int], measured: Mapping[str, int]) -> list[str]:
    """A table of the peaks of memory by phase, predicted beside measured, GB; and where the prediction was wrong."""
    both = [phase for phase in predicted if phase in measured]
    if not both:
        return []
    off = {phase: predicted[phase] / measured[phase] - 1 for phase in both}
    sizes = {phase: [f"{peaks[phase] / 1e9:.3f}" for peaks in (predicted, measured)] for phase in both}
    rows = [(phase, *sizes[phase], f"{off[phase]:+.1%}") for phase in both]
    highest = max(predicted[phase] for phase in both) / max(measured[phase] for phase in both) - 1
    told = [f"the prediction of the highest was wrong by {highest:+.0%}"] if abs(highest) > WRONG else []
    return [*aligned([("memory at most, GB", "predicted", "measured", "difference"), *rows]), *told]
