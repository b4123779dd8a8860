"""DynamiCrafter's stages of training: what each begins with, and which settings go with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from transformers import CLIPVisionModelWithProjection

from inflate.data.buckets import Bucket
from inflate.errors import CheckpointError, ConfigError
from inflate.families import video_ldm_outline
from inflate.families.dynamicrafter import FAMILY, Clips, DynamiCrafter, Encoders
from inflate.families.dynamicrafter_model import Model
from inflate.families.video_ldm import Encoders as TextEncoders
from inflate.families.video_ldm import VideoLDM
from inflate.layers.image_context import ImageContext, OtherLengths
from inflate.models import folders, image_stream
from inflate.models.image_encoders import encoder_folder, outline_image_encoder

log = logging.getLogger(__name__)

Stage = Literal["context", "adapt", "joint", "finetune"]
FROM_TEXT: tuple[Stage, ...] = ("context", "adapt")
"""Stages that begin with a model that sees no image."""


@dataclass
class Queries:
    """The query transformer that stage=context creates; the defaults are DynamiCrafter's."""

    width: int = ImageContext.width
    """channels of its layers"""
    depth: int = ImageContext.depth
    """layers"""
    heads: int = ImageContext.heads
    """attention heads of each layer"""
    head_width: int = ImageContext.head_width
    """channels of a head"""
    queries: int = ImageContext.queries
    """tokens that it makes of an image for each frame"""
    frames: int = ImageContext.frames
    """length of stage=adapt's clips, for each frame of which the queries will be repeated: they weigh as so many"""
    other_lengths: OtherLengths | None = None
    """of every stage, clips of another length than those of adapt: interpolate = the queries of frames are interpolated
    over the clip; share = every frame attends to the tokens of all; null: as the model has it that a stage begins with,
    interpolate of a new one"""


def begin(stage: Stage, model: Model, queries: Queries, frames: int) -> DynamiCrafter:
    """The model that a stage trains, for clips of so many frames; CheckpointError."""
    refuse_stream(stage, model.path)
    family = _from_text(stage, model, queries, frames) if stage in FROM_TEXT else model.load()
    say_order(stage, family, model.path)
    if stage == "joint":
        family.take_detail()
    if queries.other_lengths is not None:
        family.unet.set_other_lengths(queries.other_lengths)
    return family


def say_order(stage: Stage, family: DynamiCrafter, path: str) -> None:
    """Warn where a stage that comes before has been left out, or is done again."""
    if stage == "finetune" and not family.takes_detail:
        log.warning(
            "%s is shown no latent of its image, which stage=joint adds: stage=finetune leaves it so, and clips begin "
            "with another frame than the image",
            path,
        )
    if stage == "joint" and family.takes_detail:
        log.warning("%s has been through stage=joint: this trains on, all layers but the temporal ones", path)
    if stage == "finetune" and family.clips.interpolation:
        log.info("%s goes from a first to a last frame: so do its clips here, unless interpolation is set", path)


def _from_text(stage: Stage, model: Model, queries: Queries, frames: int) -> DynamiCrafter:
    if stage == "adapt":
        refuse_image_model(model.path)
    text = VideoLDM.load(model.path, model.image_model, model.tokenizer, model.prediction)
    encoders = model.encoders(text)
    context = None
    if stage == "context":
        context = new_context(queries, encoders.image_encoder)
    else:
        image_stream.load(text.unet, encoders.image_encoder, folders.resolve(str(model.image_stream)), frames)
    clips = Clips(frames, text.clips.fps, text.clips.height, text.clips.width)
    return DynamiCrafter.from_text_to_video(text, encoders.image_encoder, clips, context, encoders.statistics)


def refuse_stream(stage: Stage, path: str) -> None:
    """CheckpointError for an image stream alone in place of the model that a stage begins with."""
    if image_stream.is_in(Path(path).expanduser()):
        raise CheckpointError(
            f"model.path={path} is an image stream alone, the export of stage=context, and no model that "
            f"stage={stage} begins with: stage=adapt makes one of it and a text-to-video model, by "
            f"model.image_stream={path}"
        )


