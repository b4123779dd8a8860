"""What a run tells while it trains: shares of time, means over some samples, warnings."""

from __future__ import annotations

import json
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch
from torch import nn

from inflate import runs
from inflate.errors import TrainingError
from inflate.measures import SHARES
from inflate.training import log
from inflate.training.card import write_card
from inflate.training.loop import fit
from inflate.training.player import Player, Selected
from launch import launch
from toy import Points, Regression, settings

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("on_cpu"),
]


def history(output: Path) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = json.loads((output / "metrics.json").read_text())["history"]
    return rows


# --- shares of time ---------------------------------------------------------------------------------------------------


class Slow(Regression):
    """Takes 20 ms outside its network and 8 in it."""

    def __init__(self) -> None:
        super().__init__()
        self.players = [Player("map", self.network, self.loss, remedy="cache the latents")]
        self.hook = lambda step: sleep(0.020)
        self.network[1].register_forward_pre_hook(lambda *_: sleep(0.008))


class SlowPoints(Points):
    """Each sample takes 20 ms."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        sleep(0.020)
        return super().__getitem__(number)


def test_the_shares_of_time_sum_to_one(tmp_path: Path) -> None:
    fit(Slow(), SlowPoints(), settings(tmp_path / "run", steps=6, accumulate=2, log_every=3))
    rows = history(tmp_path / "run")
    assert len(rows) == 2
    for row in rows:
        assert sum(row[share] for share in SHARES) == pytest.approx(1, abs=1e-5)
        assert min(row[share] for share in SHARES) > 0
        assert row["encode"] > row["forward"] > 0.1
        assert row["data_wait"] > row["forward"]


def test_what_wastes_time_is_told_once_with_its_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Slow(), SlowPoints(), settings(tmp_path / "run", steps=4))
    waiting, encoding = caplog.messages
    assert waiting.startswith("data_wait: ")
    assert "raise training.workers, or, without data.cache, data.memory_megabytes" in waiting
    assert waiting.endswith(", or cache the latents")
    assert encoding.startswith("encode: ")
    assert encoding.endswith("% of the time goes into what losses do outside the trained networks: cache the latents")
    caplog.clear()
    fit(Slow(), SlowPoints(), settings(tmp_path / "first entry", steps=4, log_every=4))
    assert caplog.messages == []  # its first steps make ready


def test_the_bar_says_what_a_run_is_busy_with_while_it_stands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Regression(), Points(), settings(tmp_path / "run", steps=2, progress=True))
    told = capsys.readouterr().err
    at_the_start = told.index("measuring held-out clips:   0%"), told.index("previews:   0%")
    at_the_end = told.index("measuring held-out clips: 100%"), told.index("previews: 100%"), told.index("export: 100%")
    assert sorted([*at_the_start, *at_the_end]) == [*at_the_start, *at_the_end]
    assert told[told.rindex("\r") :].startswith("\r100%"), "and nothing once it is done"


def test_without_a_remedy_a_slow_loss_is_not_told_of() -> None:
    assert list(log.remedies(Regression().players)) == ["data_wait"]


# --- means over some samples ------------------------------------------------------------------------------------------


class Banded(Regression):
    """Tells the loss of every third sample beside that of all."""

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        loss, logs = super().loss(batch, noise, step)
        return loss, {**logs, "third": Selected(loss, batch["number"] % 3 == 0)}


def banded(output: Path, batch: int, accumulate: int, log_every: int = 1) -> list[dict[str, float]]:
    """The history of 6 steps of 2 samples, without how long they took."""
    fit(Banded(), Points(), settings(output, steps=6, batch=batch, accumulate=accumulate, log_every=log_every))
    timed = {*SHARES, "clips_per_second"}
    return [{name: value for name, value in row.items() if name not in timed} for row in history(output)]


def test_a_mean_is_over_the_samples_that_count_and_left_out_without_any(tmp_path: Path) -> None:
    single = Banded()
    fit(single, Points(), settings(tmp_path / "single", steps=6, lr=0.0))
    rows = history(tmp_path / "single")
    assert ["third/map" in row for row in rows] == [True, False, False] * 2
    assert [row["third/map"] for row in rows[::3]] == [row["loss/map"] for row in rows[::3]]
    fit(Banded(), Points(), settings(tmp_path / "together", steps=6, lr=0.0, log_every=6))
    row = history(tmp_path / "together")[0]
    assert row["third/map"] == pytest.approx((rows[0]["loss/map"] + rows[3]["loss/map"]) / 2, rel=1e-6)
    assert row["loss/map"] == pytest.approx(sum(one["loss/map"] for one in rows) / 6, rel=1e-6)


def test_batches_accumulation_and_processes_give_the_same_numbers(tmp_path: Path) -> None:
    for every in (1, 3):
        together = banded(tmp_path / f"together-{every}", 2, 1, every)
        accumulated = banded(tmp_path / f"accumulated-{every}", 1, 2, every)
        launch(banded, tmp_path / f"processes-{every}", 1, 1, every)
        apart = [
            {name: value for name, value in row.items() if name in together[0] | together[-1]}
            for row in history(tmp_path / f"processes-{every}")
        ]
        assert ["third/map" in row for row in together] == ([True, True, False] * 2 if every == 1 else [True, True])
        for other in (accumulated, apart):
            assert [row.keys() for row in other] == [row.keys() for row in together]
            for ours, theirs in zip(together, other, strict=True):
                assert theirs == pytest.approx(ours, rel=1e-4)


class OnlyBanded(Banded):
    """Without the other log, which would be named first."""

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        loss, logs = super().loss(batch, noise, step)
        return loss, {"third": logs["third"]}


@pytest.mark.parametrize(("number", "named"), [(3, "step 1: third/map"), (4, "step 2: loss/map")])
def test_a_loss_that_is_not_finite_is_named_by_a_mean_that_it_counts_in(
    tmp_path: Path, number: int, named: str
) -> None:
    data = Points()
    data.points[data.orders[0][number]] = torch.nan
    with pytest.raises(TrainingError, match=rf"{named} is not finite for sample numbers \[{number}\]"):
        fit(OnlyBanded(), data, settings(tmp_path / "run", steps=4, batch=2))


# --- overfitting ------------------------------------------------------------------------------------------------------


class Noisy:
    """As many points as a linear map has weights, with noise on what it is to learn."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(110, 10, generator=generator)
        self.y = self.x.sum(1) + 2 * torch.randn(110, generator=generator)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"x": self.x[number % 10], "y": self.y[number % 10], "number": number}


