"""What each stage of I2VGen-XL begins with, and which settings belong to it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_i2vgen_xl import FRAMES, HIERARCHY, base, image_encoder, refiner
from tiny_video_ldm import PROMPT, SIDE, write_text_model

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl import FAMILY, I2VGenXL
from inflate.families.i2vgen_xl_model import Model
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.video_ldm import VideoLDM
from inflate.models.unet import MODELSCOPE, VIDEO_LDM
from inflate.objectives import DDPM
from inflate.training.i2vgen_xl import I2VGenXLSettings
from inflate.training.i2vgen_xl_stages import (
    PAPER_GAMMA,
    Parts,
    Stage,
    begin,
    check_stage,
    check_start,
    encoders,
    gamma_of,
    refuse_new,
)

OWN = I2VGenXLSettings()
PARTS = Parts(clip_tokens=2)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image model, an image encoder, a text-to-video model, a base and a refiner."""
    root = tmp_path_factory.mktemp("models")
    image = write_text_model(root / "image", prediction_type="v_prediction")
    image_encoder().save_pretrained(root / "vision")
    VideoLDM.load(image).save_pretrained(root / "text")
    whole = base(root / "of base")
    whole.clips = replace(whole.clips, negative="a box")
    whole.save_pretrained(root / "base")
    refiner(root / "of refiner").save_pretrained(root / "refiner")
    return {name: root / name for name in ("image", "vision", "text", "base", "refiner")}


def model(places: dict[str, Path], name: str) -> Model:
    vision = str(places["vision"]) if name in ("image", "text") else None
    return Model(str(places[name]), image_encoder=vision)


@pytest.mark.parametrize(("start", "spec"), [("image", MODELSCOPE), ("text", VIDEO_LDM)])
def test_a_base_is_born_as_its_parent_where_first_frames_weigh_nothing(
    places: dict[str, Path], start: str, spec: Any
) -> None:
    made = begin("base", model(places, start), PARTS, OWN)
    assert isinstance(made, I2VGenXL)
    assert made.hierarchy == HIERARCHY
    assert made.unet.spec == replace(spec, added_ids=1, added_id_dim=32)
    parent, text = VideoLDM.load(places["image"]), made.embed([PROMPT])
    noisy, step = torch.randn(1, FRAMES, 4, 8, 8), torch.tensor([500])
    told = made.condition(text, torch.randn(1, 4, 8, 8), torch.randn(1, 1, 8), torch.tensor([8.0]))
    with torch.no_grad():
        ours = made.predict(replace(told, image_share=0.0))(noisy, step)
        torch.testing.assert_close(ours, parent.predict(text)(noisy, step), atol=1e-5, rtol=0)
        assert not torch.allclose(made.predict(told)(noisy, step), ours, atol=1e-3)


@pytest.mark.parametrize("start", ["image", "text"])
def test_a_refiner_is_born_as_its_parent(places: dict[str, Path], start: str) -> None:
    made = begin("refine", replace(model(places, start), image_encoder=None), Parts(), OWN)
    parent, text = VideoLDM.load(places["image"]), made.embed([PROMPT])
    assert isinstance(made, Refiner)
    assert made.clips.levels == 600
    noisy, step = torch.randn(1, FRAMES, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        ours, theirs = made.predict(text)(noisy, step), parent.predict(text)(noisy, step)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_refiner_of_a_base_is_it_without_the_first_frame_at_its_usual_rate(places: dict[str, Path]) -> None:
    parent = I2VGenXL.load(places["base"])
    made = begin("refine", model(places, "base"), Parts(), OWN)
    assert isinstance(made, Refiner)
    assert made.clips.negative == parent.clips.negative == "a box"
    assert (made.clips.frames, made.clips.fps, made.unet.config.in_channels) == (FRAMES, parent.clips.fps, 4)
    assert not made.unet.created_parameters().keys() - made.unet.temporal_parameters().keys()
    text, noisy, step = made.embed([PROMPT]), torch.randn(1, FRAMES, 4, 8, 8), torch.tensor([300])
    latents, embedding = torch.randn(1, 4, 8, 8), torch.randn(1, 1, 8)
    told = parent.condition(text, latents, embedding, torch.tensor([parent.clips.fps]))
    untold = replace(told, left_out=parent.hierarchy.parts)
    with torch.no_grad():
        ours = made.predict(text)(noisy, step)
        torch.testing.assert_close(ours, parent.predict(untold)(noisy, step), atol=1e-5, rtol=0)
        other = replace(untold, fps=torch.tensor([24.0]))
        assert not torch.allclose(ours, parent.predict(other)(noisy, step), atol=1e-4)


@pytest.mark.parametrize(("stage", "start"), [("base", "base"), ("refine", "refiner")])
def test_a_stage_goes_on_from_its_own_export(places: dict[str, Path], stage: Stage, start: str) -> None:
    made = begin(stage, model(places, start), Parts(), OWN)
    kind = I2VGenXL if stage == "base" else Refiner
    saved = kind.load(places[start])
    assert made.clips == saved.clips
    assert made.objective == saved.objective
    ours = made.unet.state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in saved.unet.state_dict().items())


