"""Sampling DynamiCrafter: what each pass is told, clips of their own seeds, ends and loops."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_dynamicrafter import FRAMES, SIDE, family
from tiny_video_ldm import PROMPT
from torch import Tensor

from inflate.errors import ConfigError
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.models.moments import LatentMoments
from inflate.models.precision import cast
from inflate.sampling import animators
from inflate.sampling.animators import latent_shape
from inflate.sampling.ddim import standard_normal
from inflate.sampling.dynamicrafter import Sampling, conditions_of, sample, sample_latents, sampler_of
from inflate.sampling.steps import guided

OTHER = "a box"
TWO = [PROMPT, OTHER]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DynamiCrafter:
    return family(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> DynamiCrafter:
    """A model of the second stage, without the detail latent, that predicts the noise."""
    return family(tmp_path_factory.mktemp("alone"), detail=False, prediction_type="epsilon")


def pictures(count: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) * 2 - 1


def settings(**changes: Any) -> Sampling:
    return Sampling(**{"steps": 2, **changes})


def latents_of(model: DynamiCrafter, wanted: Sampling, ends: Tensor | None = None) -> Tensor:
    """Of one image and seed."""
    images = pictures(1)
    noise = standard_normal([3], latent_shape(model, images, wanted.frames), images)
    return sample_latents(model, conditions_of(model, images, [PROMPT], wanted, ends), noise, wanted)


def batches_of(model: DynamiCrafter) -> tuple[DynamiCrafter, list[int]]:
    """A copy whose UNet writes down how many clips it is given."""
    model, sizes = copy.deepcopy(model), list[int]()
    model.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return model, sizes


def test_a_clip_depends_on_its_own_seed(model: DynamiCrafter) -> None:
    both = sample(model, pictures(), TWO, [5, 6], settings())
    assert both.shape == (2, FRAMES, 3, SIDE, SIDE)
    assert both.dtype == torch.float32
    assert not both.requires_grad
    torch.testing.assert_close(sample(model, pictures()[1:], [OTHER], [6], settings()), both[1:], atol=1e-5, rtol=0)
    assert not torch.allclose(sample(model, pictures()[1:], [OTHER], [5], settings()), both[1:], atol=1e-2)


def test_batches_draw_the_clips_that_are_drawn_together(model: DynamiCrafter, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = batches_of(model)
    images, prompts, seeds = pictures(3), [PROMPT, OTHER, PROMPT], [5, 6, 7]
    pairs, together = (sample(model, images, prompts, seeds, settings(steps=1, batch=batch)) for batch in (2, None))
    torch.testing.assert_close(pairs, together, atol=1e-6, rtol=0)
    assert sizes == [4, 2, 6]
    monkeypatch.setattr(animators, "TOGETHER", 2 * FRAMES * SIDE * SIDE)
    sample(model, images, prompts, seeds, settings(steps=1))
    assert sizes[3:] == [4, 2]


def test_each_pass_is_told_more_than_the_one_before(model: DynamiCrafter) -> None:
    images = pictures()
    three = conditions_of(model, images, TWO, settings(image_guidance=2.0, negative=OTHER, number=5.0))
    nothing, image, full = three
    assert torch.equal(full.text, model.embed(TWO).context)
    assert torch.equal(full.image, model.embed_image(images))
    assert torch.equal(image.text[0], model.embed([OTHER]).context[0])
    assert torch.equal(nothing.text, image.text)
    assert torch.equal(image.image, full.image)
    grey = model.embed_image(torch.zeros(1, 3, 40, 24, dtype=torch.float64))
    torch.testing.assert_close(nothing.image, grey.expand(2, -1, -1), atol=1e-6, rtol=0)  # float32 at first
    for each in three:
        assert torch.equal(each.detail, model.encode(images[:, None]).expand(-1, FRAMES, -1, -1, -1))
        assert each.number.tolist() == [5.0, 5.0]
    two = conditions_of(model, images, TWO, settings())
    assert torch.equal(two[0].text[1], model.embed([""]).context[0])
    assert torch.equal(two[0].image, nothing.image)
    assert two[1].number.tolist() == [model.clips.usual] * 2
    (only,) = conditions_of(model, images, TWO, settings(guidance=1.0))
    assert torch.equal(only.text, full.text)


@pytest.mark.parametrize("change", [{}, {"image_guidance": 2.5}])
def test_passes_in_turn_draw_the_clip_of_passes_together(model: DynamiCrafter, change: dict[str, Any]) -> None:
    model, sizes = batches_of(model)
    turn, together, usual = (latents_of(model, settings(little_memory=each, **change)) for each in (True, False, None))
    torch.testing.assert_close(turn, together, atol=1e-10, rtol=1e-10)
    assert torch.equal(usual, together)
    passes = len(settings(**change).scales) + 1
    assert sizes == [1] * 2 * passes + [passes] * 4


def test_one_scale_for_image_and_text_is_plain_guidance(model: DynamiCrafter) -> None:
    plain, apart = (latents_of(model, settings(image_guidance=scale)) for scale in (None, 7.5))
    torch.testing.assert_close(apart, plain, atol=1e-10, rtol=1e-10)
    assert not torch.allclose(latents_of(model, settings(image_guidance=2.0)), plain, atol=1e-3)


def test_tokens_of_the_image_are_made_once(model: DynamiCrafter) -> None:
    """And the clip is the one of tokens made in every step."""
    model, made = copy.deepcopy(model), list[int]()
    model.unet.query_transformer.register_forward_hook(lambda module, inputs, output: made.append(len(inputs[0])))
    wanted = settings(steps=3)
    drawn = latents_of(model, wanted)
    assert made == [1, 1]
    images = pictures(1)
    noise = standard_normal([3], latent_shape(model, images, wanted.frames), images)
    passes = [model.predict(each) for each in conditions_of(model, images, [PROMPT], wanted)]
    with torch.no_grad():
        again = sampler_of(model, wanted).draw(guided(passes, [7.5], 0.7), next(noise), noise)
    assert len(made) == 2 + 6
    torch.testing.assert_close(drawn, again, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "change",
    [
        {"eta": 0.0}, {"guidance": 1.0}, {"guidance": 3.0}, {"rescale": 0.0}, {"negative": OTHER}, {"number": 24.0},
        {"spacing": "leading"}, {"start": 900},
    ],
    ids=str,
)  # fmt: skip
def test_settings_change_the_clip(model: DynamiCrafter, change: dict[str, Any]) -> None:
    usual, other = (latents_of(model, each) for each in (settings(), settings(**change)))
    assert bool(other.isfinite().all())
    assert not torch.allclose(usual, other, atol=1e-4)


def test_spacing_and_rescale_are_the_models(model: DynamiCrafter, alone: DynamiCrafter) -> None:
    for each, spacing, share in ((model, "trailing", 0.7), (alone, "leading", 0.0)):
        usual, told = (latents_of(each, settings(**change)) for change in ({}, {"spacing": spacing, "rescale": share}))
        assert torch.equal(usual, told)


def test_a_clip_goes_from_one_image_to_the_other(model: DynamiCrafter) -> None:
    images, ends = pictures(), pictures(seed=1)
    full = conditions_of(model, images, TWO, settings(), ends)[-1]
    assert torch.equal(full.detail[:, 0], model.encode(images[:, None])[:, 0])
    assert torch.equal(full.detail[:, -1], model.encode(ends[:, None])[:, 0])
    assert not full.detail[:, 1:-1].any()
    assert torch.equal(full.image, model.embed_image(images)), "CLIP is shown the first image alone"
    drawn = [sample(model, images, TWO, [1, 2], settings(), each) for each in (None, images, ends)]
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    assert not torch.allclose(drawn[1], drawn[2], atol=1e-3)


def test_a_model_without_detail_is_told_of_the_image_by_its_tokens_alone(alone: DynamiCrafter) -> None:
    full = conditions_of(alone, pictures(), TWO)[-1]
    assert full.detail is None
    clips = [sample(alone, each, TWO, [1, 1], settings()) for each in (pictures(), pictures(seed=1))]
    assert bool(torch.stack(clips).isfinite().all())
    assert not torch.allclose(*clips, atol=1e-4)
    with pytest.raises(ConfigError, match="leave the ends out"):
        sample(alone, pictures(), TWO, [1, 1], settings(), pictures())


def test_length_size_and_number_can_be_chosen(model: DynamiCrafter) -> None:
    wide = torch.zeros(1, 3, 8, 24, dtype=torch.float64)
    assert sample(model, wide, [PROMPT], [0], settings(frames=5)).shape == (1, 5, 3, 8, 24)


def test_a_network_in_half_precision_draws_a_finite_clip(model: DynamiCrafter) -> None:
    half = copy.deepcopy(model)
    cast(half.parts.values(), "bfloat16")
    clip = sample(half, pictures(1).float(), [PROMPT], [0], settings())
    assert clip.dtype == torch.float32
    assert bool(clip.isfinite().all())


def test_progress_wraps_the_steps(model: DynamiCrafter) -> None:
    seen: list[int] = []

    def watch(steps: Any) -> Any:
        seen.append(len(steps))
        return steps

    sample(model, pictures(1), [PROMPT], [0], settings(steps=3), progress=watch)
    assert seen == [3]


def test_networks_sample_in_evaluation_mode(model: DynamiCrafter) -> None:
    model, modes = copy.deepcopy(model), list[bool]()
    model.unet.train()
    model.unet.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    latents_of(model, settings())
    assert modes == [False, False]
    assert model.unet.training


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0, "batch": -1}, r"steps \(0\) and batch \(-1\) must be at least 1"),
        ({"frames": 0}, r"frames \(0\)"),
        ({"rescale": 1.5}, "rescale is 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Sampling(**wrong)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_drawn(model: DynamiCrafter) -> None:
    images, usual = pictures(), settings()
    with pytest.raises(ConfigError, match="steps is 1001"):
        sample(model, images, TWO, [1, 2], replace(usual, steps=1001))
    with pytest.raises(ConfigError, match="multiples of 2"):
        sample(model, images[..., 1:], TWO, [1, 2], usual)
    with pytest.raises(ConfigError, match="2 images, 2 prompts and 1 seeds"):
        sample(model, images, TWO, [1], usual)
    with pytest.raises(ConfigError, match="one size for both"):
        sample(model, images, TWO, [1, 2], usual, images[:1])


@pytest.mark.parametrize("start", [None, 700])
def test_a_lower_start_is_what_noise_leaves_of_the_clips_where_they_are_known(
    model: DynamiCrafter, start: int | None
) -> None:
    wanted, inputs = settings(start=start, guidance=1.0), list[Tensor]()
    known = replace(model, moments=LatentMoments((1.0, -2.0, 0.0, 0.5), (4.0, 1.0, 0.25, 1.0)))
    handle = model.unet.register_forward_pre_hook(lambda module, given: inputs.append(given[0][:, :, :4]))
    drawn = [latents_of(one, wanted) for one in (known, model)]
    handle.remove()
    noise = next(standard_normal([3], latent_shape(model, pictures(1), wanted.frames), pictures(1)))
    assert torch.equal(inputs[2], noise)
    if start is None:
        assert torch.equal(*drawn)
    else:
        assert torch.equal(inputs[0], sampler_of(model, wanted).begin(noise, known.moments))
        assert not torch.allclose(*drawn, atol=1e-2)
