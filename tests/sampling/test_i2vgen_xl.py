"""Sampling I2VGen-XL's base stage: what each pass is told, VGen's timesteps, clips of their own seeds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_i2vgen_xl import base
from tiny_video_ldm import FRAMES, PROMPT, SIDE
from torch import Tensor

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.layers.hierarchy import Hierarchy
from inflate.models.precision import cast
from inflate.sampling.animators import latent_shape
from inflate.sampling.ddim import standard_normal
from inflate.sampling.i2vgen_xl import Sampling, conditions_of, sample, sample_latents, sampler_of

OTHER = "a box"
TWO = [PROMPT, OTHER]
CLIP_ALONE = Hierarchy(embedding=8, clip_tokens=2, detail_encoder=False, global_encoder=False)


def double(model: I2VGenXL) -> I2VGenXL:
    for network in model.networks:
        network.double()
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> I2VGenXL:
    return double(base(tmp_path_factory.mktemp("model")))


def pictures(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 2 - 1


def settings(**changes: Any) -> Sampling:
    return Sampling(**{"steps": 2, **changes})


def latents_of(model: I2VGenXL, wanted: Sampling, prompt: str = PROMPT) -> Tensor:
    """Of one image and seed."""
    images = pictures(1)
    noise = standard_normal([3], latent_shape(model, images, wanted.frames), images)
    return sample_latents(model, conditions_of(model, images, [prompt], wanted), noise, wanted)


def test_a_clip_depends_on_its_own_seed(model: I2VGenXL) -> None:
    both = sample(model, pictures(), TWO, [5, 6], settings())
    assert both.shape == (2, FRAMES, 3, SIDE, SIDE)
    assert both.dtype == torch.float32
    assert not both.requires_grad
    torch.testing.assert_close(sample(model, pictures()[1:], [OTHER], [6], settings()), both[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(sample(model, pictures()[1:], [OTHER], [5], settings()), both[1:], atol=1e-2)
    one_by_one = sample(model, pictures(), TWO, [5, 6], settings(batch=1))
    torch.testing.assert_close(one_by_one, both, atol=1e-5, rtol=0)


def test_guidance_leads_away_from_the_negative_prompt_without_clip(model: I2VGenXL) -> None:
    images = pictures()
    away, full = conditions_of(model, images, TWO, settings(negative=OTHER, fps=5.0))
    assert full.latents is not None
    assert full.embedding is not None
    assert away.embedding is not None
    assert torch.equal(full.text, model.embed(TWO).context)
    assert torch.equal(away.text, model.embed([OTHER, OTHER]).context)
    assert torch.equal(full.embedding, model.embed_image(images))
    assert away.embedding.shape == full.embedding.shape
    assert not away.embedding.any()
    for each in (away, full):
        assert torch.equal(each.latents, model.encode(images[:, None])[:, 0])
        assert each.fps.tolist() == [5.0, 5.0]
    (only,) = conditions_of(model, images, TWO, settings(guidance=1.0))
    assert torch.equal(only.text, full.text)
    assert only.fps.tolist() == [model.clips.fps] * 2


def test_the_usual_negative_prompt_is_that_of_training(model: I2VGenXL) -> None:
    images = pictures(1)
    for told, expected in (("", ""), (OTHER, OTHER)):
        trained = replace(model, clips=replace(model.clips, negative=told))
        away, _ = conditions_of(trained, images, [PROMPT], settings())
        assert torch.equal(away.text, model.embed([expected]).context)


def test_a_model_without_prompts_is_told_the_image_alone(model: I2VGenXL) -> None:
    silent = replace(model, clips=replace(model.clips, prompts=False))
    away, full = conditions_of(silent, pictures(), ["", ""], settings())
    assert full.text.shape == away.text.shape == (2, 0, model.text.width)
    assert torch.isfinite(sample(silent, pictures(), ["", ""], [1, 2], settings())).all()
    for told in ({"negative": OTHER}, {}):
        with pytest.raises(ConfigError, match="told images alone: leave prompts out"):
            sample(silent, pictures(), ["", "" if told else PROMPT], [1, 2], settings(**told))


def test_a_model_of_clips_tokens_alone_encodes_no_latents(tmp_path: Path) -> None:
    model = double(base(tmp_path, CLIP_ALONE))
    assert conditions_of(model, pictures(), TWO)[-1].latents is None
    drawn = [sample(model, each, TWO, [1, 1], settings()) for each in (pictures(), pictures(seed=1))]
    assert not torch.allclose(*drawn, atol=1e-4)


def test_timesteps_are_vgens(model: I2VGenXL) -> None:
    published = sampler_of(model, Sampling()).timesteps().tolist()
    assert published == [1 + step for step in range(980, -1, -20)]
    assert sampler_of(model, Sampling(spacing="trailing")).timesteps()[0] == 999


def test_from_pure_noise_clips_are_finite(model: I2VGenXL) -> None:
    assert model.objective.zero_terminal_snr
    drawn = latents_of(model, settings(spacing="trailing", steps=3))
    assert torch.isfinite(drawn).all()


@pytest.mark.parametrize(
    "change",
    [
        {"eta": 1.0}, {"guidance": 1.0}, {"guidance": 3.0}, {"rescale": 0.7}, {"negative": OTHER}, {"fps": 24.0},
        {"spacing": "trailing"}, {"start": 700}, {"offset": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_settings_change_the_clip(model: I2VGenXL, change: dict[str, Any]) -> None:
    usual, other = (latents_of(model, each) for each in (settings(), settings(**change)))
    assert torch.isfinite(other).all()
    assert not torch.allclose(usual, other, atol=1e-4)


def test_passes_in_turn_draw_the_clip_of_passes_together(model: I2VGenXL) -> None:
    model, sizes = copy.deepcopy(model), list[int]()
    model.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    turn, together, usual = (latents_of(model, settings(little_memory=each)) for each in (True, False, None))
    torch.testing.assert_close(turn, together, atol=1e-10, rtol=1e-10)
    assert torch.equal(usual, together)
    assert sizes == [1] * 4 + [2] * 4


def test_an_offset_shifts_each_frame_and_channel(model: I2VGenXL) -> None:
    inputs = list[Tensor]()
    handle = model.unet.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    for offset in (0.0, 0.5):
        latents_of(model, settings(steps=1, offset=offset, guidance=1.0))
    handle.remove()
    shift = inputs[1] - inputs[0]
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), atol=1e-12, rtol=0)
    assert shift[0, :, :, 0, 0].unique().numel() == FRAMES * 4


def test_length_and_size_can_be_chosen(model: I2VGenXL) -> None:
    wide = torch.zeros(1, 3, 8, 24, dtype=torch.float64)
    assert sample(model, wide, [PROMPT], [0], settings(frames=5)).shape == (1, 5, 3, 8, 24)
    assert sample(model, wide, [PROMPT], [0], settings(frames=1)).shape == (1, 1, 3, 8, 24)


def test_a_network_in_half_precision_draws_a_finite_clip(model: I2VGenXL) -> None:
    half = copy.deepcopy(model)
    cast(half.parts.values(), "bfloat16")
    clip = sample(half, pictures(1).float(), [PROMPT], [0], settings())
    assert clip.dtype == torch.float32
    assert torch.isfinite(clip).all()


def test_progress_wraps_the_steps_of_evaluating_networks(model: I2VGenXL) -> None:
    model, seen, modes = copy.deepcopy(model), list[int](), list[bool]()
    model.unet.train()
    model.unet.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    sample(model, pictures(1), [PROMPT], [0], settings(steps=3), lambda steps: seen.append(len(steps)) or steps)
    assert seen == [3]
    assert modes == [False] * 3
    assert model.unet.training


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0, "batch": -1}, r"steps \(0\) and batch \(-1\) must be at least 1"),
        ({"frames": 0}, r"frames \(0\)"),
        ({"rescale": 1.5}, "rescale is 1.5"),
        ({"offset": -0.1}, r"offset is -0.1: it must be 0 \(none\) or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sampling(**wrong)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_drawn(model: I2VGenXL) -> None:
    images, usual = pictures(), settings()
    with pytest.raises(ConfigError, match="steps is 1001"):
        sample(model, images, TWO, [1, 2], replace(usual, steps=1001))
    with pytest.raises(ConfigError, match="multiples of 2"):
        sample(model, images[..., 1:], TWO, [1, 2], usual)
    with pytest.raises(ConfigError, match="2 images, 2 prompts and 1 seeds"):
        sample(model, images, TWO, [1], usual)
