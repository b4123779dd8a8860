"""What a run would cost, before it starts and without a GPU: its recipe's own task on paper, in a table."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from inflate.families import svd_outline, video_ldm_outline
from inflate.families.svd import SVD
from inflate.families.svd_model import Model
from inflate.families.video_ldm import VideoLDM
from inflate.tables import aligned
from inflate.training.cards import USABLE, Card
from inflate.training.cost import PHASES, Cost, on_paper
from inflate.training.encoding import ClipEncoder, TextClipEncoder, clip_encoder
from inflate.training.ladder import Rung, choose, climb
from inflate.training.paper import Paper

SHORT = {
    "sampling.steps": 1, "image_to_video.bands": 1, "text_to_video.bands": 1, "image_to_video.preview_clips": 1,
    "image_to_video.train_clips": 0, "text_to_video.train_clips": 0, "decoder.train_clips": 0,
    "decoder.held_out_clips": 1, "text_to_video.domain_adapter": None,
}  # fmt: skip
"""What repeats the same in the same memory is done once; what a domain adapter changes is kept outside of the GPU."""
CLIPS = 4
"""Clips on paper: as many as are measured together at most."""
GB = 1e9


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
            **self._content, "fps": torch.tensor(7.0), "motion": torch.tensor(0.0), "caption": "a clip",
            "origin": torch.zeros(4, dtype=torch.int64), "number": torch.tensor(int(number)), "name": f"clip {number}",
        }  # fmt: skip

    @cached_property
    def _content(self) -> dict[str, torch.Tensor]:
        pixels = self.paper.empty(self.bucket.frames, 3, self.bucket.height, self.bucket.width)
        if self.encoder is None:
            return {"pixels": pixels}
        made = {**self.encoder.starts(pixels[:1], [""]), **self.encoder.captions(["a clip"])}
        read = {"all": {"pixels": pixels}, "first": {"first": pixels[0]}}.get(self.frames, {})
        return {"latents": self.encoder.latents(pixels), **{name: value[0] for name, value in made.items()}, **read}


@dataclass(frozen=True)
class Planner:
    """A recipe and what it is given."""

    recipe: Path
    sources: Sequence[str]

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
        script, paper, size = sweep.load_script(self.recipe), Paper(), largest(config)
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

    def ladder(self) -> list[Rung]:
        """The run as asked and with one measure after the other; ConfigError for a stage that trains several models."""
        config = self.config()
        if getattr(config, "stage", "") == "demo":
            raise ConfigError("stage=demo trains two models in turn: plan stage=decoder or stage=image_to_video")
        return climb(configuration.flat(config), self.cost)

    def smaller(self, changes: Mapping[str, Any]) -> dict[str, Cost]:
        """What half as many frames and half the height and width would cost beside changes, by the settings."""
        config = self.config(changes)
        if config.data.buckets:
            return {}
        sides = {f"data.{name}": getattr(config.data, name) // 16 * 8 for name in ("height", "width")}
        options: list[dict[str, Any]] = [{"data.frames": max(2, config.data.frames // 2)}, sides]
        return {" ".join(assignments(option)): self.cost({**changes, **option}) for option in options}


def outline(config: Any) -> SVD | VideoLDM:
    """The model of a recipe's settings, without memory; temporal layers alone are of the shape of their image model."""
    path = config.model.image_model or config.model.path
    if isinstance(config.model, Model):
        return svd_outline.outline(path, config.model.image_encoder, config.data.main.frames)
    return video_ldm_outline.outline(path)


def encoder_of(family: SVD | VideoLDM, config: Any) -> ClipEncoder | TextClipEncoder:
    """What fills the cache of a run."""
    if isinstance(family, SVD):
        return clip_encoder(family, config.data, config.image_to_video)
    return TextClipEncoder(family, config.data.cache_dtype)


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


# --- what is printed --------------------------------------------------------------------------------------------------


def table(rungs: Sequence[Rung], card: Card | None) -> str:
    """The parts of the run as asked, then a line for each rung; sizes in GB."""
    asked = rungs[0].cost
    parts = {"weights": asked.weights, "frozen networks": asked.frozen, "gradients": asked.gradients,
             "optimiser": asked.optimizer, "average": asked.average}  # fmt: skip
    told = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts.items())
    phases = [phase for phase in PHASES if any(phase in rung.cost.peaks for rung in rungs)]
    timed = card is not None and card.timed
    head = ("GB at most", *phases, "in all", "TFLOP/step", *(("s/step, estimated",) if timed else ()), "for")
    lines = aligned([head, *(_line(rung, phases, card if timed else None) for rung in rungs)])
    return "\n".join([f"as asked, GB: {told}; {asked.trained / 1e6:,.1f} M parameters are trained", "", *lines])


def _line(rung: Rung, phases: Sequence[str], card: Card | None) -> tuple[str, ...]:
    cost = rung.cost
    sizes = [f"{cost.peaks.get(phase, 0) / GB:.2f}" for phase in phases]
    time = [] if card is None else [f"{card.seconds(cost.half_flops, cost.full_flops):.2f}"]
    name = rung.measure if not rung.price else f"+ {rung.measure}"
    return name, *sizes, f"{cost.peak / GB:.2f}", f"{cost.flops / 1e12:.2f}", *time, rung.price


def verdict(rung: Rung, card: Card) -> str:
    """What to add to a run's command so that it fits."""
    added = " ".join(assignments(rung.changes))
    told = f"fits {card}: {rung.cost.peak / GB:.2f} of {card.usable / GB:.2f} GB ({USABLE:.0%} of its memory)"
    return f"{told}; {f'add {added}' if added else 'as asked'}"


def refusal(planner: Planner, rungs: Sequence[Rung], card: Card) -> str:
    """By how much the smallest rung does not fit, and what would help."""
    least = min(rungs, key=lambda rung: rung.cost.peak)
    over = (least.cost.peak - card.usable) / GB
    helped = [f"{changes} ({cost.peak / GB:.2f} GB)" for changes, cost in planner.smaller(least.changes).items()]
    config = planner.config()
    adaptable = config.adapter.kind == "none" and config.stage != "decoder"
    helped += ["an adapter (adapters/temporal_lora.yaml)"] if adaptable else []
    return (
        f"nothing fits {card}: with {' '.join(assignments(least.changes)) or 'the run as asked'} it needs "
        f"{least.cost.peak / GB:.2f} GB ({least.cost.limit}), {over:.2f} GB more than the {card.usable / GB:.2f} that "
        f"may be filled; smaller are {' or '.join(helped) or 'smaller data.buckets'}"
    )


def plan(planner: Planner, card: Card | None, say: Callable[[str], None]) -> bool:
    """Print the table, and with a card the choice; whether there is one."""
    rungs = planner.ladder()
    say(table(rungs, card))
    if card is None:
        return True
    chosen = choose(rungs, card)
    say("\n" + (refusal(planner, rungs, card) if chosen is None else verdict(chosen, card)))
    return chosen is not None
