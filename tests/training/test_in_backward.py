"""Steps within the backward pass: the same training, no gradients left, and what they rule out."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inflate.errors import ConfigError, NotFiniteError, TrainingError
from inflate.training import adamw, processes
from inflate.training.checkpoint import numbered
from inflate.training.loop import Batch, Noise, fit
from inflate.training.player import Player
from toy import Adversarial, Points, Regression, send, settings, weights

pytestmark = pytest.mark.usefixtures("on_cpu")
STEPPING: dict[str, Any] = {"step_in_backward": True, "gradient_clip": 0.0}
LEAN = STEPPING | {"precision": "pure_bf16", "optimizer": "adamw8bit"}


class Wide(Regression):
    """A matrix large enough for 8 bits and random rounding, and dropout; points are features of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        layers = [nn.Linear(4, 64), nn.Dropout(0.1), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4)]
        self.network = nn.Sequential(*layers)
        self.players = [Player("map", self.network, self.loss)]

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.hook(step)
        x = batch["x"][:, None]
        error = self.players[0].network(x + 0.1 * noise.normal("noise", 1, 4)).float() - x.flip(2)
        return error.square().mean((1, 2)), {}

    def evaluate(self) -> dict[str, float]:
        return {"error": float(self.players[0].network(torch.ones(1, 1, 4)).float().square().mean())}


def norms(output: Path) -> list[float]:
    return [row["gradient_norm/map"] for row in json.loads((output / "metrics.json").read_text())["history"]]


def test_it_is_the_same_training_and_leaves_no_gradient(tmp_path: Path) -> None:
    plain, stepping, held = Wide(), Wide(), []
    fit(plain, Points(), settings(tmp_path / "plain", steps=4, ema=0.9, gradient_clip=0.0, schedule="cosine"))
    stepping.hook = lambda step: held.extend(p.grad for p in stepping.network.parameters())
    fit(stepping, Points(), settings(tmp_path / "stepping", steps=4, ema=0.9, schedule="cosine", **STEPPING))
    assert held == [None] * len(held)
    assert len(held) == 4 * 6
    assert weights(plain) == weights(stepping)
    assert norms(tmp_path / "plain") == pytest.approx(norms(tmp_path / "stepping"), rel=1e-6)


@pytest.mark.parametrize("changes", [STEPPING, LEAN, {"precision": "pure_bf16", "accumulate": 2}])
def test_n_plus_n_steps_equal_2n_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    common = changes | {"ema": 0.9, "warmup": 2}
    whole, first, second = Wide(), Wide(), Wide()
    fit(whole, Points(), settings(tmp_path / "whole", steps=6, **common))
    first.hook = send(2, signal.SIGTERM)
    fit(first, Points(), settings(tmp_path / "parts", steps=6, **common))
    fit(second, Points(), settings(tmp_path / "parts", steps=6, resume="latest", **common))
    assert weights(whole) == weights(second)


def test_rounding_at_random_keeps_learning_where_the_nearest_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def learnt(name: str, **changes: Any) -> float:
        task = Wide()
        fit(task, Points(), settings(tmp_path / name, steps=60, lr=2e-4, **changes))
        matrix = task.network[2].weight.detach()
        return float((matrix - Wide().network[2].weight.detach().bfloat16()).norm())

    wide, random = learnt("float32", gradient_clip=0.0), learnt("random", **LEAN)
    monkeypatch.setattr(adamw, "rounded_", lambda values, generator: values)
    nearest = learnt("nearest", **LEAN)
    assert random == pytest.approx(wide, rel=0.25)
    assert abs(nearest - wide) > 2 * abs(random - wide)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"gradient_clip": 1.0}, r"training\.gradient_clip=1\.0 .* set training\.gradient_clip=0"),
        ({"accumulate": 2}, r"training\.accumulate=2 .* set training\.accumulate=1"),
        ({"precision": "fp16"}, r"training\.precision=fp16 .* set training\.precision=bf16"),
    ],
)
def test_what_needs_all_gradients_at_once_is_refused(changes: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=remedy):
        settings(tmp_path, **(STEPPING | changes))


def test_several_players_and_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"players \['map', 'critic'\] step in turn"):
        fit(Adversarial(), Points(), settings(tmp_path, steps=1, **STEPPING))
    monkeypatch.setattr(processes.Accelerator, "num_processes", 2)
    with pytest.raises(TrainingError, match="exchange gradients after the backward pass"):
        processes.start_accelerator(settings(tmp_path, **STEPPING))


def spoilt(factor: Tensor, tmp_path: Path) -> tuple[str, list[float], list[float]]:
    """The error of a run whose third loss is multiplied by a factor, and the weights after two steps and at its end."""
    task, sound = Wide(), Wide()
    fit(sound, Points(), settings(tmp_path / "sound", steps=2, schedule="constant", **STEPPING))
    plain = task.loss

    def loss(batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses, logs = plain(batch, noise, step)
        return losses * factor if step == 2 else losses, logs

    task.players[0].loss = loss
    with pytest.raises(NotFiniteError) as caught:
        fit(task, Points(), settings(tmp_path / "run", steps=4, **STEPPING))
    return str(caught.value), weights(sound), weights(task)


def test_a_loss_that_is_not_finite_stops_before_any_update(tmp_path: Path) -> None:
    told, before, after = spoilt(torch.tensor(torch.nan), tmp_path)
    assert "loss/map is not finite for sample numbers [2]; nothing was updated" in told
    assert before == after


class Overflowing(torch.autograd.Function):
    """A 1 whose gradient is infinite."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return torch.ones_like(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * torch.inf


def test_a_gradient_that_is_not_finite_is_told_and_nothing_of_it_is_saved(tmp_path: Path) -> None:
    task = Wide()
    plain = task.loss

    def loss(batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        losses, logs = plain(batch, noise, step)
        return losses * Overflowing.apply(task.network[2].weight.sum()) if step == 2 else losses, logs

    task.players[0].loss = loss
    with pytest.raises(NotFiniteError, match="the weights in memory are spoilt"):
        fit(task, Points(), settings(tmp_path / "run", steps=4, checkpoint_every=1, **STEPPING))
    assert [folder.name for folder in numbered(tmp_path / "run")][-1] == "checkpoint-2"


def test_what_ends_a_backward_pass_half_way_leaves_the_last_checkpoint_as_it_was(tmp_path: Path) -> None:
    task, whole = Wide(), Wide()
    calls: list[int] = []

    def fail(_: Tensor) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("out of memory")

    task.network[0].weight.register_hook(fail)
    with pytest.raises(MemoryError):
        fit(task, Points(), settings(tmp_path / "run", steps=4, checkpoint_every=1, **STEPPING))
    assert [folder.name for folder in numbered(tmp_path / "run")][-1] == "checkpoint-2"
    second = Wide()
    fit(second, Points(), settings(tmp_path / "run", steps=4, resume="latest", **STEPPING))
    fit(whole, Points(), settings(tmp_path / "whole", steps=4, **STEPPING))
    assert weights(whole) == weights(second)
