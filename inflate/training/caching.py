"""`inflate data cache` and `inflate data show`: clips encoded once, in as many processes as there are, and shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate.utils import gather_object

from inflate.data import video
from inflate.data.cache import ClipCache, Filled, fill
from inflate.data.clips import ClipDataset, Item
from inflate.data.pixels import to_uint8, unit
from inflate.data.preflight import Findings, Preflight, Progress, preflight
from inflate.data.settings import Data
from inflate.data.sources import Clip, find_clips
from inflate.errors import ConfigError
from inflate.families import dynamicrafter_model, i2vgen_xl_model, svd_encoders, svd_model, video_ldm
from inflate.files import new_folder
from inflate.metrics.video import psnr
from inflate.models import stable_diffusion
from inflate.models.vae import encode_at_most
from inflate.tables import aligned
from inflate.training import i2vgen_xl_stages, stages
from inflate.training.encoding import (
    ClipEncoder,
    TextClipEncoder,
    clip_encoder,
    i2vgen_xl_encoder,
    image_text_encoder,
)
from inflate.training.image_text_to_video import ImageTextToVideo
from inflate.training.image_to_video import ImageToVideo
from inflate.training.memory_settings import Memory
from inflate.training.processes import join_processes, together
from inflate.training.text_to_video import Stage

Say = Callable[[str], None]
PRUNING = "--prune removes them all, also those that another run reads"


@dataclass
class Model(svd_model.Model):
    """The model, of whatever family, whose encoders are used."""

    tokenizer: str | None = None
    """for a single file of text-to-video, as the recipe has it"""
    image_stream: str | None = None
    """of DynamiCrafter's stage=adapt; nothing of it is cached"""


@dataclass
class Caching:
    """The settings of a recipe that what is cached follows from."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    image_to_video: ImageToVideo = field(default_factory=ImageToVideo)
    image_text_to_video: ImageTextToVideo = field(default_factory=ImageTextToVideo)
    memory: Memory = field(default_factory=Memory)
    stage: str = "image_to_video"
    """what a recipe trains: stages of text-to-video and refinement read captions, those of DynamiCrafter captions and
    frames, that of I2VGen-XL's base captions and first frames, all others first frames"""

    def encoder(self, device: torch.device) -> ClipEncoder | TextClipEncoder:
        """The model's encoders, on the device."""
        made = self._encoder()
        vae, text = made.family.vae, getattr(made.family, "text", None)
        encode_at_most(vae, self.memory.encode_frames)
        others = [getattr(made.family, "image_encoder", None), *(() if text is None else text.networks)]
        for network in (vae, *filter(None, others)):
            network.requires_grad_(False).eval().to(device)
        return made

    def _encoder(self) -> ClipEncoder | TextClipEncoder:
        model, kind = self.model, stages.named(self.stage, self.model.path)
        if kind is not None:
            start = dynamicrafter_model.Model(model.path, None, model.image_encoder, model.image_model, model.tokenizer)
            return image_text_encoder(stages.encoders(kind, start), self.data, self.image_text_to_video)
        if self.stage in i2vgen_xl_stages.FAMILIES:
            beginning = i2vgen_xl_model.Model(model.path, model.image_encoder, model.image_model, model.tokenizer)
            return i2vgen_xl_encoder(self.stage, i2vgen_xl_stages.encoders(self.stage, beginning), self.data)
        if self.stage in get_args(Stage):
            encoders = video_ldm.Encoders.load(model.path, model.tokenizer, model.image_model)
            return TextClipEncoder(encoders, self.data.cache_dtype)
        svd = model.encoders()
        svd.decode_chunk = self.data.main.frames
        return clip_encoder(svd, self.data, self.image_to_video)


def cache_clips(settings: Caching, verify: bool, prune: bool, progress: Callable[[str], Progress], say: Say) -> None:
    """Encode what the cache lacks of the settings' clips, each process its share of them.

    `verify` reads all files and all that the cache holds, and encodes anew what is damaged; `prune` removes what these
    settings do not need. `progress` makes a bar from its title; `say` takes what the main process reports. Every
    process of a launch calls it. Raises ConfigError, DataError, CheckpointError.
    """
    state = join_processes()
    folder = _folder(settings.data)
    clips = find_clips(settings.data)[state.process_index :: state.num_processes]
    with together():
        if state.is_main_process:
            ClipCache(folder).prepare()
            if verify:
                mend(ClipCache(folder), say)
    cache = ClipCache(folder, trusting=not verify)
    checked = check(cache, clips, settings.data, progress("checking") if state.is_main_process else None)
    encoder = settings.encoder(state.device)
    bar = progress("encoding") if state.is_main_process else None
    with together():
        done = fill(cache, checked.used, settings.data, encoder, bar)
    needed = cache.needed(checked.rows, done.keys)
    every: list[tuple[Filled, set[str]]] = gather_object([(done, needed)])
    if state.is_main_process:
        whole = ClipCache(folder)
        kept = {key for _, keys in every for key in keys}
        if prune:
            say(f"removed {whole.store.keep(kept)} entries that these settings do not need")
        tell(whole, [one for one, _ in every], len(whole.store.entries.keys() - kept), say)