@pytest.mark.parametrize("stage", ["base", "refine"])
def test_a_schedule_is_moved_to_and_kept(places: dict[str, Path], stage: Stage, tmp_path: Path) -> None:
    settings = I2VGenXLSettings(schedule="cosine" if stage == "base" else "shifted_cosine")
    made = begin(stage, model(places, "image"), PARTS, settings)
    wanted = DDPM("v_prediction", stage == "base", schedule=settings.schedule or "cosine")
    assert made.objective == wanted
    made.save_pretrained(tmp_path / "export")
    loaded = (I2VGenXL if stage == "base" else Refiner).load(tmp_path / "export")
    assert loaded.objective == wanted


def test_rows_are_padded_and_stay_so(places: dict[str, Path], tmp_path: Path) -> None:
    made = begin("refine", model(places, "base"), Parts(), I2VGenXLSettings(padded_rows=2))
    made.save_pretrained(tmp_path / "export")
    loaded = Refiner.load(tmp_path / "export")
    assert list(loaded.unet.config.downsample_padding) == [2, 1]
    text, noisy = made.embed([PROMPT]), torch.randn(1, FRAMES, 4, 10, 8)
    with torch.no_grad():
        ours, theirs = (one.predict(text)(noisy, torch.tensor([300])) for one in (made, loaded))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("stage", "start"),
    [("base", "image"), ("base", "text"), ("base", "base"), ("refine", "base"), ("refine", "refiner")],
)
def test_an_outline_has_the_shape_of_the_model(places: dict[str, Path], stage: Stage, start: str) -> None:
    made, outlined = (begin(stage, model(places, start), Parts(), OWN, weights=weights) for weights in (True, False))
    for name, part in made.parts.items():
        shapes = {key: value.shape for key, value in part.state_dict().items()}
        assert shapes == {key: value.shape for key, value in outlined.parts[name].state_dict().items()}, name
    assert all(value.is_meta for value in outlined.unet.parameters())


@pytest.mark.parametrize(("stage", "start"), [("base", "text"), ("base", "base"), ("refine", "base"),
                                              ("refine", "refiner"), ("refine", "text")])  # fmt: skip
def test_what_is_cached_comes_from_the_models_own_encoders(places: dict[str, Path], stage: Stage, start: str) -> None:
    found, whole = encoders(stage, model(places, start)), begin(stage, model(places, start), Parts(), OWN)
    image = torch.rand(1, 2, 3, SIDE, SIDE)
    assert torch.equal(found.encode(image), whole.encode(image))
    assert torch.equal(found.embed([PROMPT]).context, whole.embed([PROMPT]).context)


def test_gamma_is_the_papers_from_an_image_model_alone(places: dict[str, Path]) -> None:
    assert gamma_of(OWN, model(places, "image")) == PAPER_GAMMA
    assert gamma_of(OWN, model(places, "text")) == 1.0
    assert gamma_of(I2VGenXLSettings(gamma=0.5), model(places, "image")) == 0.5


