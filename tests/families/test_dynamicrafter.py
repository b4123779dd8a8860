"""The family that animates images: what its condition is, what is left out of it, what it loads and refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dynamicrafter import CONTEXT, FRAMES, STRETCHED, family, image_encoder
from tiny_video_ldm import PROMPT, SIDE, WIDTH, write_text_model
from torch import Tensor
from transformers import CLIPVisionModel

from helpers import randomise, tiny_unet
from inflate.errors import CheckpointError, ConfigError, InflateError
from inflate.families.dynamicrafter import Clips, Condition, DynamiCrafter, Encoders, ends, repeated
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext
from inflate.models.text_encoders import TextCondition
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.objectives import DDPM

LATENT = SIDE // 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DynamiCrafter:
    clips = Clips(FRAMES, 8.0, SIDE, SIDE, "stride", 2.0, interpolation=True)
    made = family(tmp_path_factory.mktemp("model"), clips=clips, **STRETCHED)
    for network in made.networks:
        network.float()
    return replace(made, image_mean=(0.5, 0.4, 0.3), base_scale=0.7, further={"stage": "joint"})


@pytest.fixture(scope="module")
def export(model: DynamiCrafter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "export"
    model.save_pretrained(folder)
    return folder


def pixels(count: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def told(model: DynamiCrafter, last: bool = False) -> Condition:
    """A condition on two prompts and two images."""
    latent = model.encode(pixels()[:, None])[:, 0]
    other = model.encode(pixels(seed=1)[:, None])[:, 0] if last else None
    image = model.embed_image(pixels())
    return model.condition(model.embed([PROMPT, ""]), image, torch.tensor([8.0, 3.0]), latent, FRAMES, other)


@torch.no_grad()
def drawn(model: DynamiCrafter, condition: Condition, **settings: Any) -> Tensor:
    noisy = torch.randn(2, FRAMES, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(3))
    return model.predict(condition, **settings)(noisy, torch.tensor([10, 999]))


# --- the condition ----------------------------------------------------------------------------------------------------


def test_the_condition_of_an_image(model: DynamiCrafter) -> None:
    condition = told(model)
    latent = model.encode(pixels()[:, None])[:, 0]
    assert torch.equal(condition.text, model.embed([PROMPT, ""]).context)
    assert condition.detail is not None
    assert torch.equal(condition.detail, latent[:, None].repeat(1, FRAMES, 1, 1, 1))
    for change in (
        {"text": condition.text.flip(0)},
        {"image": model.embed_image(pixels(seed=2))},
        {"detail": condition.detail + 1},
        {"number": condition.number + 1},
    ):
        assert (drawn(model, replace(condition, **change)) - drawn(model, condition)).abs().max() > 1e-4


def test_between_two_ends_is_nothing(model: DynamiCrafter) -> None:
    detail = told(model, last=True).detail
    assert detail is not None
    assert torch.equal(detail[:, 0], model.encode(pixels()[:, None])[:, 0])
    assert torch.equal(detail[:, -1], model.encode(pixels(seed=1)[:, None])[:, 0])
    assert not detail[:, 1:-1].any()
    latent = torch.ones(1, 4, 2, 2)
    assert torch.equal(ends(latent, latent, 2), repeated(latent, 2))
    with pytest.raises(ConfigError, match="a clip of 1 frame has no two ends"):
        ends(latent, latent, 1)


def test_a_model_of_the_detail_latent_asks_for_it(model: DynamiCrafter) -> None:
    with pytest.raises(InflateError, match="takes the latent of its image: give it, and the number of frames"):
        model.condition(model.embed([PROMPT]), None, torch.ones(1))


def test_the_image_encoder_tells_of_every_patch_before_its_norm(model: DynamiCrafter) -> None:
    states = model.embed_image(pixels())
    assert states.shape == (2, 5, CONTEXT.embedding)  # the class token and four patches
    plain = CLIPVisionModel(model.image_encoder.config)
    plain.load_state_dict(model.image_encoder.vision_model.state_dict())
    mean, deviation = (torch.tensor(value)[:, None, None] for value in (model.image_mean, model.image_std))
    with torch.no_grad():
        expected = plain(((pixels() + 1) / 2 - mean) / deviation).last_hidden_state
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)
    assert torch.equal(model.null_image(), model.embed_image(torch.zeros(1, 3, 40, 24)))


def test_tokens_made_once_draw_the_same(model: DynamiCrafter) -> None:
    condition = told(model)
    once = model.with_tokens(condition, FRAMES)
    assert once.image is None
    assert once.tokens is not None
    assert once.tokens.shape == (2, FRAMES, CONTEXT.queries, WIDTH)
    assert torch.equal(drawn(model, once), drawn(model, condition))
    without = replace(condition, image=None)
    assert model.with_tokens(without, FRAMES) is without


def test_conditions_become_one_and_several(model: DynamiCrafter) -> None:
    condition = told(model)
    both = Condition.cat([condition, replace(condition, text=condition.text.flip(0))])
    assert len(both.text) == len(both.number) == 4
    assert both.tokens is None
    parts = both.split(3)
    assert [len(part.text) for part in parts] == [3, 1]
    again = Condition.cat(parts)
    assert all(torch.equal(getattr(again, name), getattr(both, name)) for name in ("text", "image", "detail", "number"))
    with pytest.raises(InflateError, match="with and without an image cannot be one batch"):
        Condition.cat([condition, replace(condition, image=None)])


# --- what is left out -------------------------------------------------------------------------------------------------


def dropped(draws: Tensor, *rates: float) -> tuple[Tensor, Tensor]:
    """Which clips lose their text, and which their image."""
    ones = torch.ones(len(draws), 2, 3)
    detail = torch.ones(len(draws), 1, 4, 1, 1)
    condition = Condition(ones, ones, detail, draws)
    left = condition.drop(draws, torch.full((1, 2, 3), 5.0), torch.full((1, 2, 3), 7.0), *rates)
    assert left.detail is detail
    assert left.number is draws
    assert left.image is not None
    assert {*left.text.unique().tolist()} <= {1.0, 5.0}
    assert {*left.image.unique().tolist()} <= {1.0, 7.0}
    return (left.text == 5).all((1, 2)), (left.image == 7).all((1, 2))


@pytest.mark.parametrize("rates", [(), (0.2, 0.1, 0.3)])
def test_text_both_and_the_image_are_left_out_as_often_as_asked(rates: tuple[float, ...]) -> None:
    draws = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    text, image = dropped(draws, *rates)
    for which, rate in zip((text & ~image, text & image, ~text & image), rates or (0.05,) * 3, strict=True):
        assert float(which.float().mean()) == pytest.approx(rate, abs=4 * (rate / 100_000) ** 0.5)


def test_nothing_or_all_may_be_left_out() -> None:
    draws = torch.tensor([0.0, 0.3, 0.5, 0.999])
    assert not any(which.any() for which in dropped(draws, 0.0, 0.0, 0.0))
    text, image = dropped(draws, 0.25, 0.25, 0.5)
    assert text.tolist() == [True, True, False, False]
    assert image.tolist() == [False, True, True, True]
    for rates in ((0.4, 0.4, 0.3), (0.1, -0.1, 0.1)):
        with pytest.raises(ConfigError, match=r"drop rates .* must be at least 0 and at most 1 in all"):
            dropped(draws, *rates)


def test_an_image_that_is_tokens_already_is_not_left_out_silently() -> None:
    condition = Condition(torch.ones(1, 2, 3), None, None, torch.ones(1), tokens=torch.ones(1, 2, 3))
    with pytest.raises(InflateError, match="image tokens cannot be left out: drop before they are made"):
        condition.drop(torch.zeros(1), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


# --- birth, files -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_newborn_predicts_what_the_text_model_does(tmp_path: Path) -> None:
    parent = VideoLDM.load(write_text_model(tmp_path, **STRETCHED))
    randomise(parent.unet)
    noisy, timestep = torch.randn(2, FRAMES, 4, LATENT, LATENT), torch.tensor([10, 999])
    text = parent.embed([PROMPT, ""])
    expected = parent.predict(text)(noisy, timestep)
    alone = parent.predict(text, image_only=True)(noisy, timestep)
    made = DynamiCrafter.from_text_to_video(parent, image_encoder(), Clips(FRAMES), CONTEXT)
    condition = made.condition(text, None, torch.ones(2))
    assert condition.detail is None
    assert torch.equal(made.predict(condition)(noisy, timestep), expected)
    assert made.objective == DDPM("v_prediction", True)
    made.take_detail()
    made.take_detail()  # once is enough
    assert made.takes_detail
    condition = told(made)
    torch.testing.assert_close(made.predict(condition)(noisy, timestep), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(made.predict(condition, image_only=True)(noisy, timestep), alone, atol=1e-6, rtol=0)
    assert (expected - alone).abs().max() > 1e-3


def test_the_wrapped_network_is_called_where_there_is_one(model: DynamiCrafter) -> None:
    calls: list[int] = []
    wrapped = copy.deepcopy(model.unet)
    wrapped.register_forward_pre_hook(lambda *_: calls.append(1))
    assert torch.equal(drawn(model, told(model), unet=wrapped), drawn(model, told(model)))
    assert calls == [1]


def test_an_export_is_loaded_as_it_was(model: DynamiCrafter, export: Path, tmp_path: Path) -> None:
    again = DynamiCrafter.load(export)
    assert (again.clips, again.objective, again.further) == (model.clips, model.objective, {"stage": "joint"})
    assert again.objective == DDPM("v_prediction", True, 0.7)
    assert (again.image_mean, again.image_std) == (model.image_mean, model.image_std)
    assert again.unet.image_context == CONTEXT
    assert again.size == (SIDE, SIDE)
    for name, part in model.parts.items():
        ours, theirs = again.parts[name].state_dict(), part.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    assert torch.equal(drawn(again, told(again)), drawn(model, told(model)))
    again.save_pretrained(tmp_path / "again")
    files = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in (export, tmp_path / "again")]
    assert files[0] == files[1]


def test_the_encoders_are_loaded_without_the_unet(model: DynamiCrafter, export: Path) -> None:
    encoders = Encoders.load(export)
    assert torch.equal(encoders.embed_image(pixels()), model.embed_image(pixels()))
    assert torch.equal(encoders.embed([PROMPT]).context, model.embed([PROMPT]).context)
    assert torch.equal(encoders.encode(pixels()[:, None]), model.encode(pixels()[:, None]))


def test_what_the_clips_were_tells_the_number() -> None:
    assert (Clips(fps=7.0).usual, Clips(told="stride").usual, Clips(number=5.0).usual) == (7.0, 1.0, 5.0)
    fps, stride = torch.tensor([7.9, 3.0]), torch.tensor([2, 4])
    assert Clips().numbers(fps, stride).tolist() == [7.0, 3.0]
    assert Clips(told="stride").numbers(fps, stride).tolist() == [2, 4]
    with pytest.raises(ConfigError, match=r"clips\.told=speed: fps or stride"):
        Clips(told="speed")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": {"frames": 3, "odd": 1}}, r"inflate\.json is not whole: .*'odd'.*; export the model again"),
        ({"clips": None}, r"inflate\.json"),
        ({"family": "svd"}, r"inflate\.json"),
    ],
)
def test_settings_that_are_not_whole_are_refused(export: Path, tmp_path: Path, change: Any, message: str) -> None:
    settings = {**json.loads((export / "inflate.json").read_text()), **change}
    file = tmp_path / "inflate.json"
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    with pytest.raises(CheckpointError, match=message):
        Clips.read(file)


def unet_of(context: ImageContext | None = CONTEXT, ids: int = 0, **settings: Any) -> VideoUNet:
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=WIDTH, **settings), TemporalSpec(added_ids=ids))
    if context is not None:
        unet.add_image_context(context)
    return unet


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        (lambda: unet_of(None), "the UNet attends to no image: give it an image context"),
        (lambda: unet_of(replace(CONTEXT, embedding=9)), "encoder has 8 dimensions but the query transformer takes 9"),
        (
            lambda: unet_of(in_channels=9),
            "the UNet takes 9 channels: 4 without and 8 with the image's latent",
        ),
        (lambda: unet_of(ids=3), "the UNet is told 3 numbers; the frame rate alone is known"),
    ],
)
def test_parts_that_do_not_fit_are_named(model: DynamiCrafter, unet: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        replace(model, unet=unet())


def test_text_of_another_width_is_named(model: DynamiCrafter) -> None:
    unet = VideoUNet.from_2d(tiny_unet(cross_attention_dim=32), TemporalSpec(added_ids=0))
    with pytest.raises(CheckpointError, match="the text encoders have 64 dimensions but the UNet's context has 32"):
        replace(model, unet=unet)
    assert isinstance(model.embed([PROMPT]), TextCondition)


def test_a_folder_without_its_image_encoder_is_refused(export: Path, tmp_path: Path) -> None:
    for file in export.rglob("*"):
        if file.is_file() and "image_encoder" not in file.parts:
            target = tmp_path / file.relative_to(export)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    with pytest.raises(CheckpointError, match="image_encoder holds no CLIP image encoder"):
        DynamiCrafter.load(tmp_path)
