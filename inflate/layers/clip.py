"""What every temporal layer must know about the folded batch: how many frames a clip has, and which are images.

The 2D layers see `(batch * frames, channels, height, width)`. One `Clip` per model carries the missing knowledge for
the duration of a forward pass; it is a plain attribute, not a module, and is copied with the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from inflate.errors import InflateError


@dataclass(frozen=True)
class ClipState:
    """The clips of one forward pass; `bypass` leaves every temporal layer out, as for separate images."""

    frames: int
    """Frames per clip."""
    image_only: Tensor | None = None
    """Bool (batch, frames): True frames take the spatial path in every mix; None = all are video."""
    bypass: bool = False
    """Skip the temporal layers altogether."""
    image_tokens: int = 0
    """How many tokens of every frame's context, the last ones, are of an image."""
    image_bias: Tensor | None = None
    """Logarithm () of what each of those weighs in attention to text and image together; None = as much as a token of
    the text. A tensor, because blocks would be compiled anew for every value of a number."""


class Clip:
    """The holder that all temporal layers of one model share."""

    def __init__(self) -> None:
        self._state: ClipState | None = None

    @property
    def state(self) -> ClipState:
        """The clips of the forward pass under way; raises `InflateError` outside one."""
        if self._state is None:
            raise InflateError(
                "a temporal layer was called on its own and cannot know the number of frames: "
                "call the whole model (VideoUNet or VideoVAE.decode)"
            )
        return self._state

    @contextmanager
    def during(self, state: ClipState) -> Iterator[None]:
        """Let the temporal layers see `state`, and put back what they saw before."""
        before, self._state = self._state, state
        try:
            yield
        finally:
            self._state = before
