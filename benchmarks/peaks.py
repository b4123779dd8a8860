"""What a command of inflate that draws clips holds at most on a GPU, part by part, and how long each part takes.

    python benchmarks/peaks.py OUT.json refine video.mp4 --model REFINER --height 720 --width 1280 -o larger.mp4
    python benchmarks/peaks.py OUT.json sample BASE photo.png --prompt "a boat leaves" --refine REFINER -o out.mp4

The command runs as ever. Of animating, encoding, refining and decoding, and of what comes before each, the peak of
PyTorch's allocator in GB and the seconds are printed and written to OUT.json; on a CPU there are seconds alone. What is
done with frames between their decoding, such as writing the video, counts as decoding.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from inflate import refining, shooting
from inflate.cli import main
from record import command, record, write


class Watch:
    """Peaks and times of the parts of a command."""

    def __init__(self) -> None:
        self.parts: list[dict[str, Any]] = []
        self.last = time.monotonic()

    def note(self, name: str) -> None:
        """A part that ends now and began where the last one ended."""
        peak = 0
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        now = time.monotonic()
        self.parts.append({"part": name, "seconds": now - self.last, "peak GB": peak / 1e9})
        self.last = now
        print(f"{name}: {self.parts[-1]['seconds']:.2f} s, {peak / 1e9:.3f} GB", file=sys.stderr)

    def called(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose calls are noted."""

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            self.note(f"before {name}")
            result = function(*arguments, **named)
            self.note(name)
            return result

        return call

    def walked(self, name: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator, noted when it ends."""

        @functools.wraps(function)
        def walk(*arguments: Any, **named: Any) -> Iterator[Any]:
            self.note(f"before {name}")
            yield from function(*arguments, **named)
            self.note(name)

        return walk


CALLED = (
    ("animating", shooting.Shooting, "together"),
    ("encoding", refining, "encoded"),
    ("refining", refining, "refine_latents"),
)
WALKED = (("decoding", refining, "decoded"),)
"""Parts of commands, and where what they call is found: functions and generators."""


def watch() -> Watch:
    """Watch what commands call to animate, encode, refine and decode."""
    watching = Watch()
    for part, place, name in CALLED:
        setattr(place, name, watching.called(part, getattr(place, name)))
    for part, place, name in WALKED:
        setattr(place, name, watching.walked(part, getattr(place, name)))
    return watching


if __name__ == "__main__":
    target, told, watching = Path(sys.argv[1]), command("OUT.json"), watch()
    sys.argv = ["inflate", *sys.argv[2:]]
    try:
        main()
    finally:
        watching.note("the end")
        write(target, record(told, {"parts": watching.parts}))
