"""Training of I2VGen-XL's refinement stage on a tiny model: what a step computes, what is measured, shown, exported."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_i2vgen_xl import FRAMES, refiner
from tiny_video_ldm import PROMPT, SIDE, CachedClips, clip

from inflate.adapters import file, verify
from inflate.adapters.settings import AdapterSettings
from inflate.data import video
from inflate.data.buckets import Bucket
from inflate.errors import ConfigError
from inflate.families.i2vgen_xl_refiner import FAMILY, Clips, Refiner
from inflate.training.adapting import Adapting
from inflate.training.denoising import Given
from inflate.training.held_out import join
from inflate.training.i2vgen_xl import I2VGenXLSettings
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.refinement import RefinementPreview, RefinementTask, shrunk
from inflate.training.settings import Training

NEGATIVE = "a box"
LEVELS = 300


@pytest.fixture
def family(tmp_path: Path) -> Refiner:
    return made(tmp_path / "parent")


def made(folder: Path) -> Refiner:
    """The same model each time, trained on few levels."""
    torch.manual_seed(5)
    family = refiner(folder)
    family.clips = replace(family.clips, levels=LEVELS, negative=NEGATIVE)
    return family


def make(
    family: Refiner, cached: bool = False, adapter: Adapting | None = None, gamma: float = 1.0, **settings: Any
) -> RefinementTask:
    small = I2VGenXLSettings(**{"held_out_clips": 2, "bands": 2, "preview_clips": 2, "drop_text": 0.0, **settings})
    held_out = [clip(number) for number in (100, 101)]
    given = Given(held_out, lr=1e-3, seed=3, cached=cached, adapter=adapter)
    return RefinementTask(family, small, RefinementPreview(steps=1), given, gamma)


def training(output: Path, steps: int = 2, **changes: Any) -> Training:
    quiet = {"workers": 0, "tracker": "none", "progress": False, "batch": 2, "lr": 1e-2}
    return Training(output, steps=steps, **quiet | changes)


def test_the_loss_is_the_objective_below_the_highest_level_with_the_offset(family: Refiner) -> None:
    task, data = make(family), join([clip(0), clip(1)])
    noise, clean = Noise(3, data["number"]), family.encode(data["pixels"])
    timestep = (LEVELS * noise.uniform("timestep")).long()
    drawn = noise.normal("noise", *clean.shape[1:]) + 0.1 * noise.normal("noise offset", *clean.shape[1:3], 1, 1)
    predict = family.predict(family.embed([PROMPT] * 2))
    loss, logs = task.loss(data, noise, 0)
    torch.testing.assert_close(loss, family.objective.loss(predict, clean, timestep, drawn).mean(1))
    assert list(logs) == ["loss at timestep 0-149", "loss at timestep 150-299"]


@pytest.mark.parametrize("power", [1.0, 0.3])
def test_no_timestep_is_drawn_from_the_highest_level_on(family: Refiner, power: float) -> None:
    task = make(family, timestep_power=power)
    draws = torch.cat([torch.linspace(0, 1, 1001)[:-1], torch.tensor([1.0 - 2.0**-24])])
    steps = task.timestep_of(draws)
    assert int(steps.min()) == 0
    assert int(steps.max()) == LEVELS - 1
    assert task.middles == [75, 225]
    family.clips = replace(family.clips, levels=600)  # at which rounding would give 600
    assert int(task.timestep_of(draws).max()) == 599


def test_a_dropped_text_is_the_negative_prompt(family: Refiner) -> None:
    task, data = make(family, drop_text=0.5), join([clip(number) for number in range(4)])
    noise, clean = Noise(3, data["number"]), family.encode(data["pixels"])
    dropped = noise.uniform("drop") < 0.5
    assert 0 < dropped.sum() < 4
    told = task.trained_condition(data, clean, torch.zeros(4), noise, 0).context
    torch.testing.assert_close(told[dropped], family.embed([NEGATIVE] * int(dropped.sum())).context)
    torch.testing.assert_close(told[~dropped], family.embed([PROMPT] * int((~dropped).sum())).context)


def test_the_image_models_layers_learn_at_gamma(family: Refiner) -> None:
    rates = make(family, gamma=0.2).players[0].rates
    assert set(rates.values()) == {0.2}
    others = family.unet.state_dict().keys() - rates.keys()
    assert all(".temporal." in name or name.startswith("time_embedding.") for name in others)


def test_what_text_and_temporal_layers_are_worth_is_told(family: Refiner) -> None:
    told = make(family).evaluate()
    parts = [name.split(", ")[1] for name in told if "," in name]
    assert parts == ["temporal layers bypassed", "without text"]
    assert len({told[f"held-out loss, {part}"] for part in parts} | {told["held-out loss"]}) == 3


def test_a_run_shows_and_exports_what_it_trained(family: Refiner, tmp_path: Path) -> None:
    family.clips = I2VGenXLSettings(levels=200).clips(family.clips, Bucket(FRAMES, SIDE, SIDE), 8.0)
    result = fit(make(family, cached=True), CachedClips(family), training(tmp_path / "run"))  # type: ignore[arg-type]
    shown = tmp_path / "run" / "samples" / "step-000002"
    assert (shown / "prompts.txt").read_text() == f"00 {PROMPT}\n01 {PROMPT}\n"
    assert video.probe(shown / "01.mp4").frames == FRAMES
    assert (shown / "sheet.png").stat().st_size > 0
    scores = (shown / "scores.json").read_text()
    assert all(f'"sharpness, {what}"' in scores for what in ("sample", "enlarged"))
    assert result.export is not None
    loaded = Refiner.load(result.export)
    assert loaded.clips == Clips(FRAMES, 8.0, SIDE, SIDE, levels=200, negative=NEGATIVE)
    trained = family.unet.state_dict()
    assert all(torch.equal(value, trained[name].cpu()) for name, value in loaded.unet.state_dict().items())


def test_a_preview_begins_with_clips_shrunk_and_enlarged(family: Refiner) -> None:
    (_, clips, scores), *_ = make(family).drawn()
    assert [*clips] == ["truth", "enlarged", "sample"]
    assert len({clip.shape for clip in clips.values()}) == 1
    flat = torch.nn.functional.avg_pool2d
    truth, small = (flat(clips[name].flatten(0, 1), 4) for name in ("truth", "enlarged"))
    assert (truth - small).abs().mean() < (clips["truth"] - clips["enlarged"]).abs().mean() / 3
    assert scores["sharpness, enlarged"] < 0.5
    assert shrunk(clips["truth"], 4).shape[-2:] == (SIDE // 4, SIDE // 4)


def quick(family: Refiner, **settings: Any) -> RefinementTask:
    """A task that looks at one clip, and draws none."""
    task = make(family, cached=True, held_out_clips=1, bands=1, **settings)
    task.preview = lambda folder: None  # type: ignore[method-assign]
    return task


@pytest.mark.usefixtures("on_cpu")
def test_a_lora_is_proved_by_loading_it_on_its_base(tmp_path: Path) -> None:
    made(tmp_path / "parent").save_pretrained(tmp_path / "base")
    family = Refiner.load(tmp_path / "base")
    wanted = AdapterSettings("lora", rank=2, targets=["attn2.to_v", "temporal.attn1.to_q"])
    adapter = Adapting.on(family.unet, wanted, FAMILY, str(tmp_path / "base"), seed=3)
    fit(quick(family, adapter=adapter), CachedClips(family), training(tmp_path / "run"))  # type: ignore[arg-type]
    path = tmp_path / "run" / "export" / file.NAME
    found = verify.check(path, Refiner.load(tmp_path / "base").unet)
    assert found.max_abs_diff <= verify.TOLERANCE
    assert found.effect > 1e-4


def test_there_is_nothing_to_refine_of_what_is_not_shrunk() -> None:
    with pytest.raises(ConfigError, match=r"refining\.shrink=1"):
        RefinementPreview(shrink=1)
