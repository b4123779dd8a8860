"""I2VGen-XL's two stages of training: what each begins with, and which settings go with it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import CLIPVisionModelWithProjection

from inflate.errors import ConfigError
from inflate.families import i2vgen_xl, i2vgen_xl_refiner, video_ldm, video_ldm_outline
from inflate.families.i2vgen_xl import Encoders, I2VGenXL
from inflate.families.i2vgen_xl_model import Model
from inflate.families.i2vgen_xl_refiner import Refiner, text_only
from inflate.families.video_ldm import Encoders as TextEncoding
from inflate.families.video_ldm import VideoLDM
from inflate.layers.hierarchy import Hierarchy
from inflate.models import folders
from inflate.models.image_encoders import encoder_folder, image_statistics, load_image_encoder, outline_image_encoder
from inflate.models.stable_diffusion import Encoding, TextToVideo, noise_for
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import MODELSCOPE
from inflate.objectives import DDPM
from inflate.training.denoising import check_drops
from inflate.training.i2vgen_xl import I2VGenXLSettings

log = logging.getLogger(__name__)

Stage = Literal["base", "refine"]
Trained = TypeVar("Trained", I2VGenXL, Refiner)
FAMILIES: dict[Stage, str] = {"base": i2vgen_xl.FAMILY, "refine": i2vgen_xl_refiner.FAMILY}
"""What an export of each stage is."""
CLIPS: dict[Stage, type[TrainedClips]] = {"base": i2vgen_xl.Clips, "refine": i2vgen_xl_refiner.Clips}
_BEGINNINGS = "an image model, a text-to-video model or a base of I2VGen-XL"
BEGINS: dict[str, str] = {"base": _BEGINNINGS, "refine": f"{_BEGINNINGS}, or a refiner"}
"""What each stage begins with."""
PAPER_GAMMA = 0.2
_OF_BASE = ("text", "drop_image", "drop_both", "fade_in")
_OF_REFINE = ("levels", "padded_rows")


@dataclass
class Parts:
    """What a model of the base stage is told of first frames that was told of none before."""

    detail_encoder: bool = True
    """channels beside the noisy latents, of the first frame's latent: what is where"""
    global_encoder: bool = True
    """64 context tokens of the first frame's latent"""
    clip_tokens: int = 4
    """context tokens of CLIP's embedding of the first frame: what it shows; 0: none"""


def begin(
    stage: Stage, model: Model, parts: Parts, settings: I2VGenXLSettings, weights: bool = True, adapter: bool = False
) -> I2VGenXL | Refiner:
    """The model that a stage trains; without `weights` its shape alone, on the meta device.

    CheckpointError, and ConfigError as of `check_start`.
    """
    check_start(stage, model, parts, settings, adapter)
    return _base(model, parts, settings, weights) if stage == "base" else _refiner(model, settings, weights)


def _base(model: Model, parts: Parts, settings: I2VGenXLSettings, weights: bool) -> I2VGenXL:
    if folders.family_of(model.path) == i2vgen_xl.FAMILY:
        saved = model.load() if weights else I2VGenXL.outline(model.path)
        _check_tokens(settings, saved.clips.prompts if settings.text is None else settings.text, saved.hierarchy)
        return _rescheduled(saved, settings)
    text = _text_to_video(model, weights)
    folder = encoder_folder(model.image_encoder or model.path)
    vision = load_image_encoder(folder) if weights else outline_image_encoder(folder)
    clips = i2vgen_xl.Clips(text.clips.frames, text.clips.fps)
    made = I2VGenXL.from_text_to_video(text, vision, clips, _hierarchy(parts, text, vision), _statistics(folder))
    return _rescheduled(made, settings)


def _refiner(model: Model, settings: I2VGenXLSettings, weights: bool) -> Refiner:
    family = folders.family_of(model.path)
    if family == i2vgen_xl_refiner.FAMILY:
        refiner = model.load_refiner() if weights else Refiner.outline(model.path)
    else:
        refiner = _refiner_of(_base_or_text(model, family, weights))
    if settings.padded_rows is not None:
        refiner.unet.pad_rows(settings.padded_rows)
    return _rescheduled(refiner, settings)


