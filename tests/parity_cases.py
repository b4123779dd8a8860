"""What comparisons with recorded outputs share: the case, the names of recordings, differences."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

SINGLE, DOUBLE, LOSS, SAMPLE, EXACT = 2e-5, 1e-5, 1e-6, 1e-4, 0.0
WEIGHTS, RECORDED, RECORDED64 = ".safetensors", "_io.safetensors", "_io64.safetensors"


class Case(NamedTuple):
    """One comparison; it fails unless the difference is a number within the tolerance."""

    name: str
    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return math.isfinite(self.difference) and self.difference <= self.tolerance


Shapes = dict[str, list[int]]
Tensors = Mapping[str, Tensor]
Runner = Callable[[Path, str], Iterable[Case]]
"""Compares what a folder has recorded under a name."""


def disagreements(ours: dict[str, Any], theirs: dict[str, Any]) -> int:
    return sum(key not in ours or key not in theirs or ours[key] != theirs[key] for key in {**ours, **theirs})


def difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise ValueError(f"output of shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}")
    return float((ours.double() - theirs.double()).abs().max())


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in units of the value, for values above 1."""
    return difference(ours / theirs.abs().clamp(min=1), theirs / theirs.abs().clamp(min=1))


def weights_of(file: Path) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in load_file(file).items()}


def read_json(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def compare_settings(ours: dict[str, Any], expected: dict[str, Any]) -> None:
    """What was read off the tensors must be what the configuration says."""
    read = {name: list(value) if isinstance(value, tuple) else value for name, value in ours.items()}
    wrong = [f"{name} {read[name]} instead of {value}" for name, value in expected.items() if read[name] != value]
    if wrong:
        raise ValueError(f"the tensors deny what the configuration says: {', '.join(wrong)}")


def same_calls(outputs: Iterable[str], calls: Iterable[str]) -> None:
    """Each described call must be recorded, and no other; outputs are named after their calls."""
    recorded = {key.rsplit(".", 1)[0] for key in outputs}
    if recorded != set(calls):
        raise ValueError(f"calls {sorted(recorded)} are recorded, {sorted(calls)} are described")


def stand_in(shape: list[int], constant: int = 0) -> Tensor:
    """A tensor of any shape that holds one number in memory."""
    return torch.tensor(float(constant)).expand(shape)


def astray(listed: Shapes, pass_through: Callable[[Tensors], Tensors]) -> int:
    """How many tensors do not come back by the same name and shape with the number that they held."""
    theirs = {key: (shape, number) for number, (key, shape) in enumerate(listed.items(), start=1)}
    back = pass_through({key: stand_in(shape, number) for key, (shape, number) in theirs.items()})
    return disagreements({key: (list(each.shape), first_of(each)) for key, each in back.items()}, theirs)


def first_of(tensor: Tensor) -> int:
    return int(tensor[(0,) * tensor.ndim])
