"""Text-to-video training on a tiny model: what a step computes, what a stage trains, what is measured and shown."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_video_ldm import FRAMES, PROMPT, SIDE, CachedClips, clip, write_sdxl, write_text_model

from helpers import randomise
from inflate.data import video
from inflate.errors import ConfigError, DataError
from inflate.families.video_ldm import VideoLDM
from inflate.models.text_encoders import TextCondition
from inflate.training.captions import without_text
from inflate.training.denoising import Given
from inflate.training.encoding import TextClipEncoder
from inflate.training.held_out import join
from inflate.training.loop import fit
from inflate.training.noise import Noise
from inflate.training.settings import Training
from inflate.training.text_to_video import Preview, Stage, TextToVideo, TextToVideoTask

STAGES: tuple[Stage, ...] = ("spatial", "temporal", "joint")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("image"), prediction_type="v_prediction")


@pytest.fixture
def family(folder: Path) -> VideoLDM:
    made = VideoLDM.load(folder)
    randomise(made.unet)
    return made


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def sdxl(sdxl_folder: Path) -> VideoLDM:
    made = VideoLDM.load(sdxl_folder)
    randomise(made.unet)
    return made


def make(family: VideoLDM, stage: Stage = "temporal", cached: bool = False, **settings: Any) -> TextToVideoTask:
    small = TextToVideo(**{"held_out_clips": 2, "bands": 2, "preview_clips": 2, "drop_caption": 0.0, **settings})
    held_out = [clip(100), clip(101)]
    given = Given(held_out, lr=1e-3, seed=3, cached=cached)
    return TextToVideoTask(family, stage, small, Preview(steps=1), given)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_loss_is_the_objective_at_one_timestep_per_clip(family: VideoLDM, power: float) -> None:
    task, data = make(family, timestep_power=power), join([clip(0), clip(1)])
    noise = Noise(3, data["number"])
    loss, logs = task.loss(data, noise, 0)
    timestep, clean = (1000 * noise.uniform("timestep") ** power).long(), family.encode(data["pixels"])
    predict = family.predict(family.embed([PROMPT] * 2))
    frames = family.objective.loss(predict, clean, timestep, noise.normal("noise", *clean.shape[1:]))
    torch.testing.assert_close(loss, frames.mean(1))
    assert list(logs) == ["loss at timestep 0-499", "loss at timestep 500-999"]
    low, high = logs.values()
    assert low.chosen.tolist() == (timestep < 500).repeat_interleave(FRAMES).tolist()
    assert torch.equal(high.chosen, ~low.chosen)


def test_the_spatial_stage_draws_a_timestep_per_frame_and_bypasses_temporal_layers(family: VideoLDM) -> None:
    task, data = make(family, "spatial"), clip(0)
    noise = Noise(3, data["number"])
    loss, _ = task.loss(data, noise, 0)
    timestep = (1000 * noise.uniform("timestep", FRAMES)).long()
    assert len(set(timestep[0].tolist())) == FRAMES
    clean, drawn = family.encode(data["pixels"]), noise.normal("noise", FRAMES, 4, 8, 8)
    predict = family.predict(family.embed([PROMPT]), image_only=True)
    torch.testing.assert_close(loss, family.objective.loss(predict, clean, timestep, drawn).mean(1))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["family", "sdxl"])
def test_each_stage_trains_its_own_layers(
    kind: str, stage: Stage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family: VideoLDM = request.getfixturevalue(kind)
    before = {name: value.clone() for name, value in family.unet.state_dict().items()}
    task = make(family, stage, cached=True)
    settings = Training(tmp_path / "run", steps=2, batch=2, workers=0, lr=1e-2, tracker="none", progress=False)
    fit(task, CachedClips(family), settings)
    changed = {name for name, value in family.unet.state_dict().items() if not torch.equal(value.cpu(), before[name])}
    temporal = family.unet.temporal_parameters().keys()
    assert bool(changed & temporal) == (stage != "spatial")
    assert bool(changed - temporal) == (stage != "temporal")


def test_a_run_shows_and_exports_what_it_trained(family: VideoLDM, tmp_path: Path) -> None:
    task = make(family, cached=True, train_clips=0)
    settings = Training(tmp_path / "run", steps=2, batch=2, workers=0, lr=1e-2, tracker="none", progress=False)
    result = fit(task, CachedClips(family), settings)
    names = ["held-out loss", "held-out loss at timestep 250", "held-out loss at timestep 750"]
    assert [name for name in result.held_out[-1] if "bypassed" not in name and name != "step"] == names
    shown = tmp_path / "run" / "samples" / "step-000002"
    assert (shown / "prompts.txt").read_text() == f"00 {PROMPT}\n01 {PROMPT}\n"
    assert video.probe(shown / "01.mp4").frames == FRAMES
    assert (shown / "sheet.png").stat().st_size > 0
    assert result.export is not None
    loaded = VideoLDM.load(result.export)
    mixes = [(n, p) for n, p in task.family.unet.temporal_parameters().items() if n.endswith("mix")]
    assert mixes
    for name, value in mixes:
        assert torch.equal(loaded.unet.temporal_parameters()[name], value)


@pytest.mark.parametrize("kind", ["family", "sdxl"])
def test_what_is_cached_gives_the_loss_of_what_is_encoded(kind: str, request: pytest.FixtureRequest) -> None:
    family: VideoLDM = request.getfixturevalue(kind)
    task, cached = make(family, drop_caption=0.5), CachedClips(family)
    whole = join([clip(0), clip(1)])
    stacked = {name: torch.stack([cached[n][name] for n in (0, 1)]) for name in cached[0]}
    noise = Noise(3, whole["number"])
    torch.testing.assert_close(task.loss(stacked, noise, 0)[0], task.loss(whole, noise, 0)[0])


def test_dropped_captions_are_the_empty_prompt(family: VideoLDM) -> None:
    task, batch = make(family, drop_caption=0.5), join([clip(number) for number in range(4)])
    noise, clean = Noise(3, batch["number"]), family.encode(batch["pixels"])
    dropped, condition = noise.uniform("drop") < 0.5, task.condition(batch, clean, noise)
    assert 0 < dropped.sum() < 4
    told = task.trained_condition(batch, clean, torch.zeros(4), noise, 0).context
    torch.testing.assert_close(told[dropped], family.embed([""]).context.expand(int(dropped.sum()), -1, -1))
    assert torch.equal(told[~dropped], condition.context[~dropped])


FIRST = torch.tensor([True, False])


def told(task: TextToVideoTask, batch: dict[str, Any]) -> TextCondition:
    return task.condition(batch, torch.empty(0), Noise(3, batch["number"]))


def test_a_dropped_caption_keeps_the_frame_rate_of_its_clip(family: VideoLDM) -> None:
    task, batch = make(family), join([clip(0), clip(1)])
    condition = told(task, {**batch, "fps": torch.tensor([24.0, 12.0])})
    dropped = without_text(condition, FIRST, task.nothing)
    assert dropped.fps is not None
    assert dropped.fps.tolist() == [24.0, 12.0]


def test_a_dropped_caption_keeps_the_sizes_of_its_clip(sdxl: VideoLDM) -> None:
    task, batch = make(sdxl), join([clip(0), clip(1)])
    condition = told(task, {**batch, "origin": torch.tensor([[64, 96, 0, 3], [16, 16, 0, 0]])})
    dropped = without_text(condition, FIRST, task.nothing)
    assert dropped.pooled is not None
    assert condition.pooled is not None
    assert dropped.origin is condition.origin
    assert not dropped.context[0].any()
    assert not dropped.pooled[0].any()
    assert torch.equal(dropped.context[1], condition.context[1])
    assert torch.equal(dropped.pooled[1], condition.pooled[1])


def test_the_loss_is_told_the_sizes_of_the_source(sdxl: VideoLDM) -> None:
    task, batch = make(sdxl), clip(0)
    losses = [
        task.loss({**batch, "origin": torch.tensor([origin])}, Noise(3, batch["number"]), 0)[0]
        for origin in ([SIDE, SIDE, 0, 0], [480, 640, 0, 3])
    ]
    assert torch.equal(losses[0], task.loss(batch, Noise(3, batch["number"]), 0)[0])
    assert not torch.allclose(*losses, atol=1e-5)


@pytest.mark.parametrize("place", [0, 1])
def test_another_text_encoder_or_padding_is_another_entry_of_a_cache(sdxl: VideoLDM, place: int) -> None:
    seen = [dict(TextClipEncoder(sdxl, "float32").identity)]
    with torch.no_grad():
        next(sdxl.text.networks[place].parameters()).view(-1)[0] += 1e-3
    seen.append(dict(TextClipEncoder(sdxl, "float32").identity))
    sdxl.text.tokenizers[place].pad_token = sdxl.text.tokenizers[place].convert_ids_to_tokens(5)
    seen.append(dict(TextClipEncoder(sdxl, "float32").identity))
    sdxl.text = replace(sdxl.text, zeros_for_empty=False)
    seen.append(dict(TextClipEncoder(sdxl, "float32").identity))
    assert all(one != another for number, one in enumerate(seen) for another in seen[number + 1 :])


def test_a_run_on_stable_diffusion_xl_shows_what_it_trains(sdxl: VideoLDM, tmp_path: Path) -> None:
    make(sdxl).preview(tmp_path)
    assert video.probe(tmp_path / "01.mp4").frames == FRAMES


def test_images_bypass_the_temporal_layers(family: VideoLDM) -> None:
    task, image = make(family, "joint"), clip(0, frames=1)
    loss = task.loss(image, Noise(3, image["number"]), 0)[0]
    for value in family.unet.temporal_parameters().values():
        value.data.add_(1.0)
    assert torch.equal(task.loss(image, Noise(3, image["number"]), 0)[0], loss)


def test_held_out_losses_are_told_with_the_temporal_layers_bypassed(family: VideoLDM) -> None:
    told = make(family).evaluate()
    assert told["held-out loss"] != told["held-out loss, temporal layers bypassed"]
    levels = [told[f"held-out loss at timestep {level}"] for level in (250, 750)]
    assert told["held-out loss"] == pytest.approx(sum(levels) / 2)
    assert make(family).evaluate() == told


@pytest.mark.parametrize("changes", [{"drop_caption": 1.5}, {"timestep_power": 0.0}, {"bands": 0}, {"train_clips": -1}])
def test_settings_out_of_range_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="text_to_video"):
        TextToVideo(**{**asdict(TextToVideo()), **changes})


def test_a_run_needs_held_out_clips(family: VideoLDM) -> None:
    with pytest.raises(DataError, match="held-out"):
        TextToVideoTask(family, "temporal", TextToVideo(), Preview(), Given([], lr=1e-3, seed=3))
