"""Refinement: what strength, seeds, windows, sizes and FreeU do, and what is as published."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_i2vgen_xl import refiner
from tiny_video_ldm import FRAMES, PROMPT, SIDE
from torch import Tensor
from torch.nn import functional

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.layers import freeu
from inflate.models.precision import cast
from inflate.models.vae import VideoVAE
from inflate.objectives import DDPM
from inflate.sampling import refinement
from inflate.sampling.colours import coarse
from inflate.sampling.ddim import Inversion, standard_normal
from inflate.sampling.dpm_solver import DPMSolver
from inflate.sampling.refinement import (
    PUBLISHED,
    SUFFIX,
    Refinement,
    decoded,
    encoded,
    fitted,
    freed,
    refine,
    refine_latents,
)
from inflate.sampling.steps import guided

OTHER = "a box"
LARGE = 2 * SIDE


def made(folder: Path, **schedule: Any) -> Refiner:
    model = refiner(folder, **schedule)
    for network in model.networks:
        network.double()
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Refiner:
    return made(tmp_path_factory.mktemp("model"))


def clips(count: int = 1, frames: int = FRAMES) -> Tensor:
    shape = count, frames, 3, SIDE, SIDE
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def settings(**changes: Any) -> Refinement:
    return Refinement(**{"steps": 2, **changes})


def latents(frames: int = FRAMES, seed: int = 0) -> Tensor:
    shape = frames, 4, SIDE // 2, SIDE // 2
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refined(model: Refiner, frames: int = FRAMES, seed: int = 3, **changes: Any) -> Tensor:
    return refine_latents(model, latents(frames), PROMPT, seed, settings(**changes))


# --- clips and seeds --------------------------------------------------------------------------------------------------


def test_a_clip_depends_on_its_own_seed_and_prompt(model: Refiner) -> None:
    both = refine(model, clips(2), [PROMPT, OTHER], [5, 6], settings=settings())
    assert both.shape == (2, FRAMES, 3, LARGE, LARGE)
    assert both.dtype == torch.float32
    assert not both.requires_grad
    alone = refine(model, clips(2)[1:], [OTHER], [6], settings=settings())
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=0)
    for prompt, seed in ((OTHER, 5), (PROMPT, 6)):
        changed = refine(model, clips(2)[1:], [prompt], [seed], settings=settings())
        assert (changed - alone).abs().max() > 1e-3


def test_without_strength_the_enlarged_clip_comes_back_as_the_autoencoder_has_it(model: Refiner) -> None:
    back = refine(model, clips(), [PROMPT], [1], settings=settings(strength=0.0))
    enlarged = functional.interpolate(clips()[0].float(), (LARGE, LARGE), mode="bilinear")
    expected = model.decode(model.encode(enlarged[None].double()).float().double())
    torch.testing.assert_close(back, expected.float(), atol=1e-5, rtol=0)


def test_less_strength_leaves_more_of_the_clip(tmp_path: Path) -> None:
    """And what is left does not fade."""
    model = made(tmp_path, prediction_type="v_prediction")
    changes = [
        float((refined(model, strength=strength, guidance=1.0) - latents()).std())
        for strength in (0.002, 0.02, 0.1, 0.5)
    ]
    assert changes == sorted(changes)
    assert changes[0] < 0.1
    kept = refined(model, strength=0.002, guidance=1.0)
    assert float((kept * latents()).sum() / latents().square().sum()) == pytest.approx(1.0, abs=0.05)
    faded = refined(model, strength=0.002, guidance=1.0, dimmed=True)
    assert float((faded * latents()).sum() / latents().square().sum()) < 0.2


def test_passes_in_turn_draw_the_clip_of_passes_together(model: Refiner) -> None:
    model, sizes = copy.deepcopy(model), list[int]()
    model.unet.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    turn, together, usual = (refined(model, little_memory=each) for each in (True, False, None))
    torch.testing.assert_close(turn, together, atol=1e-10, rtol=1e-10)
    assert torch.equal(usual, together)
    assert sizes == [1] * 4 + [2] * 4


# --- as published -----------------------------------------------------------------------------------------------------


def by_hand(model: Refiner, prompt: str, negative: str, scale: float, rescale: float) -> Any:
    passes = [model.predict(model.embed([negative, prompt]))]
    return guided(passes, [scale], rescale)


@torch.no_grad()
def test_modelscopes_refinement_is_sdedit_over_the_trained_levels(model: Refiner) -> None:
    clip = latents()[None]
    noise = standard_normal([3], clip.shape[1:], clip)
    solver = DPMSolver(model.objective, 600, 3, 1.0)
    expected = solver.draw(by_hand(model, PROMPT, "", 7.5, 0.2), solver.noised(clip, next(noise)), noise)
    assert (Refinement().steps, model.clips.levels) == (30, 600)
    found = refine_latents(model, latents(), PROMPT, 3, replace(PUBLISHED["noise"], steps=3))
    torch.testing.assert_close(found, expected[0], atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_vgens_refinement_begins_from_an_inversion_on_another_schedule(model: Refiner) -> None:
    clip, wanted = latents()[None], replace(PUBLISHED["inversion"], steps=3, negative=OTHER)
    noise = standard_normal([3], clip.shape[1:], clip)
    with freed(model.unet, True):
        inverted = Inversion(DDPM("v_prediction", schedule="cosine"), 700, 3).draw(
            model.predict(model.embed([OTHER])), clip
        )
        solver = DPMSolver(model.objective, 700, 3, 1.0)
        expected = solver.draw(by_hand(model, PROMPT + SUFFIX, OTHER, 9.0, 0.3), inverted, noise)
    found = refine_latents(model, latents(), PROMPT, 3, wanted)
    torch.testing.assert_close(found, expected[0], atol=1e-9, rtol=1e-9)


def test_below_the_published_levels_the_network_is_given_the_noised_clip_itself(model: Refiner) -> None:
    given = list[Tensor]()
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][:1]))
    refined(model, strength=0.5, guidance=1.0)
    refined(model, strength=1.0, guidance=1.0)
    handle.remove()
    clip = latents()[None]
    noise = next(standard_normal([3], clip.shape[1:], clip))
    for place, level, share in ((0, 299, None), (2, 599, model.objective)):
        noised = model.objective.noisy(clip, torch.tensor([level]), noise)
        factor = 1.0 if share is None else float((1.0 - share.signal[level]).sqrt())
        torch.testing.assert_close(given[place], factor * noised, atol=1e-10, rtol=1e-10)


def test_the_usual_negative_prompt_is_that_of_training(model: Refiner) -> None:
    trained = replace(model, clips=replace(model.clips, negative=OTHER))
    assert torch.equal(refined(trained), refined(model, negative=OTHER))
    assert not torch.equal(refined(trained), refined(model))


@pytest.mark.parametrize(
    "change",
    [
        {"start": "inversion"}, {"strength": 0.5}, {"levels": 700}, {"steps": 3}, {"guidance": 1.0}, {"guidance": 3.0},
        {"rescale": 0.0}, {"eta": 0.0}, {"negative": OTHER}, {"suffix": ", cinematic"}, {"freeu": True},
        {"double_frames": True}, {"dimmed": False}, {"window": 2}, {"seed": 4},
    ],
    ids=str,
)  # fmt: skip
def test_settings_change_the_clip(model: Refiner, change: dict[str, Any]) -> None:
    usual, other = refined(model), refined(model, **change)
    assert other.shape == usual.shape
    assert torch.isfinite(other).all()
    assert (other - usual).abs().max() > 1e-4


def test_every_frame_twice_is_twice_as_long_for_the_network_alone(model: Refiner) -> None:
    lengths = list[int]()
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    found = refined(model, double_frames=True, window=100)
    handle.remove()
    assert len(found) == FRAMES
    assert lengths == [2 * FRAMES] * 2


def test_fewer_levels_than_steps_are_a_step_each(model: Refiner) -> None:
    solver = settings(strength=0.005, steps=30).solver(model)
    assert solver is not None
    assert (solver.levels, solver.steps) == (3, 3)
    assert torch.isfinite(refined(model, strength=0.005, steps=30)).all()


# --- FreeU ------------------------------------------------------------------------------------------------------------


def free(model: Refiner) -> list[Any]:
    return [block.free for each in model.unet.up_blocks for block in each.resnets]


def test_freeu_acts_meanwhile_and_is_off_afterwards(model: Refiner) -> None:
    seen = list[Any]()
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(free(model)[:2]))
    refined(model, freeu=True, steps=1)
    handle.remove()
    assert seen == [list(freeu.PUBLISHED)]
    assert free(model) == [None] * 4


def test_freeu_is_off_after_a_mistake(model: Refiner) -> None:
    def stop(steps: Any) -> Any:
        assert free(model)[0] is not None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(model, clips(), [PROMPT], [1], settings=settings(freeu=True), progress=stop)
    assert free(model) == [None] * 4


# --- windows and parts ------------------------------------------------------------------------------------------------


def test_one_window_is_the_plain_call(model: Refiner) -> None:
    assert torch.equal(refined(model, window=FRAMES), refined(model, window=10 * FRAMES))
    assert torch.equal(refined(model, window=FRAMES), refined(model))


def test_long_clips_are_drawn_by_windows_of_the_models_length(model: Refiner) -> None:
    lengths = list[int]()
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    found = refined(model, frames=8, overlap=1)
    handle.remove()
    assert found.shape[0] == 8
    assert set(lengths) == {FRAMES}
    assert len(lengths) == 2 * 4  # two steps, four windows


def test_parts_of_frames_do_not_change_a_clip(model: Refiner, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"prompts": [PROMPT], "seeds": [1], "settings": settings()}
    together = refine(model, clips(frames=5), **given)
    counts = list[int]()
    model.vae.encoder.register_forward_pre_hook(lambda module, inputs: counts.append(len(inputs[0])))
    for few, expected in ((2 * LARGE * LARGE, [2, 2, 1]), (1, [1] * 5)):
        counts.clear()
        monkeypatch.setattr(refinement, "FEW", few)
        torch.testing.assert_close(refine(model, clips(frames=5), **given), together, atol=1e-4, rtol=0)
        assert counts == expected


def test_a_temporal_decoder_is_given_clips_of_the_length_of_training(model: Refiner) -> None:
    temporal = replace(model, vae=VideoVAE.from_2d(model.vae))
    parts = [len(part) for part in decoded(temporal, latents(8), (SIDE, SIDE))]
    assert parts == [3, 3, 2]
    found = torch.cat(list(decoded(temporal, latents(8), (SIDE, SIDE))))
    expected = torch.cat(list(decoded(model, latents(8), (SIDE, SIDE))))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # newborn, it decodes as its parent


def test_colours_are_kept_beyond_the_levels_asked_for(model: Refiner) -> None:
    """Of one clip, drawn with and without, the finer part is the same, and the coarse one that of the enlarged clip."""
    drawn, kept = (refine(model, clips(), [PROMPT], [1], settings=settings(keep_colours=levels)) for levels in (0, 2))
    enlarged = fitted(clips()[0].float(), model.size)
    expected = drawn[0] + coarse(enlarged - drawn[0], 2)
    torch.testing.assert_close(kept[0], expected, atol=1e-6, rtol=0)
    assert (kept - drawn).abs().max() > 1e-2


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "rows"), [(31, 45, 1), (18, 32, 2), (33, 17, 2), (5, 9, 1)])
def test_any_size_is_drawn(model: Refiner, height: int, width: int, rows: int) -> None:
    padded = copy.deepcopy(model)
    padded.unet.pad_rows(rows)
    found = refine(padded, clips(frames=2), [PROMPT], [1], height, width, settings(steps=1))
    assert found.shape == (1, 2, 3, height, width)
    assert torch.isfinite(found).all()


def test_sides_that_are_no_whole_latents_repeat_their_last_pixels(model: Refiner) -> None:
    frames = clips()[0].float()
    found = encoded(model, frames, (31, 45))
    assert found.shape == (FRAMES, 4, 16, 23)
    lengthened = functional.pad(fitted(frames, (31, 45)), (0, 1, 0, 1), mode="replicate")
    torch.testing.assert_close(found, model.encode(lengthened[None].double())[0], atol=1e-6, rtol=0)


def test_clips_of_another_shape_are_cropped_about_their_centre() -> None:
    wide = torch.zeros(1, 3, 16, 48)
    wide[..., 16:32] = 1.0
    assert torch.equal(fitted(wide, (16, 16)), torch.ones(1, 3, 16, 16))
    assert fitted(wide, (32, 64)).shape == (1, 3, 32, 64)
    assert torch.equal(fitted(wide, (16, 48)), wide)


def test_smaller_sizes_are_means_of_pixels() -> None:
    stripes = torch.tensor([-1.0, 1.0]).repeat(32).expand(1, 3, 64, 64)
    assert fitted(stripes, (8, 8)).abs().max() < 0.15


def test_sizes_that_leave_no_pixel_are_refused(model: Refiner) -> None:
    with pytest.raises(ConfigError, match="height 3 and width 32: this model needs at least 4 of each"):
        refine(model, clips(), [PROMPT], [1], 3, 32)


# --- what cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps": 0, "levels": -1}, r"steps \(0\) and levels \(-1\) must be at least 1"),
        ({"window": 0}, r"window \(0\)"),
        ({"rescale": 1.5}, "rescale is 1.5"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"strength": -0.1}, "strength is -0.1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Refinement(**wrong)


def test_what_does_not_fit_the_model_is_refused_before_anything_is_drawn(model: Refiner) -> None:
    with pytest.raises(ConfigError, match="levels is 1001"):
        refine(model, clips(), [PROMPT], [1], settings=settings(levels=1001))
    with pytest.raises(ConfigError, match="overlap is 3: it must be 0 to 2"):
        refine(model, clips(), [PROMPT], [1], settings=settings(overlap=3))
    with pytest.raises(ConfigError, match="1 clips, 2 prompts and 1 seeds"):
        refine(model, clips(), [PROMPT, OTHER], [1])


def test_a_network_in_half_precision_refines_to_a_finite_clip(model: Refiner) -> None:
    half = copy.deepcopy(model)
    cast(half.parts.values(), "bfloat16")
    clip = refine(half, clips().float(), [PROMPT], [0], settings=settings())
    assert clip.dtype == torch.float32
    assert torch.isfinite(clip).all()
