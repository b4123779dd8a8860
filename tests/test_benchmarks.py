"""What benchmarks conclude from the runs that they find."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import load_recipe
from inflate.data import demo

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_equal_loss_counts_the_steps_that_each_run_took(tmp_path: Path) -> None:
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


def test_a_loss_is_compared_with_that_over_the_base_as_loaded() -> None:
    script = load_recipe(BENCHMARKS / "quantised_base.py")
    losses = {
        f"{base}, seed 0": {"0": 2.0, "9": last} for base, last in zip(script.BASES, (1.0, 1.01, 1.5), strict=True)
    }
    over = {"as_loaded, seed 0": 1.0, "int8, seed 0": 0.99, "nf4, seed 0": 1.2}
    found = script.compared(losses, over, [0])["nf4, seed 0"]
    assert found["untrained, percent"] == 0
    assert found["trained, percent"] == pytest.approx(50)
    assert found["trained, over the base as loaded, percent"] == pytest.approx(20)


def test_a_look_is_found_in_what_is_painted_so_and_not_in_what_is_not() -> None:
    script, rng = load_recipe(BENCHMARKS / "text_to_video.py"), np.random.default_rng(0)
    scenes = [demo.draw_scene(rng) for _ in range(40)]
    assert any(demo.OPPOSITE[scene.colour] == scene.ground for scene in scenes)  # which both looks paint alike

    def painted(look: demo.Look) -> Tensor:
        frames = torch.stack([torch.tensor(demo.render(scene, [0.0], look=look)) for scene in scenes])
        return frames.movedim(-1, 2) / 127.5 - 1  # (B, 1, 3, H, W)

    assert script.look_share(painted("opposite"), scenes, "opposite") > 0.99
    assert script.look_share(painted("vivid"), scenes, "opposite") < 0.01
