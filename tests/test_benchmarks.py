"""What benchmarks conclude from the runs that they find."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_dynamicrafter
import tiny_i2vgen_xl
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from helpers import load_recipe
from inflate import refining
from inflate.data import demo, demo_clips
from inflate.sampling.dynamicrafter import Sampling, sample

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


def test_a_curve_is_drawn_of_a_run_that_did_not_measure_the_same_throughout(tmp_path: Path) -> None:
    rows = [{"step": 0, "held-out loss": 2.0, "held-out loss, bypassed": 2.5}, {"step": 9, "held-out loss": 1.0}]
    (tmp_path / "metrics.json").write_text(json.dumps({"held_out": rows}))
    assert load_recipe(BENCHMARKS / "text_to_video.py").curve(tmp_path, tmp_path / "curve.png") == rows
    assert (tmp_path / "curve.png").is_file()


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


def told(count: int, **changes: str) -> list[demo.Scene]:
    """Scenes that fly as their captions alone tell, from the middle so that they may fly anywhere."""
    rng = np.random.default_rng(0)
    scenes = [demo.draw_scene(rng, told=True) for _ in range(count)]
    return [replace(scene, x=0.5, y=0.5, radius=0.25, **changes) for scene in scenes]


def filmed(scenes: list[demo.Scene], frames: int = 8) -> Tensor:
    """Their clips (N, F, 3, H, W) in [-1, 1]."""
    clips = [torch.from_numpy(demo.render(scene, np.arange(frames) / demo.FPS)) for scene in scenes]
    return torch.stack(clips).movedim(-1, 2) / 127.5 - 1


def test_a_clip_moves_as_captioned_or_the_other_way_reversed_and_a_copied_frame_not_at_all() -> None:
    judge, scenes = load_recipe(BENCHMARKS / "scenes.py"), told(5)
    clips = filmed(scenes)
    others = {"left": "right", "right": "left", "up": "down", "down": "up"}
    opposite = [replace(scene, heading=others[scene.heading]) for scene in scenes]
    assert judge.agreement(clips, scenes)["agree"] == 5
    assert judge.agreement(clips.flip(1), opposite)["agree"] == 5
    assert judge.agreement(clips[:, :1].expand_as(clips), scenes)["agree"] == 0


def test_what_a_frame_shows_is_seen_without_being_told() -> None:
    judge, rng = load_recipe(BENCHMARKS / "scenes.py"), np.random.default_rng(0)
    scenes = [demo.draw_scene(rng) for _ in range(30)]
    clips = filmed(scenes, 1)
    assert all(share >= 0.9 for share in judge.likeness(clips, scenes).values())
    assert all(share < 0.5 for share in judge.likeness(clips.roll(1, 0), scenes).values())
    assert judge.seen(torch.full((3, 64, 64), 0.5)) == ("", "grey", "no shape", "")
    turned = [replace(scene, heading="left" if scene.heading == "right" else "right") for scene in scenes]
    darts = [place for place, scene in enumerate(scenes) if scene.shape == "dart"]
    assert judge.likeness(clips[darts], [turned[place] for place in darts])["shape and way"] <= 0.1


def test_who_steers_is_told_of_clips_that_follow_the_caption_the_image_or_nothing() -> None:
    script, judge = load_recipe(BENCHMARKS / "dynamicrafter.py"), load_recipe(BENCHMARKS / "scenes.py")
    scenes = told(3, heading="left")
    scenes[0] = replace(scenes[0], shape="dart", told=False)

    def steered(clips: dict[str, Tensor]) -> dict[str, object]:
        found = {way: judge.motions_of(each, judge.masks_of(each, scenes)) for way, each in clips.items()}
        result: dict[str, object] = script.steered(found, scenes)
        return result

    following = {way: filmed([replace(scene, heading=way) for scene in scenes]) for way in ("left", "right")}
    by_caption = steered(following)
    assert (by_caption["as asked"], by_caption["of"], by_caption["chance"]) == (6, 6, 0.5)
    assert by_caption["images that follow every caption"] == "3 of 3"
    by_image = steered(dict.fromkeys(following, following["left"]))
    assert (by_image["share"], by_image["chance"], by_image["as the real clip"]) == (0.5, 0.5, 1)
    assert by_image["image shows the same"] == {"as asked": 1, "of": 1, "share": 1}
    assert by_image["image shows another"] == {"as asked": 0, "of": 1, "share": 0}
    assert by_image["images that follow every caption"] == "0 of 3"
    assert by_image["dart"] == {"as asked": 1, "of": 2, "share": 0.5}
    still = steered({way: each[:, :1].expand_as(each) for way, each in following.items()})
    assert (still["as asked"], still["chance"], still["as the real clip"]) == (0, 0, 0)


def test_a_caption_is_asked_to_differ_in_the_direction_alone() -> None:
    asked, scene = load_recipe(BENCHMARKS / "dynamicrafter.py").asked, told(1)[0]
    assert asked(replace(scene, heading="up"), "left") == replace(scene, heading="left").caption
    assert asked(replace(scene, told=False), "left") == replace(scene, heading="left").caption
    assert "dart flying left" in asked(replace(scene, shape="dart", told=False, heading="up"), "left")


def test_a_cross_fade_has_both_ends_and_not_the_motion_between() -> None:
    script = load_recipe(BENCHMARKS / "dynamicrafter.py")
    truth = filmed(told(4, speed="fast"))

    def distance(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).abs().flatten(1).mean(1)

    faded = script.between(script.cross_fade(truth), truth, distance)
    assert torch.stack([faded["psnr, first frame"], faded["psnr, last frame"]]).min() > 80
    assert faded["psnr, frames between"].max() < 40
    assert faded["perceptual distance, frames between"].min() > 0
    assert script.between(truth, truth, distance)["perceptual distance, frames between"].max() == 0
    assert faded["motion error"].min() > 0.4
    assert script.motion_error(truth, truth).max() == 0
    assert script.motion_error(truth[:, :1].expand_as(truth), truth).numpy() == pytest.approx(1)
    assert script.motion_error(truth.flip(1), truth).min() > 1


def test_a_model_without_a_stream_of_the_image_draws_the_same_for_every_image(tmp_path: Path) -> None:
    script = load_recipe(BENCHMARKS / "dynamicrafter.py")
    family = tiny_dynamicrafter.family(tmp_path)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 2 - 1

    def apart(tokens: bool, latents: bool) -> float:
        model, settings = script.Ablated.of(family, tokens, latents), Sampling(steps=2, guidance=2.0)
        one, other = sample(model, images, ["a red disc"] * 2, [0, 0], settings)
        return float((one - other).abs().max())

    found = {name: apart(*streams) for name, streams in script.STREAMS.items()}
    assert found.pop("neither") < 1e-6
    assert all(difference > 1e-3 for difference in found.values())


@pytest.mark.parametrize("ends", [False, True])
def test_a_model_is_measured_for_what_it_was_trained_for(tmp_path: Path, ends: bool) -> None:
    script, output = load_recipe(BENCHMARKS / "dynamicrafter.py"), tmp_path / "out"
    family = tiny_dynamicrafter.family(tmp_path / "parent")
    family.clips = replace(family.clips, interpolation=ends)
    for network in family.networks:
        network.float()
    family.save_pretrained(tmp_path / "model")
    clips = demo_clips.build(tmp_path / "clips", clips=1, held_out=1, told=0.5)
    words = [
        str(tmp_path / "model"),
        str(clips),
        str(output),
        "--count",
        "1",
        "--steps",
        "1",
        "--guidance",
        "1",
        "--ways",
        "left",
    ]
    script.main(words)
    fitting = ["interpolation"] if ends else ["steering", "streams"]
    assert sorted(file.stem for file in output.glob("*.json")) == fitting
    sheets = ["interpolation-0"] if ends else ["steering-shown-0", "streams-0"]
    assert sorted(file.stem for file in output.glob("*.png")) == sheets
    measured = json.loads((output / f"{fitting[-1]}.json").read_text())[fitting[-1]]
    assert len(measured) > 3
    with pytest.raises(SystemExit, match=f"was trained for {'interpolation' if ends else 'streams and steering'}"):
        script.main([*words, "--only", "streams" if ends else "interpolation"])


def test_a_model_without_a_part_of_the_first_frame_does_not_see_it(tmp_path: Path) -> None:
    script = load_recipe(BENCHMARKS / "i2vgen_xl.py")
    family = tiny_i2vgen_xl.base(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    settings = script.Sampling(steps=2, guidance=2.0)

    def apart(without: tuple[str, ...]) -> float:
        one, other = script.sample(script.Ablated.of(family, without), images, ["a red disc"] * 2, [0, 0], settings)
        return float((one - other).abs().max())

    found = {name: apart(without) for name, without in script.WITHOUT.items()}
    assert found.pop("no image") < 1e-6
    assert all(difference > 1e-4 for difference in found.values())
    assert len(set(found.values())) == len(found)


def test_both_stages_of_i2vgen_xl_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, output = load_recipe(BENCHMARKS / "i2vgen_xl.py"), tmp_path / "out"
    monkeypatch.setattr(script, "WITHOUT", {"everything": (), "no image": script.ALL})
    for name, side in (("base", 32), ("refiner", 64)):
        family = getattr(tiny_i2vgen_xl, name)(tmp_path / f"parent-{name}")
        family.clips = replace(family.clips, height=side, width=side)
        for network in family.networks:
            network.float()
        family.save_pretrained(tmp_path / name)
    clips = demo_clips.build(tmp_path / "clips", clips=1, held_out=1)
    words = [str(tmp_path / "base"), str(clips), str(output), "--count", "1", "--steps", "1", "--guidance", "1"]
    with pytest.raises(SystemExit, match="--refiner"):
        script.main([*words, "--only", "refinement"])
    more = ["--refine-steps", "1", "--strengths", "0", "--keep-colours", "0", "3"]
    script.main([*words, "--refiner", str(tmp_path / "refiner"), *more])
    told = {name: json.loads((output / f"{name}.json").read_text())[name] for name in ("hierarchy", "refinement")}
    assert len(told["hierarchy"]) == 3 + 2 * len(script.WITHOUT)
    assert told["hierarchy"]["real clips"]["ssim"] == pytest.approx(1)
    refined = told["refinement"]
    assert len(refined) == 2 + 3 * (2 + 2)
    assert refined["true, bicubic"]["sharpness"] < 0.2
    kept = refined["true, noise, strength 0, colours kept 3"]
    assert kept["psnr"] > refined["true, noise, strength 0"]["psnr"]  # a tiny autoencoder knows no colours
    sheets = sorted(file.stem for file in output.glob("*.png"))
    assert sheets == ["hierarchy-0", *(f"refinement-{kind}-0" for kind in ("autoencoder", "drawn", "true"))]


def test_shimmer_is_change_where_the_real_clip_stands_still() -> None:
    shimmer, truth = load_recipe(BENCHMARKS / "i2vgen_xl.py").shimmer, torch.full((1, 4, 3, 8, 8), 0.5)
    for place in range(4):
        truth[:, place, :, 2:4, place : place + 2] = 0.8  # a box goes right
    assert float(shimmer(truth, truth)) == 0
    assert float(shimmer(1 - truth, truth)) == 0
    unsteady = truth + 0.1 * (torch.arange(4) % 2)[:, None, None, None]
    assert float(shimmer(unsteady, truth)) == pytest.approx(0.1)


@pytest.mark.parametrize(("base", "refined"), [((64, 64), (64, 64)), ((64, 64), (96, 96)), ((32, 64), (128, 128))])
def test_a_refiner_of_a_size_that_does_not_shrink_to_the_bases_is_refused(
    base: tuple[int, int], refined: tuple[int, int]
) -> None:
    check = load_recipe(BENCHMARKS / "i2vgen_xl.py").check_sizes
    check((32, 64), (96, 192))
    with pytest.raises(SystemExit, match=f"{base[0]}x{base[1]} and {refined[0]}x{refined[1]}"):
        check(base, refined)


def test_the_parts_of_a_refinement_are_noted_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_recipe(BENCHMARKS / "peaks.py")
    for _, place, name in (*script.CALLED, *script.WALKED):
        monkeypatch.setattr(place, name, getattr(place, name))  # put back at the end
    watching = script.watch()
    tiny_i2vgen_xl.refiner(tmp_path / "parent").save_pretrained(tmp_path / "refiner")
    model = refining.Refining.load(str(tmp_path / "refiner"), {"steps": 1})
    (frames,) = model.draw([np.zeros((3, 16, 16, 3), np.uint8)], "", 0, (32, 32))
    assert frames.shape == (3, 32, 32, 3)
    noted = [part["part"] for part in watching.parts]
    assert noted == [f"{when}{name}" for name in ("encoding", "refining", "decoding") for when in ("before ", "")]
    assert all(part["seconds"] >= 0 for part in watching.parts)
    assert sum(part["seconds"] for part in watching.parts if part["part"] == "refining") > 0


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


def test_a_kernel_that_fails_is_told_and_the_others_are_timed() -> None:
    script = load_recipe(BENCHMARKS / "attention_kernels.py")

    def fails() -> Tensor:
        raise RuntimeError("no kernel for this head\nand so on")

    runs = {"first": lambda: torch.ones(2), "bad": fails, "next": lambda: torch.full((2,), 1.5)}
    found = script.timed(runs, "cpu", 2)
    assert found["bad"] == {"not run": "no kernel for this head"}
    assert (found["first"]["difference"], found["next"]["difference"]) == (0, 0.5)


def test_a_record_names_the_version_that_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, version in (("laid over", "2.0"), ("below", "1.0")):
        told = tmp_path / place / f"peft-{version}.dist-info" / "METADATA"
        told.parent.mkdir(parents=True)
        told.write_text(f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "laid over"), str(tmp_path / "below"), *sys.path])
    assert load_recipe(BENCHMARKS / "record.py").record("command", {})["versions"]["peft"] == "2.0"
