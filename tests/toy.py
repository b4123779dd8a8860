"""A toy task and dataset: a linear map learnt from numbered samples, and an adversary."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inflate.training.noise import Noise
from inflate.training.player import Batch, Player
from inflate.training.settings import Training

CLIPS = 7


class Points:
    """Sample number -> a point, through a permutation of its own for each epoch."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(11)
        self.points = torch.randn(CLIPS, 4, generator=generator).to(dtype)
        self.orders = [torch.randperm(CLIPS, generator=generator) for _ in range(40)]

    def __len__(self) -> int:
        return CLIPS

    def __getitem__(self, number: int) -> dict[str, Any]:
        epoch, place = divmod(number, CLIPS)
        return {"x": self.points[self.orders[epoch][place]], "number": number}


def linear(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    layers = [nn.Linear(4, 8), nn.SiLU(), nn.Dropout(dropout), nn.Linear(8, 4)]
    return nn.Sequential(*layers).to(dtype)


class Regression:
    """One player; `hook(step)` runs inside each loss."""

    def __init__(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> None:
        self.network = linear(dtype, dropout)
        self.players = [Player("map", self.network, self.loss)]
        self.frozen = [nn.Linear(4, 4).to(dtype)]
        self.seen: list[int] = []
        self.looked: list[str] = []
        self.hook: Callable[[int], None] = lambda step: None

    def loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.hook(step)
        self.seen += batch["number"].tolist()
        x = batch["x"]
        error = self.players[0].network(x + 0.1 * noise.normal("noise", 4).to(x)) - x.flip(1)
        return error.square().mean(1), {"largest": error.abs().amax(1)}

    def evaluate(self) -> dict[str, float]:
        assert not self.network.training
        assert not torch.is_grad_enabled()
        self.looked.append("evaluate")
        x = torch.ones(1, 4).to(next(self.network.parameters()))
        return {"error": float((self.players[0].network(x) - x).square().mean())}

    def preview(self, folder: Path) -> None:
        self.looked.append("preview")
        (folder / "weight.txt").write_text(str(weights(self)))

    def export(self, folder: Path) -> None:
        self.looked.append("export")
        torch.save(self.network.state_dict(), folder / "map.pt")


class Layers(nn.Sequential):
    """Says what of it can be sharded."""

    _no_split_modules = ("Linear",)


class Layered(Regression):
    """With weights that processes can share."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        self.network = Layers(*self.network)
        self.players = [Player("map", self.network, self.loss)]


class Adversarial(Regression):
    """A generator and, from a later step on, a critic with spectral norm (which has buffers)."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        torch.manual_seed(8)
        self.start, self.critic = (
            start,
            nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.SiLU(), nn.Linear(4, 1)),
        )
        critic = Player("critic", self.critic, self.critic_loss, lr=3e-3, start=start)
        self.players = [Player("map", self.network, self.generator_loss), critic]
        self.leaks: list[str] = []

    def generator_loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.leaks += [name for name, p in self.critic.named_parameters() if p.requires_grad]
        loss, logs = self.loss(batch, noise, step)
        self.made = self.players[0].network(batch["x"])
        if step < self.start:
            return loss, logs
        return loss - 0.1 * self.critic(self.made).squeeze(1), logs

    def critic_loss(self, batch: Batch, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        critic = self.players[1].network
        fake, real = critic(self.made.detach()), critic(batch["x"].flip(1))
        return (torch.relu(1 + fake) + torch.relu(1 - real)).squeeze(1), {"real": real}


def weights(task: Regression) -> list[float]:
    return torch.cat([p.detach().flatten() for player in task.players for p in player.network.parameters()]).tolist()


def settings(output: Path, **changes: Any) -> Training:
    quiet: dict[str, Any] = {"tracker": "none", "progress": False, "workers": 0, "log_every": 1, "lr": 1e-2}
    return Training(
        output=output, **(quiet | {"checkpoint_every": 0, "preview_every": 0, "evaluate_every": 0} | changes)
    )


def send(step: int, number: signal.Signals) -> Callable[[int], None]:
    """A hook that sends this process a signal at a step, once however many forward passes the step has."""
    due = [step]

    def hook(now: int) -> None:
        if now in due:
            due.remove(now)
            os.kill(os.getpid(), number)

    return hook
