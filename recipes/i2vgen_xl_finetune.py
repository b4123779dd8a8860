"""Train I2VGen-XL: a base stage that animates an image, and a refinement stage that draws its clips larger and sharper.

accelerate launch recipes/i2vgen_xl_finetune.py recipes/i2vgen_xl_base.yaml datasets/folder.yaml data.path=clips
    stage=base from Stable Diffusion 2.1: temporal layers and encoders of the first frame, all layers learning
accelerate launch recipes/i2vgen_xl_finetune.py recipes/i2vgen_xl_refine.yaml datasets/folder.yaml data.path=clips
    stage=refine, from that base: large clips, texts alone, the less noisy timesteps
accelerate launch recipes/i2vgen_xl_finetune.py recipes/i2vgen_xl_finetune.yaml datasets/folder.yaml data.path=clips
    the released weights on your clips, whole or beside an adapter
python recipes/i2vgen_xl_finetune.py recipes/i2vgen_xl_pocket_base.yaml
    the pocket model on the demo clips, on a CPU; i2vgen_xl_pocket_refine.yaml follows
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
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_model import Model
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.fitting import fitted
from inflate.training.adapting import Adapting
from inflate.training.card import ANIMATION_USE, UNPROMPTED_USE, drawn_as, refined_as
from inflate.training.economy import save_coding, save_memory
from inflate.training.encoding import i2vgen_xl_encoder
from inflate.training.held_out import of_size
from inflate.training.i2vgen_xl import I2VGenXLSettings, I2VGenXLTask, Preview
from inflate.training.i2vgen_xl_stages import FAMILIES, Parts, Stage, begin, check_stage, check_start, gamma_of
from inflate.training.inputs import refuse_draws
from inflate.training.loop import Result
from inflate.training.memory_settings import Memory
from inflate.training.noise import seed_of
from inflate.training.outcome import say
from inflate.training.processes import join_processes, let_one_tell
from inflate.training.recipe import conclude, fit_clips, given_by, open_clips
from inflate.training.refinement import RefinementPreview, RefinementTask
from inflate.training.settings import Training


@dataclass
class Config:
    """Settings of the recipe."""

    stage: Stage = "base"
    """base: first frames are animated; refine: enlarged clips are drawn anew, by their captions"""
    model: Model = field(default_factory=Model)
    hierarchy: Parts = field(default_factory=Parts)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    i2vgen_xl: I2VGenXLSettings = field(default_factory=I2VGenXLSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    memory: Memory = field(default_factory=Memory)
    sampling: Preview = field(default_factory=Preview)
    refining: RefinementPreview = field(default_factory=RefinementPreview)

    def __post_init__(self) -> None:
        """A stage has its own settings, and some go without effect beside others."""
        refuse_draws(self.data, self.stage)
        check_stage(self.stage, self.model, self.i2vgen_xl, self.hierarchy, self.training.steps)


def main(config: Config, arguments: list[str]) -> None:
    let_one_tell()
    config, foreseen = fitted(config, Path(__file__), arguments)
    say(train(config, foreseen), config.stage, config.training.output, foreseen)


def train(config: Config, foreseen: Mapping[str, int] | None = None) -> Result:
    """Load, extend where needed, fit, write the card; `foreseen` are peaks of memory to compare with."""
    start = config.stage, config.model, config.hierarchy, config.i2vgen_xl
    check_start(*start, adapter=config.adapter.kind != "none")
    dataset, held_out = open_clips(config, *config.model.places)
    torch.manual_seed(seed_of(config.training.seed, "model"))  # new layers' weights are drawn
    family = begin(*start)
    check_multiples(config.data.sizes, family.factor)
    if dataset.cache:
        dataset.read_encoded(i2vgen_xl_encoder(config.stage, family, config.data), "none")
    task = make_task(config, family, dataset, held_out)
    result = fit_clips(config, task, dataset, held_out, foreseen)
    if result.export and join_processes().is_main_process:
        finish(config, task, result)
    return result


def make_task(
    config: Config, family: I2VGenXL | Refiner, dataset: ClipDataset, held_out: ClipDataset
) -> I2VGenXLTask | RefinementTask:
    """The task of the stage; the family remembers of the clips what its export is to say."""
    settings, main, gamma = config.i2vgen_xl, config.data.main, gamma_of(config.i2vgen_xl, config.model)
    save_coding(family.vae, config.memory)
    text = isinstance(family, Refiner) or family.clips.prompts
    place = FAMILIES[config.stage], config.model.path, config.training.seed
    adapter = Adapting.on(family.unet, config.adapter, *place, text=text)
    given = given_by(config, settings, dataset, held_out, adapter)
    family.clips = settings.clips(family.clips, main, float(of_size(given.held_out, main)["fps"][0]))
    task: I2VGenXLTask | RefinementTask
    if isinstance(family, I2VGenXL):
        task = I2VGenXLTask(family, settings, config.sampling, given, gamma)
    else:
        task = RefinementTask(family, settings, config.refining, given, gamma)
    save_memory(family.unet, config.memory)
    return task


def finish(config: Config, task: I2VGenXLTask | RefinementTask, result: Result) -> None:
    """The before/after video and the card, whose command draws as previews were drawn."""
    gamma = gamma_of(config.i2vgen_xl, config.model)
    facts = {"learning rate of the image model's layers": f"{gamma:g} of the others'"}
    if isinstance(task, RefinementTask):
        use = refined_as(task.sampling.refinement, task.levels)
    else:
        use = drawn_as(ANIMATION_USE if task.reads_captions else UNPROMPTED_USE, task.sampling, Preview())
    conclude(config, result, f"I2VGen-XL, {config.stage}", use, facts)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with report_errors():
        main(configuration.from_command_line(Config), sys.argv[1:])
