"""Text-to-video sampling: at birth it is the image model's, and clips depend on their own seeds."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from tiny_video_ldm import PROMPT, parents, write_text_model

from helpers import randomise
from inflate.errors import ConfigError
from inflate.families.video_ldm import Clips, VideoLDM
from inflate.models.text_encoders import TextCondition
from inflate.objectives import Predict
from inflate.sampling import text_to_video
from inflate.sampling.text_to_video import Sampling, initial_noise, sample, sample_latents

SCHEDULE = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}
EPSILON = {**SCHEDULE, "prediction_type": "epsilon"}
V = {
    **SCHEDULE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"
}  # fmt: skip
NEGATIVE = "a box"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_model(tmp_path_factory.mktemp("image"), **V)


@pytest.fixture(scope="module")
def family(folder: Path) -> VideoLDM:
    made = VideoLDM.load(folder)
    randomise(made.unet)
    made.clips = Clips(3, 8.0, 16, 16)
    return made


def image_pipeline(folder: Path, kind: Any) -> StableDiffusionPipeline:
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    family, scheduler = VideoLDM.load(folder), kind.from_pretrained(folder / "scheduler")
    text = {"text_encoder": family.text.networks[0], "tokenizer": family.text.tokenizers[0]}
    parts = {"vae": family.vae, **text}
    pipeline = StableDiffusionPipeline(unet=parents(folder)[0], scheduler=scheduler, **parts, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("sampler", "kind"), [("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler)])
@pytest.mark.parametrize("settings", [V, EPSILON], ids=["v", "epsilon"])
def test_every_frame_of_a_newborn_is_the_image_models_sample(
    tmp_path: Path, sampler: Any, kind: Any, settings: dict[str, Any]
) -> None:
    folder = write_text_model(tmp_path, **settings)
    family, image = VideoLDM.load(folder), torch.randn(1, 4, 8, 8)
    wanted = Sampling(steps=4, guidance=3.0, negative=NEGATIVE, sampler=sampler)
    noise = image[:, None].expand(-1, 3, -1, -1, -1)  # (1, 3, 4, 8, 8)
    clip = sample_latents(family, [PROMPT], noise, wanted)
    pipeline = image_pipeline(folder, kind)
    theirs = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, guidance_scale=3.0, latents=image, output_type="latent"
    ).images
    for frame in range(3):
        torch.testing.assert_close(clip[:, frame], theirs, atol=2e-5, rtol=1e-4)


def test_a_clip_depends_on_its_own_seed(family: VideoLDM) -> None:
    settings = Sampling(steps=2)
    both = sample(family, [PROMPT, PROMPT], [5, 6], settings)
    assert both.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(sample(family, [PROMPT], [6], settings), both[1:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(both[0], both[1])


def test_batches_draw_the_clips_that_are_drawn_one_by_one(family: VideoLDM, monkeypatch: pytest.MonkeyPatch) -> None:
    family, sizes = copy.deepcopy(family), list[int]()
    for network in family.networks:
        network.double()  # rounding depends on the batch, and guidance multiplies it
    predict = family.predict

    def counting(condition: TextCondition) -> Predict:
        sizes.append(len(condition.context) // 2)  # without and with the prompt
        return predict(condition)

    monkeypatch.setattr(family, "predict", counting)
    prompts, seeds = [PROMPT, NEGATIVE, PROMPT], [5, 6, 7]
    alone, pairs, together = (
        sample(family, prompts, seeds, Sampling(steps=2, batch=batch, sampler="euler")) for batch in (1, 2, None)
    )
    assert sizes == [1, 1, 1, 2, 1, 3]
    torch.testing.assert_close(pairs, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    monkeypatch.setattr(text_to_video, "TOGETHER", 2 * 3 * 16 * 16)
    sample(family, prompts, seeds, Sampling(steps=1))
    assert sizes[6:] == [2, 1]


def test_passes_in_turn_draw_the_clip_of_passes_together(family: VideoLDM) -> None:
    family, batches = copy.deepcopy(family), list[int]()
    for network in family.networks:
        network.double()
    family.unet.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    noise, wanted = initial_noise(family, [0], Sampling()), Sampling(2, guidance=3.0, negative=NEGATIVE)
    drawn = [sample_latents(family, [PROMPT], noise, replace(wanted, little_memory=one)) for one in (True, False, None)]
    torch.testing.assert_close(drawn[0], drawn[1], atol=1e-10, rtol=1e-10)
    assert torch.equal(drawn[2], drawn[1])
    assert batches == [1] * 4 + [2] * 4


@pytest.mark.parametrize("change", [{"guidance": 1.0}, {"guidance": 3.0}, {"negative": NEGATIVE}, {"sampler": "euler"}])
def test_settings_change_the_clip(family: VideoLDM, change: dict[str, Any]) -> None:
    noise = initial_noise(family, [0], Sampling())
    usual, other = (sample_latents(family, [PROMPT], noise, one) for one in (Sampling(2), Sampling(2, **change)))
    assert bool(other.isfinite().all())
    assert not torch.allclose(usual, other, atol=1e-4)


def test_length_and_size_can_be_chosen(family: VideoLDM) -> None:
    settings = Sampling(steps=1, frames=2, height=8, width=32)
    assert sample(family, [PROMPT], [0], settings).shape == (1, 2, 3, 8, 32)
    with pytest.raises(ConfigError, match="multiples of 2"):
        sample(family, [PROMPT], [0], Sampling(height=7))
    with pytest.raises(ConfigError, match=r"steps \(0\) and batch \(-1\) must be at least 1"):
        Sampling(steps=0, batch=-1)


def test_progress_wraps_the_steps(family: VideoLDM) -> None:
    seen: list[int] = []

    def watch(steps: Any) -> Any:
        seen.append(len(steps))
        return steps

    sample(family, [PROMPT], [0], Sampling(steps=3), watch)
    assert seen == [3]
