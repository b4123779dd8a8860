"""An optimiser that steps each parameter within the backward pass, so that gradients never lie there all at once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from inflate.training.adamw import AdamW


class InBackward:
    """Updates every parameter as soon as its gradient is complete, and lets the gradient go.

    The norm of all gradients is known only afterwards: none can be clipped by it, and one that is not finite has
    changed its weights by then.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], optimizer: AdamW) -> None:
        self.optimizer = optimizer
        self.squares: list[Tensor] = []
        self.hooks = [parameter.register_post_accumulate_grad_hook(self._step) for parameter in parameters]

    def norm(self) -> Tensor | None:
        """Norm of all gradients since it was last asked for, as one vector; None where there were none."""
        squares, self.squares = self.squares, []
        return torch.stack(squares).sum().sqrt() if squares else None

    def end(self) -> None:
        """Leave gradients where they are from here on."""
        for hook in self.hooks:
            hook.remove()

    def _step(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.squares.append(torch.linalg.vector_norm(parameter.grad, dtype=wide).square())
        self.optimizer.step_alone(parameter)
        parameter.grad = None