class Overfits(Regression):
    """Learns ten points by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.data = nn.Linear(10, 1), Noisy()
        nn.init.zeros_(self.network.weight)
        self.players = [Player("map", self.network, self.loss)]

    def loss(self, batch: Any, noise: Any, step: int) -> Any:
        return (self.players[0].network(batch["x"]).squeeze(1) - batch["y"]).square(), {}

    def evaluate(self) -> dict[str, float]:
        errors = (self.players[0].network(self.data.x).squeeze(1) - self.data.y).square()
        return {"held-out loss": float(errors[10:].mean()), "training-clip loss": float(errors[:10].mean())}


def test_a_run_that_overfits_says_so_everywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output, shape = tmp_path / "run", {"batch": 10, "lr": 0.05, "weight_decay": 0.0, "keep": 0}
    result = fit(
        Overfits(), Noisy(), settings(output, steps=200, evaluate_every=10, checkpoint_every=25, log_every=50, **shape),
        config="stage: toy\n",
    )  # fmt: skip
    losses = [row["held-out loss"] for row in result.held_out]
    best = result.held_out[losses.index(min(losses))]
    assert 0 < best["step"] < 190
    near = f"checkpoint-{25 * max(1, round(best['step'] / 25))}"
    record = json.loads((output / "metrics.json").read_text())["overfitting"]
    assert [(one["measure"], one["step"], one["checkpoint"]) for one in record] == [
        ("held-out loss", best["step"], near)
    ]
    warning = caplog.messages[-1]
    assert caplog.messages.count(warning) == 1
    assert f"overfitting: held-out loss was best at step {best['step']} and went from {min(losses):.4g}" in warning
    told = runs.describe(runs.read(output))
    assert f"    {log.found_overfitting(output, result.held_out)[0]}" in told.splitlines()
    card = write_card(output, "A run", {}, result.held_out, {}, "", "").read_text()
    assert f"; the nearest checkpoint is {near}**" in card
    assert f"| held-out loss | {losses[0]:.4g} | {losses[-1]:.4g} | lower |" in card


def test_a_run_that_does_not_overfit_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Overfits(), Noisy(), settings(tmp_path / "run", steps=6, batch=10, lr=0.05, evaluate_every=1))
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["overfitting"] == []
    assert "overfitting" not in caplog.text
