"""Graphics cards: their memory, and about how fast they are."""

from __future__ import annotations

import re
from dataclasses import dataclass

from inflate.errors import ConfigError

USABLE = 0.9
"""Share of a card's memory that a plan may fill: workspaces of kernels, rounding and CUDA itself take the rest."""
SHARE_OF_PEAK = 0.25
"""Of the makers' figures, what a training step is taken to reach; runs of this kind lie between 0.15 and 0.4."""


@dataclass(frozen=True)
class Card:
    """A card: memory in bytes, and its maker's TFLOP/s in half (dense) and in full precision."""

    name: str
    memory: int
    half: float = 4.0
    full: float = 1.0
    timed: bool = True
    """whether the speeds are a card's own; else only their ratio counts"""

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * USABLE)

    def seconds(self, half_flops: int, full_flops: int) -> float:
        """About how long so many FLOPs take; without a card's own speeds, in no unit."""
        return (half_flops / self.half + full_flops / self.full) / (1e12 * SHARE_OF_PEAK)

    @classmethod
    def parse(cls, text: str, option: str = "--gpu ") -> Card:
        """A card by its name, or by its memory alone (16GB); ConfigError, naming the option, for another text."""
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*GB?", text.strip(), re.IGNORECASE)
        if size and float(size[1]) > 0:
            return cls(text, int(float(size[1]) * 1e9), timed=False)
        found = CARDS.get(_plain(text))
        if found is None:
            raise ConfigError(
                f"{option}{text}: write its memory, as 16GB, or one of {', '.join(map(str, CARDS.values()))}"
            )
        return found

    def __str__(self) -> str:
        return self.name


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]|nvidia|geforce", "", name.lower())


CARDS = {
    _plain(name): Card(name, int(memory * 1e9), half, full)
    for name, memory, half, full in (
        ("H200", 141, 989.0, 67.0), ("H100", 80, 989.0, 67.0), ("A100 80GB", 80, 312.0, 19.5),
        ("A100 40GB", 40, 312.0, 19.5), ("L40S", 48, 362.0, 91.6), ("RTX A6000", 48, 155.0, 38.7),
        ("RTX 4090", 24, 165.0, 82.6), ("RTX 3090", 24, 71.0, 35.6), ("A10G", 24, 70.0, 31.5),
        ("RTX 4080", 16, 97.5, 48.7), ("T4", 16, 65.0, 8.1), ("RTX 3060", 12, 51.0, 12.7),
    )
}  # fmt: skip
"""Memory in GB, and TFLOP/s as their makers state them."""
