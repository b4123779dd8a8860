"""Learning rates of a player's own for some of its parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from inflate.errors import TrainingError
from inflate.training.loop import fit
from inflate.training.player import Player
from toy import Adversarial, Points, Regression, settings, weights

pytestmark = pytest.mark.usefixtures("on_cpu")
SLOW = ("0.weight", "0.bias")


class Rated(Regression):
    """Some parameters learn at a multiple of the rate; with enough of them for moments in 8 bits."""

    def __init__(self, multiplier: float = 0.2, hidden: int = 8, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        torch.manual_seed(7)
        self.network = nn.Sequential(nn.Linear(4, hidden), nn.SiLU(), nn.Linear(hidden, 4)).to(dtype)
        rates = {} if multiplier == 1 else dict.fromkeys(SLOW, multiplier)
        self.players = [Player("map", self.network, self.loss, rates=rates)]


def first_update(output: Path, multiplier: float, hidden: int, **run: Any) -> dict[str, Tensor]:
    """What one step adds to each parameter."""
    task = Rated(multiplier, hidden)
    before = {name: parameter.detach().clone() for name, parameter in task.network.named_parameters()}
    fit(task, Points(torch.float64), settings(output, **({"steps": 1} | run)))
    return {name: parameter.detach() - before[name] for name, parameter in task.network.named_parameters()}


@pytest.mark.parametrize(
    "run",
    [
        {}, {"optimizer": "adamw8bit"}, {"step_in_backward": True, "gradient_clip": 0.0}, {"weight_decay": 3.0},
        {"warmup": 5, "schedule": "cosine", "steps": 1},
    ],
    ids=str,
)  # fmt: skip
def test_the_first_update_is_multiplied_where_it_is_asked_for_and_nowhere_else(
    run: dict[str, Any], tmp_path: Path
) -> None:
    hidden = 1024 if run.get("optimizer") else 8
    slow, full = (first_update(tmp_path / str(each), each, hidden, **run) for each in (0.2, 1.0))
    for name in full:
        expected = 0.2 if name in SLOW else 1.0
        assert float(slow[name].norm() / full[name].norm()) == pytest.approx(expected, rel=1e-6), name
        torch.testing.assert_close(slow[name], expected * full[name], rtol=1e-9, atol=1e-15)


def history(output: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((output / "metrics.json").read_text())["history"]
    return found


def test_the_multiplied_rate_follows_the_schedule_and_is_shown_beside_it(tmp_path: Path) -> None:
    fit(Rated(), Points(torch.float64), settings(tmp_path / "run", steps=6, warmup=2, schedule="cosine"))
    rows = history(tmp_path / "run")
    assert [row["lr/map x0.2"] for row in rows] == [0.2 * row["lr/map"] for row in rows]
    assert len({row["lr/map"] for row in rows}) > 3
    fit(Rated(1.0), Points(torch.float64), settings(tmp_path / "plain", steps=1))
    assert [name for name in history(tmp_path / "plain")[0] if name.startswith("lr/")] == ["lr/map"]


def test_players_have_their_own(tmp_path: Path) -> None:
    task = Adversarial()
    task.players[1].rates = {"2.bias": 3.0}
    fit(task, Points(), settings(tmp_path / "run", steps=1))
    rates = {name: value for name, value in history(tmp_path / "run")[0].items() if name.startswith("lr/")}
    assert rates == {"lr/map": 1e-2, "lr/critic": 3e-3, "lr/critic x3": pytest.approx(9e-3)}


@pytest.mark.parametrize("run", [{}, {"optimizer": "adamw8bit"}, {"step_in_backward": True, "gradient_clip": 0.0}])
def test_n_plus_n_steps_equal_2n_with_rates(run: dict[str, Any], tmp_path: Path) -> None:
    common: dict[str, Any] = {"ema": 0.9, "warmup": 3, "schedule": "cosine", **run}
    whole, second = Rated(), Rated()
    fit(whole, Points(torch.float64), settings(tmp_path / "whole", steps=6, checkpoint_every=3, **common))
    resume = str(tmp_path / "whole/checkpoint-3")
    with torch.no_grad():
        for parameter in second.network.parameters():
            parameter.zero_()  # all must come from the checkpoint
    fit(second, Points(torch.float64), settings(tmp_path / "parts", steps=6, resume=resume, **common))
    assert weights(second) == weights(whole)
    averages = [load_file(tmp_path / run / "checkpoint-6/map.average.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def states(folder: Path) -> dict[int, dict[str, Tensor]]:
    found: dict[int, dict[str, Tensor]] = torch.load(folder / "map.optimizer.pt", weights_only=True)
    return found


@pytest.mark.parametrize(("first", "then"), [(1.0, 0.2), (0.2, 1.0), (0.2, 0.5)])
def test_a_run_goes_on_with_other_rates_and_every_parameters_own_moments(
    first: float, then: float, tmp_path: Path
) -> None:
    """Other rates are other groups: a state taken by its place among them would be another parameter's."""
    run, other, same = (tmp_path / name for name in ("run", "other", "same"))
    fit(Rated(first), Points(torch.float64), settings(run, steps=2))
    for output, multiplier in ((other, then), (same, first)):
        resume = str(run / "checkpoint-2")
        fit(Rated(multiplier), Points(torch.float64), settings(output, steps=3, resume=resume))
    ours, theirs = states(other / "checkpoint-3"), states(same / "checkpoint-3")
    assert [float(state["step"]) for state in ours.values()] == [3.0] * 4
    for place, state in theirs.items():
        assert all(torch.equal(ours[place][name], value) for name, value in state.items())
    before = load_file(run / "checkpoint-2/map.safetensors")
    changed, unchanged = (load_file(output / "checkpoint-3/map.safetensors") for output in (other, same))
    for name, start in before.items():
        ratio = then / first if name in SLOW else 1.0
        torch.testing.assert_close(changed[name] - start, ratio * (unchanged[name] - start), rtol=1e-9, atol=1e-15)