def refuse_image_model(path: str) -> None:
    """CheckpointError for a model that draws images: its temporal layers would stay as they are, and do nothing."""
    if folders.is_image_model(path):
        raise CheckpointError(
            f"{path} is an image model, and stage=adapt trains no temporal layers: name a text-to-video model as "
            "model.path, such as an export of recipes/video_ldm_finetune.py or a converted one"
        )


def outline(stage: Stage, model: Model, queries: Queries, frames: int) -> DynamiCrafter:
    """The shape of that model, of which no weights are read; CheckpointError where a configuration is missing."""
    refuse_stream(stage, model.path)
    if stage not in FROM_TEXT:
        family = DynamiCrafter.outline(model.path)
        if stage == "joint":
            family.take_detail()
        return family
    text = video_ldm_outline.outline(model.image_model or model.path, model.tokenizer)
    vision = outline_image_encoder(encoder_folder(model.image_encoder or model.path))
    context = new_context(queries, vision)
    if stage == "adapt":
        refuse_image_model(model.path)
        context = replace(image_stream.context_of(folders.resolve(str(model.image_stream))), frames=frames)
    return DynamiCrafter.from_text_to_video(text, vision, Clips(frames), context)


def new_context(queries: Queries, encoder: CLIPVisionModelWithProjection) -> ImageContext:
    """The image context that stage=context creates: one group of queries, for what the encoder tells."""
    sizes = {name: value for name, value in asdict(queries).items() if value is not None}
    return ImageContext(encoder.config.hidden_size, **{**sizes, "counted": queries.frames, "frames": 1})


def named(stage: str, path: str) -> Stage | None:
    """The stage of this name, of a run from this model; None where it is another recipe's.

    Text-to-video has a stage `joint`, too, which begins with another family's model.
    """
    stages: dict[str, Stage] = {one: one for one in get_args(Stage)}
    if stage == "joint" and folders.family_of(path) != FAMILY:
        return None
    return stages.get(stage)


def encoders(stage: Stage, model: Model) -> Encoders:
    """The frozen networks of that model; CheckpointError."""
    refuse_stream(stage, model.path)
    if stage not in FROM_TEXT:
        return Encoders.load(model.path)
    return model.encoders(TextEncoders.load(model.path, model.tokenizer, model.image_model))


def check_stage(
    stage: Stage, model: Model, interpolation: bool | None, sizes: Sequence[Bucket], queries: Queries | None = None
) -> None:
    """Raise ConfigError for settings of the model, of its clips or of the way of training that a stage has not."""
    if (stage == "adapt") != (model.image_stream is not None):
        raise ConfigError(
            "model.image_stream: stage=adapt begins with the export of a run of stage=context, which it names; "
            f"stage={stage} {'lacks it' if stage == 'adapt' else 'takes none'}"
        )
    given = [name for name in ("image_encoder", "image_model", "tokenizer", "prediction") if getattr(model, name)]
    if given and stage not in FROM_TEXT:
        raise ConfigError(f"model.{given[0]}: stage={stage} begins with a whole DynamiCrafter folder: set it to null")
    created = replace(queries or Queries(), other_lengths=None)
    changed = [one.name for one in fields(Queries) if getattr(created, one.name) != getattr(Queries(), one.name)]
    if changed and stage != "context":
        raise ConfigError(
            f"image_context.{changed[0]}: stage=context alone creates a query transformer, and stage={stage} begins "
            "with a model that has one: leave it out"
        )
    if interpolation and stage in FROM_TEXT:
        raise ConfigError(
            f"image_text_to_video.interpolation=true: stage={stage} shows the model no latents of images; set it in "
            "stage=joint or finetune"
        )
    videos = [bucket for bucket in sizes if bucket.frames > 1]
    if stage == "context" and videos:
        raise ConfigError(
            f"data: bucket {videos[0]} has several frames, and stage=context trains on single images: set "
            "data.frames=1, which takes any frame of a clip"
        )
    if stage != "context" and len(videos) < len(sizes):
        raise ConfigError(f"data: stage={stage} trains on clips: leave out the buckets of one frame")
