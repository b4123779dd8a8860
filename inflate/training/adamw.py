"""AdamW for weights in bfloat16 and for moments in 8 bits, of all parameters at once or of one alone.

PyTorch's own AdamW (Loshchilov & Hutter, 1711.05101) has neither, and wants all gradients at once. For float32 weights
and moments this one does the same arithmetic, bit for bit, and its state is PyTorch's.

Weights in bfloat16 have no float32 copy beside them. Their spacing, 2^-8 of their size, is wider than most updates,
which rounding to the nearest would lose; an update is therefore rounded up or down at random, by chances that make it
right on average. What is SMALL has a float32 copy and float32 moments: they take no memory worth telling, and norms'
scales, which are near 1, would be rounded most coarsely.

Of the second moment 8 bits hold the root, whose values span half as many decades.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inflate.training import eight_bits
from inflate.training.eight_bits import Coded
from inflate.training.noise import seed_of

SMALL = 4096
"""Elements below which a parameter keeps float32 moments, as every vector does."""
PIECE = 2**22
"""Elements that are updated together: what an update needs beside the state is of this size."""

Piece = dict[str, Tensor]


class AdamW(torch.optim.Optimizer):
    """AdamW over groups of parameters with their `weight_decay`; see above.

    `names` are the parameters' own: with the seed and the number of a parameter's updates so far, they alone decide how
    it is rounded. Beside what PyTorch keeps (`step`, `exp_avg`, `exp_avg_sq`) a parameter's state may hold `copy`, its
    value in float32, and in 8 bits, in place of the moments, `average`, `root` and their `_scales`. `wholes` are the
    tensors that parameters are shares of, whose size decides what is small: all processes must keep the same of one.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        names: Mapping[str, nn.Parameter],
        lr: float,
        betas: tuple[float, float],
        eight_bits: bool,
        seed: int,
        wholes: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__([*groups], {"lr": lr, "betas": betas, "eps": 1e-8})
        self.eight_bits, self.seed = eight_bits, seed
        self.names = {id(parameter): name for name, parameter in names.items()}
        self.sizes = {
            id(parameter): (wholes or names).get(name, parameter).numel() for name, parameter in names.items()
        }
        self.groups = {id(parameter): group for group in self.param_groups for parameter in group["params"]}
        self.generators: dict[torch.device, torch.Generator] = {}

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no loss is computed again
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.step_alone(parameter)

    @torch.no_grad()
    def step_alone(self, parameter: nn.Parameter) -> None:
        """Update one parameter, which has a gradient, by its group's present settings."""
        group, state = self.groups[id(parameter)], self.state[parameter]
        if not state:
            state.update(self._begin(parameter))
        state["step"] += 1
        step = int(state["step"])
        generator = self._generator(parameter, step)
        for piece in pieces(parameter, state):
            update(piece, step, group, generator)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the parameters' states, by their places: PyTorch would cast them to the parameters' type."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.state.clear()
        for place, values in state_dict["state"].items():
            self.state[parameters[place]] = {
                name: value.clone() if name == "step" else value.to(parameters[place].device, copy=True)
                for name, value in values.items()
            }

    def _begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        wide = torch.promote_types(parameter.dtype, torch.float32)
        small = parameter.ndim < 2 or self.sizes[id(parameter)] < SMALL
        state = {"step": torch.tensor(0.0)}
        if self.eight_bits and not small:
            average, root = eight_bits.empty(parameter), eight_bits.empty(parameter)
            state |= {"average": average.codes, "average_scales": average.scales}
            state |= {"root": root.codes, "root_scales": root.scales}
        else:
            state |= {name: torch.zeros_like(parameter, dtype=wide) for name in ("exp_avg", "exp_avg_sq")}
        if small and parameter.dtype == torch.bfloat16:
            state["copy"] = parameter.detach().to(wide)
        return state

    def _generator(self, parameter: nn.Parameter, step: int) -> torch.Generator | None:
        """What rounds a parameter's update, apart from the generators that dropout draws from."""
        if parameter.dtype != torch.bfloat16:
            return None
        generator = self.generators.setdefault(parameter.device, torch.Generator(parameter.device))
        return generator.manual_seed(seed_of(self.seed, "rounding", self.names[id(parameter)], step))


def pieces(parameter: nn.Parameter, state: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The same rows of a parameter (`weight`), its `gradient` and all of its state but the step, some at a time."""
    assert parameter.grad is not None
    whole = {"weight": parameter.detach(), "gradient": parameter.grad, **state}
    named = {name: torch.atleast_1d(tensor) for name, tensor in whole.items() if name != "step"}
    rows = len(named["weight"])
    size = max(1, PIECE * rows // max(1, parameter.numel()))
    for parts in zip(*(tensor.split(size) for tensor in named.values()), strict=True):
        yield dict(zip(named, parts, strict=True))


def update(piece: Piece, step: int, group: Mapping[str, Any], generator: torch.Generator | None) -> None:
    """AdamW's step of some rows, in place."""
    lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
    wide = _wide(piece)
    average, root = _moments(piece, piece["gradient"].to(wide.dtype), beta1, beta2)
    divisor = (root / math.sqrt(1 - beta2**step)).add_(eps)
    wide.mul_(1 - lr * group["weight_decay"]).addcdiv_(average, divisor, value=-lr / (1 - beta1**step))
    if "copy" in piece:
        piece["weight"].copy_(wide)
    elif generator is not None:
        piece["weight"].copy_(rounded_(wide, generator))


def rounded_(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 values, in place, to one of the two bfloat16 beside them, so that the mean is the value itself.

    A value is rounded away from 0 by the chance of its lower 16 bits: where adding random ones carries into the upper.
    """
    bits = wide.view(torch.int32)
    bits += torch.empty_like(bits).random_(0, 1 << 16, generator=generator)
    bits &= -1 << 16
    return wide


def _wide(piece: Piece) -> Tensor:
    """The weights in float32: themselves, their copy, or for this step alone."""
    weight = piece.get("copy", piece["weight"])
    return weight.float() if weight.dtype == torch.bfloat16 else weight


def _moments(piece: Piece, gradient: Tensor, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """Move the moments on; the first, and the root of the second."""
    if "root" not in piece:
        average, square = piece["exp_avg"], piece["exp_avg_sq"]
        average.lerp_(gradient, 1 - beta1)
        return average, square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt()
    average = eight_bits.decode(Coded(piece["average"], piece["average_scales"]), signed=True).to(gradient)
    root = eight_bits.decode(Coded(piece["root"], piece["root_scales"]), signed=False).to(gradient)
    average.lerp_(gradient, 1 - beta1)
    root.square_().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2).sqrt_()
    for name, moment in (("average", average), ("root", root)):
        for part, coded in zip((name, f"{name}_scales"), eight_bits.encode(moment, name == "average"), strict=True):
            piece[part].copy_(coded)
    return average, root
