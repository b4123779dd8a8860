"""Fine-tune Stable Video Diffusion: its temporal decoder, or its UNet to animate an image.

accelerate launch recipes/svd_finetune.py
    the demo: inflates the pocket Stable Diffusion and fine-tunes both on rendered clips, on a CPU, in minutes
accelerate launch recipes/svd_finetune.py recipes/svd_image_to_video.yaml datasets/folder.yaml data.path=clips
    the published weights on your clips
accelerate launch recipes/svd_finetune.py recipes/svd_decoder.yaml datasets/folder.yaml data.path=clips
    the temporal decoder against a video discriminator
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from inflate import config as configuration
from inflate.adapters.settings import AdapterSettings
from inflate.data.buckets import Bucket, check_multiples
from inflate.data.clips import Batch, ClipDataset, Frames, collate
from inflate.data.demo_clips import build
from inflate.data.settings import Data
from inflate.errors import ConfigError, DataError, report_errors
from inflate.families.svd import FAMILY, SVD, MotionBuckets
from inflate.families.svd_model import Model
from inflate.fitting import fitted
from inflate.training import adapting
from inflate.training.adapting import Adapting
from inflate.training.card import image_use
from inflate.training.decoder import Decoder, DecoderTask
from inflate.training.economy import save_coding, save_memory
from inflate.training.encoding import clip_encoder
from inflate.training.held_out import first_clips, join, of_size
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.inputs import refuse_draws
from inflate.training.loop import Result
from inflate.training.memory_settings import Memory
from inflate.training.noise import seed_of
from inflate.training.outcome import say
from inflate.training.processes import join_processes, let_one_tell, together
from inflate.training.recipe import conclude, fit_clips, open_clips
from inflate.training.settings import Training

HERE = Path(__file__).parent
DEMO = {"decoder": HERE / "svd_demo_decoder.yaml", "image_to_video": HERE / "svd_demo_image_to_video.yaml"}


@dataclass
class Config:
    """Settings of the recipe."""

    stage: Literal["demo", "decoder", "image_to_video"] = "demo"
    """what to train; demo trains both, one after the other, on clips that it renders"""
    demo_clips: int = 600
    """training clips that the demo renders"""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    training: Training = field(default_factory=Training)
    decoder: Decoder = field(default_factory=Decoder)
    image_to_video: ImageToVideo = field(default_factory=ImageToVideo)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    memory: Memory = field(default_factory=Memory)
    sampling: Preview = field(default_factory=Preview)

    def __post_init__(self) -> None:
        """A decoder's temporal layers and its video discriminator learn nothing from single frames."""
        single = [bucket for bucket in self.data.sizes if bucket.frames == 1]
        if single and self.stage != "image_to_video":
            raise ConfigError(f"data: bucket {single[0]} has one frame; stage={self.stage} needs two or more")
        if self.stage == "decoder":
            refuse_draws(self.data, self.stage)
            if self.memory.decode_bf16:
                raise ConfigError(
                    "memory.decode_bf16 rounds previews; what stage=decoder computes in, training.precision says"
                )
            if self.training.precision == "pure_bf16":
                raise ConfigError(
                    "training.precision=pure_bf16 rounds the weights of the VAE, of which stage=decoder has to "
                    "leave the encoder as it is; use bf16"
                )
        if self.stage != "image_to_video":
            adapting.refuse_beside(self.adapter, "stage", self.stage)
            if self.memory.base != "as_loaded":
                raise ConfigError(
                    f"memory.base={self.memory.base} is for the UNet's weights beside what learns of it; stage="
                    f"{self.stage} trains a decoder: set memory.base=as_loaded"
                )
        if self.image_to_video.trainable != "all":
            adapting.refuse_beside(self.adapter, "image_to_video.trainable", self.image_to_video.trainable)
        if len(single) == len(self.data.sizes):
            raise ConfigError(f"data: no bucket has two frames or more, only {', '.join(map(str, single))}")


def main(config: Config, arguments: list[str]) -> None:
    let_one_tell()
    config, foreseen = fitted(config, Path(__file__), arguments)
    if config.stage == "demo":
        demo(config, arguments)
    else:
        say(train(config, foreseen), config.stage, config.training.output, foreseen)


def demo(config: Config, arguments: list[str]) -> None:
    """Both stages on rendered clips: the second starts from what the first exported."""
    if (config.data.path, config.data.source) != (Data().path, Data().source):
        raise ConfigError(
            f"data.path={config.data.path}: the demo renders its own clips; to train on yours, add "
            "recipes/svd_image_to_video.yaml or recipes/svd_decoder.yaml, or set stage"
        )
    output = config.training.output
    clips = output / "clips"
    with together():
        if join_processes().is_main_process:
            build(clips, clips=config.demo_clips, held_out=32)
    start = config.model.path
    for stage, settings in DEMO.items():
        finished = output / stage / "export"
        if config.training.resume == "latest" and finished.is_dir() and stage != list(DEMO)[-1]:
            start = str(finished)
            continue
        fixed = [f"stage={stage}", f"data.path={clips}", f"training.output={output / stage}", f"model.path={start}"]
        config = configuration.load(Config, [str(settings), *arguments, *fixed])
        say(train(config), config.stage, config.training.output)
        start = str(config.training.output / "export")


