"""What benchmarks conclude from the runs that they find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import load_recipe

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_equal_loss_counts_the_steps_that_each_run_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    compare = load_recipe(BENCHMARKS / "image_to_video.py").compare

    def run(name: str, *losses: float) -> None:
        rows = [{"step": 1000 * place, "held-out loss": loss} for place, loss in enumerate(losses)]
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "metrics.json").write_text(json.dumps({"held_out": rows}))

    run("scratch-0", 2.0, 1.5, 0.5)
    run("inflated-0", 1.0, 0.6)
    assert compare(tmp_path, [0], 2000)[1] == {}  # it may yet come to the other's last loss
    run("inflated-0", 1.0, 0.5)
    for steps in (1000, 2000):  # the runs may have been longer than what is asked for
        found = compare(tmp_path, [0], steps)[1]["seed 0"]
        assert found["ratio of steps to equal loss"] == pytest.approx(2)
    assert compare(tmp_path, [0], 3000)[1] == {}
