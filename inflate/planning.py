"""What a run would cost, before it starts and without a GPU: its recipe's own task on paper."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from inflate import config as configuration
from inflate import sweep
from inflate.data.buckets import Bucket, check_multiples
from inflate.data.clips import collate
from inflate.data.settings import Data
from inflate.errors import ConfigError
from inflate.families import dynamicrafter_model, i2vgen_xl_model, svd_outline, video_ldm_outline
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.svd import SVD
from inflate.families.svd_model import Model
from inflate.families.video_ldm import VideoLDM
from inflate.training import i2vgen_xl_stages, stages
from inflate.training.cost import Cost, on_paper
from inflate.training.encoding import ClipEncoder, TextClipEncoder, clip_encoder, i2vgen_xl_encoder, image_text_encoder
from inflate.training.ladder import Step, steps
from inflate.training.paper import Paper

SHORT = {
    "sampling.steps": 1, "image_to_video.bands": 1, "text_to_video.bands": 1, "image_to_video.preview_clips": 1,
    "image_to_video.train_clips": 0, "text_to_video.train_clips": 0, "decoder.train_clips": 0,
    "decoder.held_out_clips": 1, "text_to_video.domain_adapter": None, "image_text_to_video.bands": 1,
    "image_text_to_video.train_clips": 0, "i2vgen_xl.bands": 1, "i2vgen_xl.train_clips": 0, "refining.steps": 1,
}  # fmt: skip
"""What repeats the same in the same memory is done once; what a domain adapter changes is kept outside of the GPU."""
LAUNCHED = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_")
"""How names begin of what a launcher tells the processes of a run."""
MOST_WORKERS = 8
Family = SVD | VideoLDM | DynamiCrafter | I2VGenXL | Refiner
CLIPS = 4
"""Clips on paper: as many as are measured together at most."""


@dataclass(frozen=True)
class ClipsOnPaper:
    """Clips of one size without pixels, as a recipe's datasets give them."""

    data: Data
    paper: Paper
    bucket: Bucket
    encoder: ClipEncoder | TextClipEncoder | None = None
    """what the cache has been filled by, where there is one"""
    frames: str = "all"
    """which frames are read beside the cache"""
    count: int = CLIPS
    """how many there are"""

    @property
    def cache(self) -> str | None:
        """The cache's folder."""
        return self.data.cache

    @property
    def windows(self) -> list[tuple[None, ClipsOnPaper]]:
        """A window of each clip, which tells its bucket."""
        return [(None, self)] * len(self)

    def motion_scores(self) -> list[float]:
        """How much the clips move."""
        return [0.0]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Any:
        return {
            **self._content, "fps": torch.tensor(7.0), "stride": torch.tensor(1.0), "motion": torch.tensor(0.0),
            "origin": torch.zeros(4, dtype=torch.int64), "number": torch.tensor(int(number)), "name": f"clip {number}",
            "caption": "a clip",
        }  # fmt: skip

    @cached_property
    def _content(self) -> dict[str, torch.Tensor]:
        pixels = self.paper.empty(self.bucket.frames, 3, self.bucket.height, self.bucket.width)
        if self.encoder is None:
            return {"pixels": pixels}
        made = {**self.encoder.starts(pixels[:1], [""]), **self.encoder.captions(["a clip"])}
        read = {"all": {"pixels": pixels}, "first": {"first": pixels[0]}}.get(self.frames, {})
        framed = {"latents": self.encoder.latents(pixels), **self.encoder.of_frames(pixels)}
        return {**framed, **{name: value[0] for name, value in made.items()}, **read}


