"""Text-to-video on Stable Diffusion XL, against diffusers' pipeline: prompts, sizes, schedule, export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline
from tiny_video_ldm import PROMPT, write_sdxl

from helpers import randomise, tiny_unet
from inflate.errors import CheckpointError
from inflate.families.video_ldm import Clips, Encoders, VideoLDM
from inflate.models.text_encoders import TextCondition
from inflate.sampling.text_to_video import Sampling, sample_latents

FRAMES = 3
NEGATIVE = "a box"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sdxl(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusionXLPipeline:
    made = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def output(family: VideoLDM, prompts: list[str]) -> torch.Tensor:
    latents = torch.randn(len(prompts), FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return family.predict(family.embed(prompts))(latents, torch.tensor([10, 900]))


def test_prompts_are_told_as_diffusers_does(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    prompts, negatives = [PROMPT, "a box left of a disc"], [NEGATIVE, "over " * 100]
    theirs = pipeline.encode_prompt(prompts, negative_prompt=negatives, device="cpu")
    encoders = Encoders.load(folder)
    for each, context, pooled in ((prompts, theirs[0], theirs[2]), (negatives, theirs[1], theirs[3])):
        ours = encoders.embed(each)
        assert ours.pooled is not None
        torch.testing.assert_close(ours.context, context, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.pooled, pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_is_the_null_condition(tmp_path: Path, zeros: bool) -> None:
    folder = write_sdxl(tmp_path / "image", force_zeros_for_empty_prompt=zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    _, context, _, pooled = pipeline.encode_prompt(PROMPT, device="cpu")
    family = VideoLDM.load(folder)
    family.save_pretrained(tmp_path / "export")
    for one in (family, VideoLDM.load(tmp_path / "export"), Encoders.load(tmp_path / "export")):
        ours = one.embed([PROMPT, ""])
        assert ours.pooled is not None
        torch.testing.assert_close(ours.context[1:], context, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.pooled[1:], pooled, atol=1e-6, rtol=0)
        assert bool(ours.context[1].any()) is not zeros


def test_a_newborn_predicts_what_the_image_model_does(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    family, latents = VideoLDM.load(folder), torch.randn(2, FRAMES, 4, 8, 6)
    steps = torch.tensor([[0, 10, 999], [5, 500, 900]])
    text = family.embed([PROMPT, NEGATIVE])
    assert text.pooled is not None
    sizes = pipeline._get_add_time_ids((16, 12), (0, 0), (16, 12), torch.float32, 16).expand(2, -1)
    assert torch.equal(family.added(text, latents)["added_cond_kwargs"]["time_ids"][::FRAMES], sizes)
    added = {"text_embeds": text.pooled.repeat_interleave(FRAMES, 0), "time_ids": sizes.repeat_interleave(FRAMES, 0)}
    with torch.no_grad():
        ours = family.predict(text)(latents, steps).flatten(0, 1)
        context = text.context.repeat_interleave(FRAMES, 0)
        theirs = pipeline.unet(latents.flatten(0, 1), steps.flatten(), context, added_cond_kwargs=added).sample
    assert float((ours - theirs).abs().max()) <= 1e-5


def test_sizes_are_the_sources_its_cut_and_the_clips(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    family, latents = VideoLDM.load(folder), torch.randn(1, FRAMES, 4, 8, 6)
    text = family.embed([PROMPT])
    condition = TextCondition(text.context, text.pooled, torch.tensor([[480, 640, 0, 5]]))
    ours = family.added(condition, latents)["added_cond_kwargs"]["time_ids"]
    assert torch.equal(ours[:1], pipeline._get_add_time_ids((480, 640), (0, 5), (16, 12), torch.float32, 16))
    with torch.no_grad():
        outputs = [family.predict(each)(latents, torch.tensor([500])) for each in (text, condition)]
    assert not torch.allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("negative", [None, NEGATIVE])
def test_every_frame_of_a_newborn_is_the_image_models_sample(
    folder: Path, pipeline: StableDiffusionXLPipeline, negative: str | None
) -> None:
    image, family = torch.randn(1, 4, 8, 8), VideoLDM.load(folder)
    noise = image[:, None].expand(-1, FRAMES, -1, -1, -1)
    wanted = Sampling(steps=4, guidance=3.0, negative=negative or "", sampler="euler")
    clip = sample_latents(family, [PROMPT], noise, wanted)
    theirs = pipeline(
        PROMPT, negative_prompt=negative, num_inference_steps=4, guidance_scale=3.0, latents=image, height=16, width=16,
        output_type="latent",
    ).images  # fmt: skip
    for frame in range(FRAMES):
        torch.testing.assert_close(clip[:, frame], theirs, atol=2e-5, rtol=1e-4)


def test_the_schedule_is_the_image_models(folder: Path) -> None:
    ours = VideoLDM.load(folder).scheduler("euler")
    theirs = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert int(ours.timesteps[-1]) == 1, "the offset of the published models"


def test_an_export_is_loaded_as_it_was(folder: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(folder)
    randomise(family.unet)
    family.clips = Clips(FRAMES, 7.0, 16, 24)
    family.save_pretrained(tmp_path / "export")
    loaded = VideoLDM.load(tmp_path / "export")
    assert torch.equal(output(loaded, [PROMPT, ""]), output(family, [PROMPT, ""]))
    assert not torch.allclose(output(loaded, [PROMPT, ""]), output(VideoLDM.load(folder), [PROMPT, ""]))


def test_temporal_layers_are_kept_alone_over_their_image_model(folder: Path, tmp_path: Path) -> None:
    family = VideoLDM.load(folder)
    for parameter in family.unet.temporal_parameters().values():
        parameter.data.copy_((parameter + 0.05 * torch.randn(parameter.shape)).half())
    family.save_temporal(tmp_path / "alone", str(folder))
    assert torch.equal(output(VideoLDM.load(tmp_path / "alone"), [PROMPT, ""]), output(family, [PROMPT, ""]))


def test_frozen_networks_stay_in_float32(folder: Path, tmp_path: Path) -> None:
    """Where XL's autoencoder overflows in half precision."""
    copy = tmp_path / "half"
    shutil.copytree(folder, copy)
    AutoencoderKL.from_pretrained(copy / "vae").half().save_pretrained(copy / "vae")
    family = VideoLDM.load(copy)
    assert {next(network.parameters()).dtype for network in family.networks} == {torch.float32}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"addition_time_embed_dim": 4}, "have 40 dimensions but the UNet adds 64"),
        ("unet", {"addition_embed_type": "image"}, "the UNet adds image"),
        ("unet", {"addition_embed_type": None}, "belong together"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder: Path, part: str, changes: dict[str, Any], message: str) -> None:
    family = VideoLDM.load(folder)
    family.unet.register_to_config(**changes)
    with pytest.raises(CheckpointError, match=message):
        VideoLDM(family.unet, family.vae, family.text, family.noise, family.clips)


def test_a_second_encoder_without_its_unet_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    tiny_unet(True, cross_attention_dim=96).save_pretrained(copy / "unet")
    with pytest.raises(CheckpointError, match="belong together"):
        VideoLDM.load(copy)


def test_a_missing_second_tokenizer_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(CheckpointError, match="tokenizer_2 is missing"):
        Encoders.load(copy)
    assert json.loads((copy / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True
