"""What PyTorch's operations make of tensors on paper, at first and when they have made it before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from inflate.training.memory import device_of
from inflate.training.paper import Paper, on_paper

IMAGES, WEIGHT, COUNTS = torch.rand(2, 8, 6, 4), torch.rand(5, 8, 3, 3), torch.arange(12).view(3, 4)


@pytest.mark.parametrize(
    ("operation", "given"),
    [
        (lambda x, weight: functional.conv2d(x, weight, stride=2), (IMAGES, WEIGHT)),
        (lambda x: functional.group_norm(x, 4), (IMAGES,)),
        (lambda x: functional.layer_norm(x, (4,)), (IMAGES,)),
        (lambda x: torch.var_mean(x, dim=(2, 3)), (IMAGES,)),
        (lambda x: x.bfloat16(), (IMAGES,)),
        (lambda x: x[:, 1:3].transpose(1, 2) + 1, (IMAGES,)),
        (lambda x: torch.cat([x, x[:1]]), (IMAGES,)),
        (lambda x: x.split(3, dim=1)[-1], (IMAGES,)),
        (lambda x: (x @ x.mT).sum(0), (IMAGES,)),
        (lambda x: x.clone().copy_(x.double()), (IMAGES,)),
        (lambda x: x * 2, (COUNTS,)),
        (lambda x: x * 2.0, (COUNTS,)),
        (lambda x: x * True, (COUNTS,)),
        (lambda x: x + torch.tensor(0.5), (COUNTS,)),
        (lambda x: x + torch.ones(4, dtype=torch.float64), (COUNTS,)),
    ],
)
def test_what_is_made_again_is_what_is_made(operation: Callable[..., Any], given: tuple[Tensor, ...]) -> None:
    real, paper = operation(*given), Paper(gpu=False)
    for _ in range(2):
        with paper.active():
            made = operation(*map(paper.like, given))
        for one, other in zip(*([each] if isinstance(each, Tensor) else each for each in (made, real)), strict=True):
            assert on_paper(one)
            assert (one.shape, one.stride(), one.dtype, one.device) == (
                other.shape, other.stride(), other.dtype, other.device,
            )  # fmt: skip
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


@pytest.mark.parametrize("operation", [Tensor.clone, Tensor.t, lambda x: x.view(-1), lambda x: x.split(1)[0]])
def test_what_is_made_of_what_is_away_is_away(operation: Callable[[Tensor], Tensor]) -> None:
    paper = Paper()
    with paper.active():
        here = paper.empty(4, 6)
        away = here.to("meta")
        for _ in range(2):
            assert [device_of(operation(tensor)).type for tensor in (here, away)] == ["cpu", "meta"]


def test_views_share_what_they_are_views_of_and_results_do_not() -> None:
    paper = Paper()
    with paper.active():
        for _ in range(2):
            whole = paper.empty(4, 6)
            kept = {
                each.untyped_storage()._cdata for each in (whole, whole[1:], whole.t(), *whole.split(2), whole.view(-1))
            }
            made = [whole + 1, whole + 1, whole.clone()]
            assert len(kept) == 1
            assert len({each.untyped_storage()._cdata for each in made} | kept) == 4