@dataclass(frozen=True)
class Planner:
    """A recipe and what it is given."""

    recipe: Path
    sources: Sequence[str]
    gpu: bool = True
    """whether the run is on a GPU, or on a CPU"""

    @cached_property
    def schema(self) -> Any:
        """The dataclass of the recipe's settings; ConfigError where it has none, or no task to plan."""
        schema: Any = sweep.schema_of(self.recipe)
        if not hasattr(sweep.load_script(self.recipe), "make_task"):
            raise ConfigError(f"{self.recipe} has no make_task to plan; name a script such as recipes/svd_finetune.py")
        return schema

    def config(self, changes: Mapping[str, Any] | None = None) -> Any:
        """The settings, with changes laid over what is given; ConfigError as of a run."""
        return configuration.load(self.schema, [*self.sources, *assignments(changes or {})])

    def cost(self, changes: Mapping[str, Any]) -> Cost:
        """What a run with these changes costs."""
        os.environ["ACCELERATE_USE_CPU"] = "true"  # a recipe asks for the device, which is on paper here
        short = {name: value for name, value in SHORT.items() if name in configuration.names(self.schema)}
        config = self.config({**changes, **short})
        script, paper, size = sweep.load_script(self.recipe), Paper(self.gpu), largest(config)
        with paper.active():
            family = outline(config)
            check_multiples([size], 2 ** (len(family.vae.config.block_out_channels) - 1))
            for network in family.parts.values():
                paper.adopt(network)
            encoder = encoder_of(family, config) if config.data.cache else None
            frames = script.frames_encoded(config) if isinstance(family, SVD) else "none"
            clips = ClipsOnPaper(config.data, paper, size, encoder, frames)
            # Of held-out clips as many as are measured together cost what all do; of prompts, all are drawn together.
            few = config.data.smallest_batch(config.training.batch) if isinstance(family, SVD) else CLIPS
            held_out = ClipsOnPaper(config.data, paper, size, count=min(CLIPS, few))
            task = script.make_task(config, family, clips, held_out)
            batch = collate([clips[number] for number in range(batch_of(config, size))])
        return on_paper(task, config.training, batch, paper)

    def steps(self) -> list[Step]:
        """The run as asked and with one measure after the other; ConfigError for a stage that trains several models."""
        config = self.config()
        if getattr(config, "stage", "") == "demo":
            raise ConfigError("stage=demo trains two models in turn: plan stage=decoder or stage=image_to_video")
        return steps(configuration.flat(config))

    def smaller(self, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Half as many frames, and half the height and width; nothing where buckets say the sizes."""
        data = self.config(changes).data
        sides = {f"data.{name}": getattr(data, name) // 16 * 8 for name in ("height", "width")}
        return [] if data.buckets else [{"data.frames": max(2, data.frames // 2)}, sides]


def costs(planner: Planner, wanted: Sequence[Mapping[str, Any]]) -> Iterator[Cost]:
    """What the run costs with each of several changes, worked out side by side in processes of their own.

    A run's own process cannot do it: it knows a GPU, and perhaps other processes.
    """
    known = partial(_cost, planner.recipe, [*planner.sources], planner.gpu)
    with ProcessPoolExecutor(workers(len(wanted)), get_context("spawn"), _forget_devices) as pool:
        yield from pool.map(known, wanted)


def workers(most: int) -> int:
    """How many costs are worked out at once."""
    return max(1, min(most, os.cpu_count() or 1, MOST_WORKERS))


def _cost(recipe: Path, sources: list[str], gpu: bool, changes: Mapping[str, Any]) -> Cost:
    return Planner(recipe, sources, gpu).cost(changes)


def _forget_devices() -> None:
    """Leave the GPUs and the other processes of the run that asks out of it."""
    for variable in [name for name in os.environ if name.startswith(LAUNCHED)]:
        del os.environ[variable]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def outline(config: Any) -> Family:
    """The model of a recipe's settings, without memory; temporal layers alone are of the shape of their image model."""
    if isinstance(config.model, dynamicrafter_model.Model):
        return stages.outline(config.stage, config.model, config.image_context, config.data.main.frames)
    if isinstance(config.model, i2vgen_xl_model.Model):
        settings, adapter = (config.hierarchy, config.i2vgen_xl), config.adapter.kind != "none"
        return i2vgen_xl_stages.begin(config.stage, config.model, *settings, weights=False, adapter=adapter)
    path = config.model.image_model or config.model.path
    if isinstance(config.model, Model):
        frames = config.model.frames or config.data.main.frames
        return svd_outline.outline(path, config.model.image_encoder, frames)
    return video_ldm_outline.outline(path, config.model.tokenizer)


def encoder_of(family: Family, config: Any) -> ClipEncoder | TextClipEncoder:
    """What fills the cache of a run."""
    if isinstance(family, SVD):
        return clip_encoder(family, config.data, config.image_to_video)
    if isinstance(family, DynamiCrafter):
        return image_text_encoder(family, config.data, config.image_text_to_video)
    if isinstance(family, I2VGenXL | Refiner):
        return i2vgen_xl_encoder(config.stage, family, config.data)
    return TextClipEncoder(family, config.data.cache_dtype)


def adaptable(config: Any) -> bool:
    """Whether a run might train an adapter instead of its model's own weights."""
    if isinstance(config.model, i2vgen_xl_model.Model):
        return config.adapter.kind == "none" and i2vgen_xl_stages.goes_on(config.stage, config.model)
    animates = isinstance(config.model, dynamicrafter_model.Model)
    return config.adapter.kind == "none" and (config.stage == "finetune" if animates else config.stage != "decoder")


def largest(config: Any) -> Bucket:
    """The bucket whose batches are the largest, of videos where there are any."""
    videos = [bucket for bucket in config.data.sizes if bucket.frames > 1]
    return max(videos or config.data.sizes, key=lambda one: batch_of(config, one) * one.frames * one.height * one.width)


def batch_of(config: Any, bucket: Bucket) -> int:
    """Clips of a bucket in one forward pass."""
    return int(config.data.batch(bucket, config.training.batch))


def assignments(changes: Mapping[str, Any]) -> list[str]:
    """Settings as they are written on a command line."""
    return [
        f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for name, value in changes.items()
    ]