def train(config: Config, foreseen: Mapping[str, int] | None = None) -> Result:
    """One stage: load, inflate where needed, fit, write the card; `foreseen` are peaks of memory to compare with."""
    model = config.model
    dataset, held_out = open_clips(config, model.path, model.image_encoder, model.image_model)
    torch.manual_seed(seed_of(config.training.seed, "model"))  # inflation draws the new layers' weights
    family = model.load(config.data.main.frames)
    check_multiples(config.data.sizes, family.factor)
    if dataset.cache:
        dataset.read_encoded(clip_encoder(family, config.data, config.image_to_video), frames_encoded(config))
    task = make_task(config, family, dataset, held_out)
    result = fit_clips(config, task, dataset, held_out, foreseen)
    if result.export and join_processes().is_main_process:
        finish(config, result)
    return result


def frames_encoded(config: Config) -> Frames:
    """Which frames of a sample are read as pixels beside what is cached of it."""
    if config.stage == "decoder":
        return "all"
    return "none" if config.data.cache_draws else "first"


def make_task(
    config: Config, family: SVD, dataset: ClipDataset, held_out: ClipDataset
) -> DecoderTask | ImageToVideoTask:
    """The task of the stage; it says what the export has to remember of the clips: those of the main bucket."""
    training, main, device = config.training, config.data.main, join_processes().device
    save_coding(family.vae, config.memory)
    if config.stage == "decoder":
        batches = held_out_in_main(held_out, main, config.decoder.held_out_clips)
        fps = float(batches[0]["fps"][0])
        family.decode_chunk = main.frames  # the chunk of training is the chunk of decoding
        family.vae.to(device)  # the others stay where they take no memory of the GPU
        pixels = join(batches)["pixels"]
        known = [dataset[n]["pixels"] for n in numbers_in(dataset, main)[: config.decoder.train_clips]]
        save_memory(family.vae, config.memory)
        return DecoderTask(family.vae, config.decoder, pixels, family.save_pretrained, training.seed, fps, known)
    settings, over = config.image_to_video, config.model.image_model
    batches, known = first_clips(held_out, settings.held_out_clips), first_clips(dataset, settings.train_clips)
    adapter = Adapting.on(family.unet, config.adapter, FAMILY, config.model.path, training.seed, image_model=over)
    task = ImageToVideoTask(
        family, settings, batches, config.sampling, training.lr, training.seed, known,
        frames_encoded(config) if config.data.cache else "all", adapter, config.data.smallest_batch(training.batch),
    )  # fmt: skip
    save_memory(family.unet, config.memory)
    family.frames, family.height, family.width = main.frames, main.height, main.width
    family.fps = float(of_size(task.shown, main)["fps"][0])
    family.motion = MotionBuckets.fit(dataset.motion_scores())
    return task


def held_out_in_main(held_out: ClipDataset, main: Bucket, most: int) -> list[Batch]:
    """The first held-out clips of the main bucket: a decoder is measured in one size, as its spectra are."""
    numbers = numbers_in(held_out, main)
    if not numbers:
        raise DataError(f"no held-out clip is in bucket {main}: list first, in data.buckets, a bucket that has some")
    if len(numbers) < len(held_out):
        logging.info("the decoder is measured on the held-out clips of bucket %s: %d", main, len(numbers))
    return [collate([held_out[number]]) for number in numbers[:most]]


def numbers_in(clips: ClipDataset, bucket: Bucket) -> list[int]:
    """The samples of a bucket in the first epoch."""
    return [number for number, (_, window) in enumerate(clips.windows) if window.bucket == bucket]


def finish(config: Config, result: Result) -> None:
    """The before/after video and the card."""
    facts, use = {}, ""  # an adapter tells its own
    if config.adapter.kind == "none":
        facts, use = exported_model(config.training.output)
    conclude(config, result, f"Stable Video Diffusion, {config.stage.replace('_', ' ')}", use, facts)


def exported_model(output: Path) -> tuple[dict[str, str], str]:
    """What the card tells of an exported model, and how to use it."""
    exported = json.loads((output / "export" / "inflate.json").read_text())
    gap = exported["export_gap"]
    told = f"UNet {gap['unet']:.1e}, decoder {gap['decoder']:.1e}"
    return {"largest difference from diffusers' classes": told}, image_use(exported["decode_chunk"])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with report_errors():
        main(configuration.from_command_line(Config), sys.argv[1:])
