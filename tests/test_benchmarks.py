"""What benchmarks conclude from the runs that they find."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

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
    script, rng = load_recipe(BENCHMARKS / "scenes.py"), np.random.default_rng(0)
    scenes = [demo.draw_scene(rng) for _ in range(40)]
    assert any(demo.OPPOSITE[scene.colour] == scene.ground for scene in scenes)  # which both looks paint alike

    def painted(look: demo.Look) -> Tensor:
        frames = torch.stack([torch.tensor(demo.render(scene, [0.0], look=look)) for scene in scenes])
        return frames.movedim(-1, 2) / 127.5 - 1  # (B, 1, 3, H, W)

    assert script.look_share(painted("opposite"), scenes, "opposite") > 0.99
    assert script.look_share(painted("vivid"), scenes, "opposite") < 0.01


def test_every_arm_computes_the_baselines_losses(tmp_path: Path) -> None:
    script = load_recipe(BENCHMARKS / "train_step.py")
    only = ["equal work", "fused LoRA", "defaults"]
    script.main(["--arms", "--size", "tiny", "--pairs", "1", "--only", *only, "--output", str(tmp_path / "arms.json")])
    (case,) = json.loads((tmp_path / "arms.json").read_text())["cases"]
    assert list(case["arms"]) == ["diffusers", "diffusers, its checkpointing", *only]
    assert all(arm["largest difference of losses"] < 1e-4 for arm in case["arms"].values())
    assert (tmp_path / "arms.png").is_file()
    assert script.encoding_share(script.MIDDLE, (4, 64, 64)) == pytest.approx(script.ENCODING_SHARE, rel=0.2)


def test_the_script_for_a_gpu_runs_each_of_its_parts_and_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_recipe(BENCHMARKS / "gpu.py")
    monkeypatch.setattr(script, "STEPS", 1)
    monkeypatch.setattr(script, "TRAINED", {name: script.TRAINED[name] for name in ("diffusers", "inflate, defaults")})
    found = script.run(script.Machine(tiny=True, minutes=8))
    assert list(found) == [f"{part}, 2x64x64" for part in script.PARTS]
    theirs, ours = found["LoRA steps, 2x64x64"].values()
    assert all("seconds" in each for part in ("sampling", "decoding") for each in found[f"{part}, 2x64x64"].values())
    assert 0 < ours["seconds"] < 100 * theirs["seconds"]
    late = script.run(script.Machine(tiny=True, minutes=0))
    assert all(part == {"not run": "no time was left"} for part in late.values())


def test_kernels_of_a_compiled_graph_are_its_products_and_what_lies_between() -> None:
    script = load_recipe(BENCHMARKS / "launches.py")

    def between(x: Tensor, weight: Tensor) -> Tensor:
        hidden = torch.relu(x @ weight).add(1).sigmoid()  # a product and one group
        hidden = hidden.view(-1, 4) @ weight  # a product; a view is nothing
        hidden = hidden - hidden.sum(1, keepdim=True)  # one group, for a row is summed in passing
        return (hidden - hidden.sum()).exp()  # the sum belongs to that group, and what waits for it is another

    graph = make_fx(between, tracing_mode="fake")(torch.zeros(8, 4), torch.zeros(4, 4))
    assert script.left(graph) == 5


def test_a_compiled_step_with_a_lora_between_frames_launched_few_kernels() -> None:
    script = load_recipe(BENCHMARKS / "launches.py")
    cases = json.loads((BENCHMARKS / "results" / "launches.json").read_text())["cases"]
    counts = {name: case["launches"] for name, case in cases.items()}
    assert counts["LoRA on attention between frames, fused, compiled"] <= script.MOST
    assert counts["LoRA on all attention, fused, not compiled"] < counts["LoRA on all attention, of PEFT, not compiled"]