def test_the_average_follows_what_learns_slowly(tmp_path: Path) -> None:
    task = Rated()
    before = task.network[0].weight.detach().clone()
    result = fit(task, Points(torch.float64), settings(tmp_path / "run", steps=1, ema=0.9))
    assert result.export is not None
    average = torch.load(result.export / "map.pt", weights_only=True)["0.weight"]
    learnt = load_file(tmp_path / "run/checkpoint-1/map.safetensors")["0.weight"]
    torch.testing.assert_close(average, before + (1 - 1 / 10) * (learnt - before))


@pytest.mark.parametrize(
    ("rates", "reason"),
    [
        ({"5.weight": 0.2}, "player 'map' has a rate for 5.weight, which is no parameter of its network"),
        ({"0.weight": 0.0}, "0.weight cannot learn at 0.0 times the rate; freeze what is to stay"),
        ({"0.weight": float("nan")}, "cannot learn at nan times"),
        ({"0.weight": -1.0}, "cannot learn at -1.0 times"),
    ],
)
def test_rates_that_mean_nothing_are_refused(rates: dict[str, float], reason: str, tmp_path: Path) -> None:
    task = Rated()
    task.players[0].rates = rates
    with pytest.raises(TrainingError, match=reason):
        fit(task, Points(torch.float64), settings(tmp_path / "run", steps=1))


def test_a_rate_of_what_is_frozen_is_no_matter(tmp_path: Path) -> None:
    task = Rated()
    task.network[0].requires_grad_(False)
    before = task.network[0].weight.detach().clone()
    fit(task, Points(torch.float64), settings(tmp_path / "run", steps=1))
    assert torch.equal(task.network[0].weight, before)
    assert "lr/map x0.2" not in history(tmp_path / "run")[0]
