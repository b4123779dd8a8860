"""The remedy for conditional image leakage in training (Zhao et al., 2406.15735): noise on the conditioning latent.

Where a clip is almost all noise, its condition is nearly the answer: a model learns to repeat it there, and what it
draws hardly moves. Noise that is heavier just there takes the shortcut away. In sampling there is none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from inflate.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from inflate.training.noise import Noise


@dataclass(frozen=True)
class ConditionNoise:
    """Noise on each training clip's conditioning latent, whose level the model is not told.

    The level is `maximum` times a logit-normal number of standard deviation 1, the centre of whose logit rises with the
    clip's diffusion time t from -1 to 1, as 2 t^exponent - 1.
    """

    maximum: float = 0.0
    """bound of the level, in standard deviations of latents; 0: no such noise. More of it: more motion, less likeness
    to the image"""
    exponent: float = 5.0
    """how late in diffusion time the level rises; a smaller one: more motion, less likeness to the image"""

    def __post_init__(self) -> None:
        if self.maximum < 0 or self.exponent <= 0:
            raise ConfigError(
                f"condition_noise: maximum ({self.maximum:g}) must be at least 0, exponent ({self.exponent:g}) above 0"
            )

    def level(self, time: Tensor, normal: Tensor) -> Tensor:
        """Levels (B,) at diffusion times (B,), from 0 (clean) to 1 (noise), by standard normal draws (B,)."""
        return self.maximum * (2.0 * time**self.exponent - 1.0 + normal).sigmoid()

    def add(self, latent: Tensor, time: Tensor, noise: Noise, deviation: float = 1.0) -> Tensor:
        """Conditioning latents (B, ...) under the noise that is drawn for clips at diffusion times (B,).

        `deviation` is that of the latents: 1 of scaled ones. Without such noise they are as given, to the bit.
        """
        if not self.maximum:
            return latent
        level = deviation * self.level(time, noise.normal("condition level"))  # (B,)
        drawn = noise.normal("condition noise", *latent.shape[1:])  # (B, ...)
        return latent + (level.reshape(-1, *(1,) * (latent.ndim - 1)) * drawn).to(latent)
