"""Align an image model to text-to-video (Video LDM): its image layers on frames, then temporal layers between them.

accelerate launch recipes/video_ldm_finetune.py recipes/video_ldm_temporal.yaml datasets/folder.yaml data.path=clips
    temporal layers between those of Stable Diffusion, which stay as they are
accelerate launch recipes/video_ldm_finetune.py recipes/video_ldm_spatial.yaml datasets/folder.yaml data.path=clips
    before that: the image layers on single frames, where the clips look unlike what the image model draws
accelerate launch recipes/video_ldm_finetune.py recipes/video_ldm_sdxl.yaml datasets/folder.yaml data.path=clips
    temporal layers between those of Stable Diffusion XL
accelerate launch recipes/video_ldm_finetune.py recipes/video_ldm_pocket.yaml
    the pocket model on the demo clips, on a CPU
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from inflate import config as configuration
from inflate.adapters.settings import AdapterSettings
from inflate.data.buckets import check_multiples
from inflate.data.clips import ClipDataset
from inflate.data.settings import Data
from inflate.errors import ConfigError, report_errors
from inflate.families.video_ldm import FAMILY, Clips, Model, VideoLDM
from inflate.fitting import fitted
from inflate.training.adapting import Adapting
from inflate.training.card import TEXT_USE
from inflate.training.economy import save_coding, save_memory
from inflate.training.encoding import TextClipEncoder
from inflate.training.held_out import of_size
from inflate.training.inputs import refuse_draws
from inflate.training.loop import Result
from inflate.training.memory_settings import Memory
from inflate.training.noise import seed_of
from inflate.training.outcome import say
from inflate.training.processes import join_processes, let_one_tell
from inflate.training.recipe import conclude, fit_clips, given_by, open_clips
from inflate.training.settings import Training
from inflate.training.text_to_video import Preview, Stage, TextToVideo, TextToVideoTask


@dataclass
class Config:
    """Settings of the recipe."""

    stage: Stage = "temporal"
    """spatial: the image model's layers, on single frames; temporal: the temporal layers, on clips; joint: all, on
    clips and images; beside an adapter, which of these ways the clips are shown to it"""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    text_to_video: TextToVideo = field(default_factory=TextToVideo)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    memory: Memory = field(default_factory=Memory)
    sampling: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        """An image teaches temporal layers nothing: it bypasses them. They alone learn on top of a domain adapter."""
        refuse_draws(self.data, self.stage)
        if self.text_to_video.domain_adapter is not None and (self.stage, self.adapter.kind) != ("temporal", "none"):
            raise ConfigError(
                "text_to_video.domain_adapter lies below temporal layers that learn themselves: stage=temporal and "
                f"adapter.kind=none, not stage={self.stage} and adapter.kind={self.adapter.kind}"
            )
        if self.text_to_video.domain_adapter is not None and self.memory.base != "as_loaded":
            raise ConfigError(
                f"text_to_video.domain_adapter is merged into weights, and memory.base={self.memory.base} stores them "
                "rounded: set memory.base=as_loaded"
            )
        single = [bucket for bucket in self.data.sizes if bucket.frames == 1]
        if single and self.stage == "temporal":
            raise ConfigError(
                f"data: bucket {single[0]} has one frame, and images bypass the temporal layers, which are all that "
                "stage=temporal trains; leave it out, or set stage=joint"
            )


def main(config: Config, arguments: list[str]) -> None:
    let_one_tell()
    config, foreseen = fitted(config, Path(__file__), arguments)
    say(train(config, foreseen), config.stage, config.training.output, foreseen)


def train(config: Config, foreseen: Mapping[str, int] | None = None) -> Result:
    """Load, inflate where needed, fit, write the card; `foreseen` are peaks of memory to compare with."""
    model, below = config.model, config.text_to_video.domain_adapter
    dataset, held_out = open_clips(config, model.path, model.tokenizer, model.image_model, adapter=below)
    torch.manual_seed(seed_of(config.training.seed, "model"))  # inflation draws the new layers' weights
    family = model.load()
    check_multiples(config.data.sizes, family.factor)
    if dataset.cache:
        dataset.read_encoded(TextClipEncoder(family, config.data.cache_dtype), "none")
    task = make_task(config, family, dataset, held_out)
    result = fit_clips(config, task, dataset, held_out, foreseen)
    if result.export and join_processes().is_main_process:
        finish(config, result)
    return result


def make_task(config: Config, family: VideoLDM, dataset: ClipDataset, held_out: ClipDataset) -> TextToVideoTask:
    """The task; it says what the export has to remember of the clips: those of the main bucket."""
    settings, main = config.text_to_video, config.data.main
    save_coding(family.vae, config.memory)
    place, over = (FAMILY, config.model.path, config.training.seed), config.model.image_model
    adapter = Adapting.on(family.unet, config.adapter, *place, image_only=config.stage == "spatial", image_model=over)
    given = given_by(config, settings, dataset, held_out, adapter)
    family.clips = Clips(main.frames, float(of_size(given.held_out, main)["fps"][0]), main.height, main.width)
    task = TextToVideoTask(family, config.stage, settings, config.sampling, given)
    save_memory(family.unet, config.memory)
    return task


def finish(config: Config, result: Result) -> None:
    """The before/after video and the card."""
    below = config.text_to_video.domain_adapter
    facts = {"trained on top of, and exported without": below} if below else {}
    conclude(config, result, f"Text-to-video, {config.stage}", TEXT_USE, facts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with report_errors():
        main(configuration.from_command_line(Config), sys.argv[1:])
