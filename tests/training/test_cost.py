"""The cost of a step on paper against the real step, tensor by tensor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from inflate.models.visits import away
from inflate.training import adamw
from inflate.training.cost import Cost, measure, on_paper
from inflate.training.eight_bits import BLOCK
from inflate.training.image_to_video import ImageToVideoTask
from inflate.training.memory import Ledger
from inflate.training.memory_settings import Memory
from inflate.training.paper import Paper
from inflate.training.paper import on_paper as is_on_paper
from inflate.training.settings import Training
from tiny_svd import Clips, image_to_video

WITHIN = 0.02
LEAN = {"precision": "pure_bf16", "optimizer": "adamw8bit", "step_in_backward": True, "gradient_clip": 0.0}


def task(paper: Paper | None, **changes: Any) -> ImageToVideoTask:
    made = image_to_video(**changes)
    for network in made.family.parts.values():
        network.float()
        if paper:
            paper.adopt(network)
    made.held_out[0]["pixels"] = made.held_out[0]["pixels"].float()
    return made


def batch(size: int, paper: Paper | None) -> dict[str, Any]:
    items = [Clips()[number] for number in range(size)]
    stacked = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    pixels = stacked["pixels"].float()
    return {**stacked, "pixels": paper.like(pixels) if paper else pixels}


def predicted(training: Training, gpu: bool = False, looking: bool = False, **changes: Any) -> Cost:
    paper = Paper(gpu)
    return on_paper(task(paper, **changes), training, batch(training.batch, paper), paper, looking)


@pytest.mark.parametrize(
    ("training", "changes"),
    [
        ({}, {"memory": Memory(recompute="units")}),
        ({"precision": "bf16", "accumulate": 4, "ema": 0.9}, {}),
        ({"batch": 2}, {"trainable": "temporal"}),
        ({"precision": "bf16"}, {"trainable": "temporal", "memory": Memory(base="nf4")}),
        ({"precision": "pure_bf16", "accumulate": 2}, {"trainable": "temporal"}),
        (LEAN, {"memory": Memory(recompute="units")}),
        ({"precision": "bf16"}, {"memory": Memory("nested", feed_forward_parts=3, offload=True)}),
        (
            {"batch": 3},
            {"memory": Memory("all_but_attention", {"up_blocks.0": "feed_forward"}), "trainable": "temporal"},
        ),
    ],
)
def test_a_step_on_paper_is_the_real_steps_equal(
    training: dict[str, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "SMALL", 64)  # these networks have no weight that is not small
    settings = Training(tracker="none", **training)
    looking = not training
    ahead = predicted(settings, looking=looking, **changes)
    real = measure(task(None, **changes), settings, batch(settings.batch, None), looking)
    for name in ("weights", "frozen", "trained", "gradients", "optimizer", "average", "forward_flops", "flops"):
        assert getattr(ahead, name) == getattr(real, name), name
    assert list(ahead.peaks) == list(real.peaks)
    for phase, peak in real.peaks.items():
        assert ahead.peaks[phase] == pytest.approx(peak, rel=WITHIN), phase


def test_lean_training_costs_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 bytes a weight, no gradients, 2 bytes of moments of what is not small and 8 for each block's scales; of what is
    small a float32 copy and two moments, of all the number of the step.
    """
    monkeypatch.setattr(adamw, "SMALL", 64)
    full, lean = predicted(Training(tracker="none")), predicted(Training(tracker="none", **LEAN))
    assert (lean.trained, 2 * lean.weights) == (full.trained, full.weights)
    assert (full.gradients, lean.gradients) == (4 * full.trained, 0)
    assert full.optimizer == 8 * full.trained + 4 * len(shapes())
    coded = [shape for shape in shapes() if len(shape) > 1 and math.prod(shape) >= 64]
    small = lean.trained - sum(map(math.prod, coded))
    scales = sum(shape[0] * math.ceil(math.prod(shape[1:]) / BLOCK) for shape in coded)
    assert lean.optimizer == 2 * (lean.trained - small) + 8 * scales + 12 * small + 4 * len(shapes())
    assert lean.peaks["backward"] < full.peaks["backward"] - full.gradients / 2


def shapes() -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in task(None).family.unet.parameters() if p.requires_grad]


def test_a_gpu_keeps_float32_norms_and_no_square_roots_and_nothing_stays_exchanged() -> None:
    functional = torch.nn.functional
    plain = functional.group_norm, functional.scaled_dot_product_attention, torch.nn.Module._apply
    half = Training(precision="bf16", tracker="none")
    cpu, gpu = predicted(half), predicted(half, gpu=True)
    assert gpu.peaks["forward"] > cpu.peaks["forward"]
    assert gpu.peaks["update"] < cpu.peaks["update"]
    assert gpu.optimizer == cpu.optimizer
    assert (functional.group_norm, functional.scaled_dot_product_attention, torch.nn.Module._apply) == plain


def test_tensors_on_paper_answer_0_and_others_keep_their_values() -> None:
    paper = Paper()
    with paper.active():
        made = paper.empty(3)
        assert is_on_paper(made * 2)
        assert float(made.sum()) == 0.0
        assert float(torch.arange(3).sum()) == 3.0


def test_a_network_that_is_away_takes_no_place_on_paper() -> None:
    network, paper = torch.nn.Linear(8, 8), Paper()
    paper.adopt(network)
    ledger = Ledger("cpu")
    ledger.record(network.parameters())
    with paper.active(), ledger:
        with away([network]):
            assert ledger.current == 0
        assert ledger.current == 4 * (8 * 8 + 8)
    with Paper(gpu=False).active(), away([network]):
        assert ledger.current == 4 * (8 * 8 + 8)