def _base_or_text(model: Model, family: str | None, weights: bool) -> TextToVideo:
    if family == i2vgen_xl.FAMILY:
        return model.load() if weights else I2VGenXL.outline(model.path)
    return _text_to_video(model, weights)


def _text_to_video(model: Model, weights: bool) -> VideoLDM:
    """The text-to-video model of a path; an image model is inflated by the layers of ModelScope and VGen."""
    if not weights:
        return video_ldm_outline.outline(model.image_model or model.path, model.tokenizer, MODELSCOPE)
    return VideoLDM.load(model.path, model.image_model, model.tokenizer, model.prediction, MODELSCOPE)


def _refiner_of(parent: TextToVideo) -> Refiner:
    if parent.base_scale != 1.0:
        log.warning(
            "the model that the refiner is made of rescales clean latents at noisy timesteps (base_scale %g), which a "
            "refiner's sampler does not: it learns to do without", parent.base_scale,
        )  # fmt: skip
    negative = parent.clips.negative if isinstance(parent, I2VGenXL) else ""
    clips = i2vgen_xl_refiner.Clips(parent.clips.frames, parent.clips.fps, negative=negative)
    return Refiner(text_only(parent.unet, parent.clips.fps), parent.vae, parent.text, parent.noise, clips)


def _hierarchy(parts: Parts, text: VideoLDM, vision: CLIPVisionModelWithProjection) -> Hierarchy:
    return Hierarchy(text.vae.config.latent_channels, int(vision.config.projection_dim), **asdict(parts))


def _statistics(folder: Path) -> Mapping[str, Any]:
    return image_statistics(folder, folder.parent / "feature_extractor")


def _changed(parts: Parts) -> list[str]:
    """The settings of parts that are not at their defaults."""
    return [each.name for each in fields(Parts) if getattr(parts, each.name) != each.default]


def _rescheduled(family: Trained, settings: I2VGenXLSettings) -> Trained:
    """A model, in place, on the noise schedule that is asked for."""
    if settings.schedule is not None:
        zero = settings.schedule == "cosine"
        family.noise = noise_for(DDPM("v_prediction", zero, schedule=settings.schedule))
        family.base_scale = 1.0  # the published schedules do not rescale latents
    return family


def encoders(stage: str, model: Model) -> Encoding:
    """The frozen networks of the model that a stage begins with; CheckpointError, ConfigError."""
    family = _family(stage, model)
    if family == i2vgen_xl.FAMILY:
        return Encoders.load(model.path)
    if family == i2vgen_xl_refiner.FAMILY:
        return i2vgen_xl_refiner.Encoders.load(model.path)
    text = TextEncoding.load(model.path, model.tokenizer, model.image_model)
    if stage == "refine":
        return text
    folder = encoder_folder(model.image_encoder or model.path)
    return Encoders(text.vae, text.text, load_image_encoder(folder), **_statistics(folder))


def gamma_of(settings: I2VGenXLSettings, model: Model) -> float:
    """The multiple of the learning rate at which the image model's layers learn."""
    if settings.gamma is not None:
        return settings.gamma
    return PAPER_GAMMA if folders.is_image_model(model.path) else 1.0


def check_stage(stage: Stage, model: Model, settings: I2VGenXLSettings, parts: Parts, steps: int) -> None:
    """Raise ConfigError for settings that a stage has not, or that go without effect."""
    others, other = (_OF_REFINE, "refine") if stage == "base" else (_OF_BASE, "base")
    changed = [name for name in others if getattr(settings, name) != getattr(I2VGenXLSettings(), name)]
    if changed:
        raise ConfigError(f"i2vgen_xl.{changed[0]} is for stage={other}: leave it out of stage={stage}")
    if stage == "refine" and _changed(parts):
        raise ConfigError(f"hierarchy.{_changed(parts)[0]} is for stage=base: a refiner is told texts alone")
    if model.image_encoder and stage == "refine":
        raise ConfigError(
            "model.image_encoder is for stage=base, a refiner sees no first frame: set model.image_encoder=null"
        )
    seen = (settings.drop_image, settings.drop_both) if stage == "base" else (0.0, 0.0)
    check_drops(settings.section, settings.drop_text, *seen)
    _check_tokens(settings, settings.text is not False, parts)
    if settings.fade_in >= steps:
        raise ConfigError(
            f"i2vgen_xl.fade_in={settings.fade_in}: a run of training.steps={steps} would end before first frames "
            "weigh as much as in sampling; make it shorter"
        )


