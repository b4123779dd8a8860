"""What every temporal layer must know about the folded batch: how many frames a clip has, and which are images.

The 2D layers see `(batch * frames, channels, height, width)`. One `Clip` per model carries the missing knowledge for
the duration of a forward pass; it is a plain attribute, not a module, and is copied with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inflate.errors import InflateError

Recompute = Callable[..., Any]
"""A checkpoint function: called with a function and its tensors, it keeps only the tensors."""
Compiled = Callable[..., Any]
"""What a unit's own function was compiled to; it takes the same tensors."""


@dataclass(frozen=True)
class ClipState:
    """The clips of one forward pass; `bypass` leaves every temporal layer out, as for separate images."""

    frames: int
    """Frames per clip."""
    image_only: Tensor | None = None
    """Bool (batch, frames): True frames take the spatial path in every mix; None = all are video."""
    bypass: bool = False
    """Skip the temporal layers altogether."""


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


def run(module: nn.Module, function: Callable[..., Any], *tensors: Any) -> Any:
    """Call `function(*tensors)`; with checkpointing on, keep only the tensors and call again in the backward pass.

    Of a unit that is compiled, what it was compiled to is called in place of `function`, where gradients are wanted:
    looking at a model between steps, in other sizes, would compile it again. The recomputation sees the clip state of
    its own forward pass: by then the model may have been called with another clip, whose frame count or image mask
    would give wrong gradients without a word.
    """
    if not torch.is_grad_enabled():
        return function(*tensors)
    function = getattr(module, "compiled", None) or function
    recompute: Any = module.recompute
    if recompute is None:
        return function(*tensors)
    clip: Any = module.clip
    state = clip.state

    def again(*tensors: Any) -> Any:
        with clip.during(state):
            return function(*tensors)

    return recompute(again, *tensors)


def set_recompute(model: nn.Module, recompute: Recompute | None) -> None:
    """Give every unit of `model` that can be checkpointed as a whole its checkpoint function, or take it away."""
    for module in model.modules():
        if hasattr(module, "recompute"):
            setattr(module, "recompute", recompute)  # noqa: B010 -- a plain attribute, which mypy takes for a tensor


def recomputes(model: nn.Module) -> bool:
    """Whether any unit of `model` is checkpointed."""
    return any(getattr(module, "recompute", None) is not None for module in model.modules())
