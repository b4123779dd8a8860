"""Both stages of I2VGen-XL: what the condition is, what is left out of it, what is loaded and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_dynamicrafter import image_encoder
from tiny_i2vgen_xl import HIERARCHY, base, refiner
from tiny_video_ldm import FRAMES, PROMPT, SIDE, write_text_model
from torch import Tensor

from inflate.errors import CheckpointError, ConfigError, InflateError
from inflate.families import i2vgen_xl_refiner
from inflate.families.i2vgen_xl import Clips, Condition, Encoders, I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.video_ldm import VideoLDM
from inflate.layers.hierarchy import Hierarchy
from inflate.models.image_encoders import central_square, shown_squarely
from inflate.models.text_encoders import TextCondition

LATENT = SIDE // 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> I2VGenXL:
    made = base(tmp_path_factory.mktemp("model"))
    return replace(made, image_mean=(0.5, 0.4, 0.3), further={"stage": "base"})


@pytest.fixture(scope="module")
def export(model: I2VGenXL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "export"
    model.save_pretrained(folder)
    return folder


def pixels(count: int = 2, seed: int = 0, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, SIDE, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def told(model: I2VGenXL, text: bool = True) -> Condition:
    """A condition on two prompts and two images."""
    latents = model.encode(pixels()[:, None])[:, 0]
    prompts = model.embed([PROMPT, ""]) if text else None
    return model.condition(prompts, latents, model.embed_image(pixels()), torch.tensor([8.0, 3.0]))


@torch.no_grad()
def drawn(model: I2VGenXL | Refiner, condition: Any, **settings: Any) -> Tensor:
    noisy = torch.randn(2, FRAMES, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(3))
    return model.predict(condition, **settings)(noisy, torch.tensor([10, 999]))


# --- the condition ----------------------------------------------------------------------------------------------------


def test_everything_told_changes_what_is_drawn(model: I2VGenXL) -> None:
    condition = told(model)
    assert condition.latents is not None
    assert condition.embedding is not None
    before = drawn(model, condition)
    for change in (
        {"text": condition.text.flip(0)},
        {"latents": condition.latents + 1},
        {"embedding": condition.embedding + 1},
        {"fps": condition.fps + 1},
        {"left_out": ("detail",)},
        {"left_out": ("global",)},
        {"left_out": ("clip",)},
        {"image_share": 0.5},
    ):
        assert (drawn(model, replace(condition, **change)) - before).abs().max() > 1e-5, change


def test_without_prompts_the_image_alone_is_told(model: I2VGenXL) -> None:
    condition = told(model, text=False)
    assert condition.text.shape == (2, 0, model.text.width)
    assert torch.isfinite(drawn(model, condition)).all()
    assert (drawn(model, condition) - drawn(model, told(model))).abs().max() > 1e-4
    dropped = condition.drop(torch.zeros(2), model.embed([""]).context)
    assert torch.equal(dropped.text, condition.text)


def test_what_a_hierarchy_does_not_take_is_left_away(tmp_path: Path) -> None:
    """ModelScope's Image-to-Video is told CLIP's tokens alone."""
    model = base(tmp_path, Hierarchy(embedding=8, clip_tokens=2, detail_encoder=False, global_encoder=False))
    condition = told(model, text=False)
    assert condition.latents is None
    assert torch.isfinite(drawn(model, condition)).all()
    assert model.unet.config.in_channels == 4


def test_latents_that_are_needed_are_asked_for(model: I2VGenXL) -> None:
    with pytest.raises(InflateError, match="this model takes the latents of first frames: give them"):
        model.condition(model.embed([PROMPT]), None, None, torch.tensor([8.0]))


def test_the_image_encoder_sees_the_central_square(model: I2VGenXL) -> None:
    wide = pixels(width=3 * SIDE)
    square = wide[..., SIDE : 2 * SIDE]
    assert torch.equal(central_square(wide), square)
    assert torch.equal(central_square(wide.transpose(2, 3)), square.transpose(2, 3))
    assert torch.equal(model.embed_image(wide), model.embed_image(square))


def test_the_image_encoder_is_shown_what_pillow_makes_bilinearly(model: I2VGenXL) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    size = model.image_encoder.config.image_size
    small = Image.fromarray(picture[:, 10:60]).resize((size, size), Image.Resampling.BILINEAR)
    scaled = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    seen = shown_squarely(model.image_encoder, scaled, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255
    assert (seen - expected).abs().max() < 1.5 / 255  # Pillow rounds to whole numbers, twice
    with torch.no_grad():
        inputs = shown_squarely(model.image_encoder, scaled, model.image_mean, model.image_std)
        assert torch.equal(model.embed_image(scaled)[:, 0], model.image_encoder(inputs).image_embeds)


def test_what_is_dropped_is_the_text_and_clip_alone(model: I2VGenXL) -> None:
    condition = Condition.cat([told(model), told(model)])
    nothing = model.embed(["blurred"]).context
    dropped = condition.drop(torch.tensor([0.04, 0.06, 0.14, 0.2]), nothing)
    assert torch.equal(dropped.text[:2], nothing.expand(2, -1, -1))
    assert torch.equal(dropped.text[2:], condition.text[2:])
    assert dropped.embedding is not None
    assert condition.embedding is not None
    assert not dropped.embedding[1:3].any()
    assert torch.equal(dropped.embedding[[0, 3]], condition.embedding[[0, 3]])
    assert torch.equal(dropped.latents, condition.latents)
    with pytest.raises(ConfigError, match=r"drop rates .* must be at least 0 and at most 1 in all"):
        condition.drop(torch.zeros(4), nothing, text=0.9, image=0.2)


def test_guidance_leads_away_from_another_text_without_clip(model: I2VGenXL) -> None:
    condition, other = told(model), model.embed(["blurred", "grey"]).context
    assert condition.embedding is not None
    expected = replace(condition, text=other, embedding=torch.zeros_like(condition.embedding))
    assert torch.equal(drawn(model, condition.unguided(other)), drawn(model, expected))


def test_conditions_of_different_parts_are_no_batch(model: I2VGenXL) -> None:
    condition = told(model)
    with pytest.raises(InflateError, match="conditions of different parts cannot be one batch"):
        Condition.cat([condition, replace(condition, left_out=("clip",))])
    halves = condition.split(1)
    assert len(halves) == 2
    assert torch.equal(Condition.cat(halves).text, condition.text)


# --- birth, folders, what does not fit --------------------------------------------------------------------------------


def test_newborn_it_draws_as_the_image_model_where_tokens_weigh_nothing(tmp_path: Path) -> None:
    parent = VideoLDM.load(write_text_model(tmp_path / "parent"))
    model = base(tmp_path / "model", born=True)
    model.unet.load_state_dict({**model.unet.state_dict(), **spatial(parent)})
    condition = replace(told(model), image_share=0.0)
    expected = drawn_by(parent, TextCondition(condition.text))
    assert (drawn(model, condition) - expected).abs().max() <= 1e-5


def spatial(parent: VideoLDM) -> dict[str, Tensor]:
    state = parent.unet.state_dict()
    return {name: value for name, value in state.items() if ".temporal." not in name and name != "conv_in.weight"} | {
        "conv_in.weight": torch.cat([state["conv_in.weight"], torch.zeros_like(state["conv_in.weight"])], 1)
    }


@torch.no_grad()
def drawn_by(parent: VideoLDM, condition: TextCondition) -> Tensor:
    noisy = torch.randn(2, FRAMES, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(3))
    return parent.predict(condition, image_only=True)(noisy, torch.tensor([10, 999]))


def test_an_export_is_loaded_as_it_was(model: I2VGenXL, export: Path) -> None:
    again = I2VGenXL.load(export)
    assert (again.clips, again.further, again.objective) == (model.clips, model.further, model.objective)
    assert (again.image_mean, again.image_std) == (model.image_mean, model.image_std)
    assert torch.equal(drawn(again, told(again)), drawn(model, told(model)))
    encoders = Encoders.load(export)
    assert torch.equal(encoders.embed_image(pixels()), model.embed_image(pixels()))


def test_what_does_not_fit_is_refused(model: I2VGenXL, tmp_path: Path) -> None:
    parts = (model.unet, model.vae, model.text, model.noise, model.clips)
    wider = image_encoder()
    wider.config.projection_dim = 9
    with pytest.raises(CheckpointError, match="embeds in 9 dimensions but the layers of its tokens take 8"):
        I2VGenXL(*parts, wider)
    plain = VideoLDM.load(write_text_model(tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="told no first frames: give it a hierarchy"):
        I2VGenXL.from_text_to_video(plain, image_encoder(), Clips())
    other = VideoLDM.load(write_text_model(tmp_path / "other"))
    other.unet.add_hierarchy(HIERARCHY)
    other.unet.widen(9)
    with pytest.raises(CheckpointError, match="the UNet takes 9 channels; with its hierarchy, 8 are known"):
        I2VGenXL.from_text_to_video(other, image_encoder(), Clips())
    for wrong in ({"frames": 0}, {"fps": 0.0}):
        with pytest.raises(ConfigError, match="must be positive"):
            Clips(**wrong)


def test_another_familys_folder_is_refused(export: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is of family i2vgen_xl, not i2vgen_xl_refiner"):
        i2vgen_xl_refiner.Clips.read(export / "inflate.json")
    settings = json.loads((export / "inflate.json").read_text())
    settings["clips"]["levels"] = 600
    file = tmp_path / "inflate.json"
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="is not whole: .*levels"):
        Clips.read(file)


# --- the refiner ------------------------------------------------------------------------------------------------------


def test_a_newborn_refiner_draws_each_frame_as_the_image_model(tmp_path: Path) -> None:
    model = refiner(tmp_path / "model", born=True)
    condition = model.embed([PROMPT, ""])
    video, images = drawn(model, condition), drawn(model, condition, image_only=True)
    assert (video - images).abs().max() <= 1e-5


def test_a_refiner_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = refiner(tmp_path / "model")
    model.unet.pad_rows()
    model.save_pretrained(tmp_path / "export")
    again = Refiner.load(tmp_path / "export")
    assert (again.clips, again.objective) == (model.clips, model.objective)
    assert again.unet.config.downsample_padding == [2, 1]
    condition = model.embed([PROMPT, ""])
    assert torch.equal(drawn(again, condition), drawn(model, condition))
    assert not torch.equal(drawn(again, condition), drawn(again, condition, image_only=True))


def test_a_refiner_is_told_texts_alone(model: I2VGenXL) -> None:
    parts = (model.vae, model.text, model.noise, i2vgen_xl_refiner.Clips())
    with pytest.raises(CheckpointError, match="a refiner is told texts alone, but this UNet more"):
        Refiner(model.unet, *parts)
    with pytest.raises(ConfigError, match="clips.levels=0: noise levels are 1 to 1000"):
        i2vgen_xl_refiner.Clips(levels=0)
