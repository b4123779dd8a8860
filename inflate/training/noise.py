"""Random numbers that depend on the seed and the sample number only, never on how samples fall into batches."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seed_of(*parts: object) -> int:
    """A 63-bit seed from integers and words, the same in every process and on every machine."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class Noise:
    """The draws of one batch: each sample has its own CPU generator, keyed by (seed, sample number, purpose).

    Accumulating 2 batches of 1, 1 batch of 2, or 2 processes of 1 therefore draw the same, and a purpose added later
    changes no other draw. The same purpose asked twice gives the same numbers: name each use.
    """

    def __init__(self, seed: int, numbers: Tensor, device: torch.device | str = "cpu") -> None:
        self.seed, self.numbers, self.device = seed, [int(number) for number in numbers], torch.device(device)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal draws (B, *shape), float32, on the device."""
        draws = [torch.randn(shape, generator=generator) for generator in self._generators(purpose)]
        return torch.stack(draws).to(self.device)  # (B, *shape)

    def offset(self, purpose: str, strength: float, *shape: int) -> Tensor:
        """Normal draws (B, *shape) of clips (F, C, h, w), and in each frame and channel one more, `strength` times.

        That moves whole frames' colours (I2VGen-XL: 0.1), which noise without it leaves to be guessed. The draws are
        `normal`'s of that purpose; the shared ones have a purpose of their own.
        """
        draws = self.normal(purpose, *shape)
        if not strength:
            return draws
        return draws + strength * self.normal(f"{purpose} offset", *shape[:-2], 1, 1)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Draws from [0, 1), (B, *shape), float32, on the device."""
        draws = [torch.rand(shape, generator=generator) for generator in self._generators(purpose)]
        return torch.stack(draws).to(self.device)  # (B, *shape)

    def _generators(self, purpose: str) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed_of(self.seed, number, purpose)) for number in self.numbers]