def _check_tokens(settings: I2VGenXLSettings, text: bool, parts: Parts | Hierarchy) -> None:
    """Raise ConfigError where attention is left no token, or where those of first frames are to fade in beside none."""
    tokens = parts.global_encoder or parts.clip_tokens > 0
    if not (text or tokens):
        raise ConfigError(
            "i2vgen_xl.text=false leaves attention no token beside hierarchy.global_encoder=false and clip_tokens=0"
        )
    if settings.fade_in and not (text and tokens):
        lacking = "there is no text (i2vgen_xl.text)" if tokens else "the model has none (hierarchy)"
        raise ConfigError(
            f"i2vgen_xl.fade_in weighs the first frame's tokens beside the text's, and {lacking}: set it to 0"
        )


def goes_on(stage: Stage, model: Model) -> bool:
    """Whether a stage begins with a model of its own kind."""
    return folders.family_of(model.path) == FAMILIES[stage]


def check_start(stage: Stage, model: Model, parts: Parts, settings: I2VGenXLSettings, adapter: bool = False) -> None:
    """Raise ConfigError for a model that a stage, or an adapter, cannot begin with, or settings that it has its own of.

    No tensor is read; CheckpointError where there is no such model.
    """
    _family(stage, model)
    if adapter:
        refuse_new(stage, model)
    if reset := _to_reset(stage, model, parts, settings, adapter):
        words = " ".join(f"{name}={json.dumps(value)}" for name, value in reset.items())
        stays = " and stays as it is beside an adapter" if adapter else ""
        raise ConfigError(f"{model.path} is a whole model of I2VGen-XL, which has its own{stays}: set {words}")


def _family(stage: str, model: Model) -> str | None:
    """The family of the model that a stage begins with; ConfigError where it begins with others."""
    family = folders.family_of(model.path)
    if stage == "base" and family == i2vgen_xl_refiner.FAMILY:
        raise ConfigError(
            f"model.path: {model.path} is a refiner, which stage=refine trains; stage=base begins with {BEGINS[stage]}"
        )
    if family not in (None, video_ldm.FAMILY, *FAMILIES.values()):
        raise ConfigError(f"model.path: {model.path} is of family {family}; stage={stage} begins with {BEGINS[stage]}")
    return family


def _to_reset(
    stage: Stage, model: Model, parts: Parts, settings: I2VGenXLSettings, adapter: bool
) -> Mapping[str, object]:
    """The settings that a whole model of I2VGen-XL, or an adapter on it, goes without, and what they are to be."""
    if folders.family_of(model.path) not in FAMILIES.values():
        return {}
    own = ("image_encoder", "image_model", "tokenizer", "prediction")
    reset: dict[str, object] = {f"model.{name}": None for name in own if getattr(model, name)}
    reset |= {f"hierarchy.{name}": getattr(Parts(), name) for name in _changed(parts)}
    if adapter:
        file = folders.resolve(model.path, folders.CONFIGURATIONS) / folders.SETTINGS_FILE
        reset |= settings.unlike_base(CLIPS[stage].read(file))
    return reset


def refuse_new(stage: Stage, model: Model) -> None:
    """ConfigError for an adapter on a model that a stage has yet to make: whoever loads it needs its base."""
    if not goes_on(stage, model):
        raise ConfigError(
            f"adapter.kind: {model.path} is no model of stage={stage} yet, which an adapter would need as its base; "
            "train that first (adapter.kind=none) and start from its export, or from the published weights"
        )