def mend(cache: ClipCache, say: Say) -> None:
    """Read all that the cache holds and remove what is damaged."""
    damaged = cache.store.damaged()
    for reason in sorted(set(damaged.values())):
        say(reason)
    cache.store.keep(cache.store.entries.keys() - damaged.keys())
    say(f"verified {len(cache.store.entries) + len(damaged)} entries: {len(damaged)} damaged, which are encoded anew")


def check(cache: ClipCache, clips: Sequence[Clip], data: Data, progress: Progress | None) -> Preflight:
    """The check of this process's clips; DataError in every process where all processes' together are unusable."""
    with together():
        found, _ = preflight(clips, data, progress, cache.probe, cache.note)
    findings = Findings.joined(gather_object([found.findings]))
    findings.refuse(data)
    if join_processes().is_main_process:
        findings.tell()
    return found


def tell(cache: ClipCache, parts: Sequence[Filled], others: int, say: Say) -> None:
    """Say what was done, and what the cache holds."""
    made, found, frames = (sum(getattr(one, name) for one in parts) for name in ("made", "found", "frames"))
    files = [file for file in cache.store.folder.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 2**20
    shards = sum(file.suffix == ".safetensors" for file in files)
    say(f"{made + found} clips: {made} encoded ({frames} frames), {found} were there")
    say(f"{cache.store.folder}: {size:.1f} MiB in {shards} shards")
    if others:
        say(f"{others} entries are of other files or settings, such as another stage's; {PRUNING}")


@torch.no_grad()
def show_cached(settings: Caching, output: Path, count: int, say: Say) -> None:
    """Decode `count` windows, evenly spread over all, into a new folder: mp4 files, the file's frames at the left.

    Contact sheets lie beside them, and `say` is given a table. Raises DataError, ConfigError.
    """
    _folder(settings.data)
    dataset = ClipDataset(settings.data, shuffle=False)
    encoder = settings.encoder(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    dataset.read_encoded(encoder, "all")
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int))
    lines: list[tuple[str, ...]] = [("file", "clip", "frames", "fps", "motion", "embedding", "condition noise", "PSNR")]
    with new_folder(output) as aside:
        for number in numbers:
            lines.append(_show(aside, dataset[int(number)], encoder.family, int(number)))
    for line in aligned(lines):
        say(line)
    say(f"wrote {output}")


def _show(
    folder: Path, item: Item, family: svd_encoders.Encoding | stable_diffusion.Encoding, number: int
) -> tuple[str, ...]:
    """Write one window's mp4 and contact sheet; its line of the table."""
    values: dict[str, Any] = dict(item)
    latents = values["latents"].to(family.vae.device, family.vae.dtype)
    real, made = unit(values["pixels"]), unit(family.decode(latents[None])[0].cpu())  # (F, 3, H, W)
    name, fps = f"{number:05d}", float(item["fps"])
    rows = [to_uint8(real), to_uint8(made)]
    video.write(folder / f"{name}.mp4", np.concatenate(rows, axis=2), fps)
    video.contact_sheet(folder / f"{name}.png", rows, ["file", "cache"])
    animates = "context" in values
    embedding = values["context"] if animates else values["caption_states"]
    augs = [f"{float(aug):.3f}" for aug in values.get("augs", ())]
    return (
        name, item["name"], str(len(latents)), f"{fps:.4g}", f"{float(item['motion']):.3f}",
        f"norm {float(embedding.float().norm()):.3f}", " ".join(augs) or ("in each step" if animates else "none"),
        f"{float(psnr(made[None], real[None]).mean()):.2f} dB",
    )  # fmt: skip


def _folder(data: Data) -> str:
    if data.cache is None:
        raise ConfigError("data.cache: name the folder of the cache, as in data.cache=cache")
    return data.cache
