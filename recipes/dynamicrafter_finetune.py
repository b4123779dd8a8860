"""Let a text-to-video model animate an image, in DynamiCrafter's stages, or fine-tune one that does.

accelerate launch recipes/dynamicrafter_finetune.py recipes/dynamicrafter_context.yaml data.path=clips
    an image stream, on single images: a query transformer, and keys and values of its tokens beside those of the text
accelerate launch recipes/dynamicrafter_finetune.py recipes/dynamicrafter_adapt.yaml data.path=clips
    that stream in a text-to-video model, whose temporal layers stay as they are
accelerate launch recipes/dynamicrafter_finetune.py recipes/dynamicrafter_joint.yaml data.path=clips
    the image's latent beside the noisy ones as well, of a frame that is drawn for each sample
accelerate launch recipes/dynamicrafter_finetune.py recipes/dynamicrafter_finetune.yaml data.path=clips
    the published weights, or an export of stage=joint, on your clips
accelerate launch recipes/dynamicrafter_finetune.py recipes/dynamicrafter_interpolation.yaml data.path=clips
    the same, from a first to a last frame
python recipes/dynamicrafter_finetune.py recipes/dynamicrafter_pocket_context.yaml
    the pocket model on the demo clips, on a CPU; dynamicrafter_pocket_adapt.yaml and so on follow
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
from inflate.errors import report_errors
from inflate.families.dynamicrafter import FAMILY, DynamiCrafter
from inflate.families.dynamicrafter_model import Model
from inflate.fitting import fitted
from inflate.training import adapting
from inflate.training.adapting import Adapting
from inflate.training.card import ANIMATION_USE, BETWEEN_USE, STREAM_USE
from inflate.training.economy import save_coding, save_memory
from inflate.training.encoding import image_text_encoder
from inflate.training.held_out import of_size
from inflate.training.image_text_to_video import ImageTextToVideo, ImageTextToVideoTask, Preview
from inflate.training.inputs import refuse_draws
from inflate.training.loop import Result
from inflate.training.memory_settings import Memory
from inflate.training.noise import seed_of
from inflate.training.outcome import say
from inflate.training.processes import join_processes, let_one_tell
from inflate.training.recipe import conclude, fit_clips, given_by, open_clips
from inflate.training.settings import Training
from inflate.training.stages import Queries, Stage, begin, check_stage


@dataclass
class Config:
    """Settings of the recipe."""

    stage: Stage = "finetune"
    """context: the image stream alone, on images; adapt: that and the image model's layers, on clips; joint: the same,
    and the image's latent is shown, too; finetune: every layer, or an adapter"""
    model: Model = field(default_factory=Model)
    image_context: Queries = field(default_factory=Queries)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    image_text_to_video: ImageTextToVideo = field(default_factory=ImageTextToVideo)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    memory: Memory = field(default_factory=Memory)
    sampling: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        """A stage has its own start and its own clips; layers beside an adapter stay as they are."""
        refuse_draws(self.data, self.stage)
        ends = self.image_text_to_video.interpolation
        check_stage(self.stage, self.model, ends, self.data.sizes, self.image_context)
        if self.stage != "finetune":
            adapting.refuse_beside(self.adapter, "stage", self.stage)


LENGTHS = {
    "interpolate": "the queries of {} frames, interpolated over the clip (other_lengths=interpolate)",
    "share": "the tokens of {} frames' queries, shared by all frames (other_lengths=share)",
}
"""What a model attends to of an image in clips of another length than its training's, for the card."""


def main(config: Config, arguments: list[str]) -> None:
    let_one_tell()
    config, foreseen = fitted(config, Path(__file__), arguments)
    say(train(config, foreseen), config.stage, config.training.output, foreseen)


def train(config: Config, foreseen: Mapping[str, int] | None = None) -> Result:
    """Load, extend where the stage asks for it, fit, write the card; `foreseen` are peaks of memory to compare with."""
    dataset, held_out = open_clips(config, *config.model.places)
    torch.manual_seed(seed_of(config.training.seed, "model"))  # new layers' weights are drawn
    family = begin(config.stage, config.model, config.image_context, config.data.main.frames)
    check_multiples(config.data.sizes, family.factor)
    if dataset.cache:
        dataset.read_encoded(image_text_encoder(family, config.data, config.image_text_to_video), "none")
    task = make_task(config, family, dataset, held_out)
    result = fit_clips(config, task, dataset, held_out, foreseen)
    if result.export and join_processes().is_main_process:
        finish(config, family, result)
    return result


def make_task(
    config: Config, family: DynamiCrafter, dataset: ClipDataset, held_out: ClipDataset
) -> ImageTextToVideoTask:
    """The task; it says what the export has to remember of the clips: those of the main bucket."""
    settings, main = config.image_text_to_video.continuing(family.clips), config.data.main
    if config.adapter.kind != "none":
        settings.refuse_other(family.clips)
    save_coding(family.vae, config.memory)
    adapter = Adapting.on(family.unet, config.adapter, FAMILY, config.model.path, config.training.seed)
    given = given_by(config, settings, dataset, held_out, adapter)
    family.clips = settings.clips(family.clips, main, of_size(given.held_out, main))
    task = ImageTextToVideoTask(family, config.stage, settings, config.sampling, given)
    save_memory(family.unet, config.memory)
    return task


def finish(config: Config, family: DynamiCrafter, result: Result) -> None:
    """The before/after video and the card."""
    facts: dict[str, str] = {}
    drawing = BETWEEN_USE if family.clips.interpolation else ANIMATION_USE
    if (context := family.unet.image_context) is not None:
        facts["told"] = f"{family.clips.told}, {family.clips.usual:g} unless asked otherwise"
        facts["clips of another length"] = LENGTHS[context.other_lengths].format(context.frames)
    if config.model.image_stream:
        facts["image stream"] = config.model.image_stream
    use = STREAM_USE if config.stage == "context" else drawing
    conclude(config, result, f"DynamiCrafter, {config.stage}", use, facts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with report_errors():
        main(configuration.from_command_line(Config), sys.argv[1:])