@pytest.mark.parametrize(
    ("stage", "changes", "parts", "message"),
    [
        ("base", {"levels": 600}, Parts(), r"i2vgen_xl\.levels is for stage=refine"),
        ("base", {"padded_rows": 2}, Parts(), r"i2vgen_xl\.padded_rows is for stage=refine"),
        ("refine", {"text": False}, Parts(), r"i2vgen_xl\.text is for stage=base"),
        ("refine", {"fade_in": 5}, Parts(), r"i2vgen_xl\.fade_in is for stage=base"),
        ("refine", {}, Parts(clip_tokens=0), r"hierarchy\.clip_tokens is for stage=base"),
        ("base", {"text": False}, Parts(global_encoder=False, clip_tokens=0), "leaves attention no token"),
        ("base", {"text": False, "fade_in": 5}, Parts(), r"fade_in weighs .*there is no text \(i2vgen_xl\.text\)"),
        ("base", {"fade_in": 5}, Parts(global_encoder=False, clip_tokens=0), r"the model has none \(hierarchy\)"),
        ("base", {"drop_text": 0.8, "drop_image": 0.3}, Parts(), "drop_text, drop_image and drop_both are shares"),
        ("refine", {"drop_text": 1.1}, Parts(), "drop_text, drop_image and drop_both are shares"),
        ("base", {"fade_in": 100}, Parts(), r"training\.steps=100 would end before"),
    ],
)
def test_settings_of_the_other_stage_or_without_effect_are_refused(
    stage: Stage, changes: dict[str, Any], parts: Parts, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_stage(stage, Model(), I2VGenXLSettings(**changes), parts, 100)


def test_a_refiner_loses_its_text_alone() -> None:
    check_stage("refine", Model(), I2VGenXLSettings(drop_text=1.0), Parts(), 100)


@pytest.mark.parametrize(
    ("detail_alone", "prompts", "changes", "message"),
    [
        (True, True, {"text": False}, r"i2vgen_xl\.text=false leaves attention no token"),
        (True, True, {"fade_in": 5}, r"i2vgen_xl\.fade_in weighs .*the model has none"),
        (False, False, {"fade_in": 5}, r"i2vgen_xl\.fade_in weighs .*there is no text"),
    ],
)
def test_settings_that_a_saved_base_leaves_without_effect_are_refused(
    detail_alone: bool, prompts: bool, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    alone = {"global_encoder": False, "clip_tokens": 0} if detail_alone else {}
    made = base(tmp_path / "parent", replace(HIERARCHY, **alone))
    made.clips = replace(made.clips, prompts=prompts)
    made.save_pretrained(tmp_path / "base")
    start, settings = Model(str(tmp_path / "base")), I2VGenXLSettings(**changes)
    check_stage("base", start, settings, Parts(), 100)
    for weights in (True, False):
        with pytest.raises(ConfigError, match=message):
            begin("base", start, Parts(), settings, weights)
    told = begin("base", start, Parts(), replace(settings, text=prompts or None, fade_in=0))
    assert told.clips == made.clips


def test_a_base_keeps_how_its_parent_rescales_latents(
    places: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = VideoLDM.load(places["text"])
    parent.base_scale = 0.7
    parent.save_pretrained(tmp_path / "text")
    start = Model(str(tmp_path / "text"), image_encoder=str(places["vision"]))
    made = begin("base", start, PARTS, OWN)
    assert made.objective == parent.objective
    assert made.objective.base_scale == 0.7
    made.save_pretrained(tmp_path / "base")
    assert I2VGenXL.load(tmp_path / "base").objective == parent.objective
    moved = begin("base", start, PARTS, I2VGenXLSettings(schedule="cosine"))
    assert moved.objective == DDPM("v_prediction", True, schedule="cosine")
    assert caplog.messages == []
    assert begin("refine", Model(str(tmp_path / "base")), Parts(), OWN).objective.base_scale == 1.0
    assert "rescales clean latents at noisy timesteps (base_scale 0.7)" in caplog.text


def test_a_refiner_sees_no_first_frame() -> None:
    with pytest.raises(ConfigError, match=r"model\.image_encoder is for stage=base"):
        check_stage("refine", Model(image_encoder="pocket"), OWN, Parts(), 100)


@pytest.mark.parametrize(("stage", "start"), [("base", "base"), ("refine", "base"), ("refine", "refiner")])
def test_nothing_is_named_beside_a_whole_model(places: dict[str, Path], stage: Stage, start: str) -> None:
    with pytest.raises(ConfigError, match=r"whole model of I2VGen-XL, which has its own: set model\.tokenizer=null$"):
        begin(stage, replace(model(places, start), tokenizer="pocket"), Parts(), OWN)
    with pytest.raises(ConfigError, match=r"which has its own: set hierarchy\.clip_tokens=4$"):
        begin(stage, model(places, start), PARTS, OWN)


def test_all_that_an_adapter_goes_without_is_named_at_once(places: dict[str, Path]) -> None:
    start, parts = replace(model(places, "base"), image_encoder="pocket"), Parts(detail_encoder=False)
    settings = I2VGenXLSettings(gamma=0.2, fade_in=300, text=False)
    words = (
        "model.image_encoder=null hierarchy.detail_encoder=true i2vgen_xl.text=null i2vgen_xl.gamma=null "
        "i2vgen_xl.fade_in=0"
    )
    with pytest.raises(ConfigError, match=f"has its own and stays as it is beside an adapter: set {words}$"):
        check_start("base", start, parts, settings, adapter=True)
    check_start("base", model(places, "base"), Parts(), OWN, adapter=True)
    check_start("base", model(places, "base"), Parts(), I2VGenXLSettings(gamma=0.2, fade_in=300))


@pytest.mark.parametrize(
    ("stage", "path", "message"),
    [
        ("base", None, r"refiner is a refiner, which stage=refine trains; stage=base begins with an image model, a"),
        ("base", "pocket-svd", r"pocket-svd is of family svd; stage=base begins with an image model, .* of I2VGen-XL$"),
        ("refine", "pocket-svd", r"pocket-svd is of family svd; stage=refine begins with .* I2VGen-XL, or a refiner$"),
    ],
)
def test_what_no_stage_begins_with_is_named(
    places: dict[str, Path], stage: Stage, path: str | None, message: str
) -> None:
    start = Model(path or str(places["refiner"]), image_encoder="pocket" if stage == "base" else None)
    with pytest.raises(ConfigError, match=message):
        begin(stage, start, Parts(), OWN)
    with pytest.raises(ConfigError, match=message):
        encoders(stage, start)


def test_an_adapter_needs_a_model_of_its_stage(places: dict[str, Path]) -> None:
    refuse_new("base", model(places, "base"))
    refuse_new("refine", model(places, "refiner"))
    with pytest.raises(ConfigError, match="no model of stage=base yet"):
        refuse_new("base", model(places, "text"))
    with pytest.raises(ConfigError, match="no model of stage=refine yet"):
        refuse_new("refine", model(places, "base"))
    assert FAMILY == "i2vgen_xl"
