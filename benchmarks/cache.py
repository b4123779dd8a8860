"""What a training step gains from clips that are encoded once, by `inflate data cache`.

    python benchmarks/cache.py OUT.json

A tiny Stable Video Diffusion whose VAE encodes a clip for as many FLOPs, next to a forward pass of its UNet, as that of
SVD-XT does (65 : 80 at 25x576x1024; the ratio is counted and must be within 20 %) trains on rendered clips: the step of
image-to-video fine-tuning, from files and from caches, in turn, on the same samples. What is timed is the whole step:
reading the sample, the frozen encoders, the loss, backward, AdamW. The figure is the median of the paired ratios of
processor time, with quartiles. Before, the losses of both are compared on the same draws.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.data.cache import ClipCache, fill
from inflate.data.clips import ClipDataset, Frames, collate
from inflate.data.demo_clips import build
from inflate.data.settings import Data
from inflate.families.svd import SVD
from inflate.models.unet import TemporalSpec
from inflate.surgery import inflate_unet, inflate_vae
from inflate.training.encoding import clip_encoder
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.noise import Noise
from record import command, record, write

WANTED = 65 / 80
"""FLOPs of SVD-XT's VAE on a clip, to those of a forward pass of its UNet, at 25x576x1024."""
FRAMES, SIDE = 8, 128
CACHES: dict[str, tuple[int, Frames]] = {"condition frame encoded in each step": (0, "first"), "4 draws": (4, "none")}


def family(width: int) -> SVD:
    """Tiny networks of every kind of layer, the VAE's first level `width` channels wide."""
    torch.manual_seed(0)
    down, up = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8, in_channels=4, block_out_channels=(64, 128, 256, 256), down_block_types=down,
        up_block_types=up, layers_per_block=2, cross_attention_dim=64, attention_head_dim=(1, 2, 4, 4),
        use_linear_projection=True,
    )  # fmt: skip
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = (width, 2 * width, 4 * width, 4 * width)
    vae = AutoencoderKL(
        block_out_channels=widths,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=True,
        **kinds,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=64,
    )  # fmt: skip
    inflated, _ = inflate_unet(unet, TemporalSpec(), in_channels=8)
    return SVD(inflated, inflate_vae(vae)[0], CLIPVisionModelWithProjection(vision), frames=FRAMES)


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def ratio_of(model: SVD, clip: torch.Tensor) -> float:
    """FLOPs of encoding a clip to those of the UNet's forward pass."""
    latents = torch.randn(1, FRAMES, 8, SIDE // 8, SIDE // 8)
    inputs = latents, torch.ones(1), torch.randn(1, 1, 64)
    forward = flops(lambda: model.unet(*inputs, added_time_ids=torch.ones(1, 3)))
    return flops(lambda: model.encode(clip)) / forward


def task_of(model: SVD, held_out: dict[str, Any], trainable: Any, frames: Frames) -> ImageToVideoTask:
    settings = ImageToVideo(trainable=trainable, held_out_clips=1, preview_clips=1)
    return ImageToVideoTask(model, settings, [held_out], Preview(), lr=1e-5, seed=0, frames=frames)


def losses(task: ImageToVideoTask, dataset: ClipDataset, numbers: range) -> list[float]:
    batches = (collate([dataset[number]]) for number in numbers)
    with torch.no_grad():
        return [float(task.loss(batch, Noise(0, batch["number"]), 0)[0]) for batch in batches]


def step(task: ImageToVideoTask, dataset: ClipDataset, optimizer: torch.optim.Optimizer, number: int) -> float:
    """Processor seconds of one training step."""
    begun = time.process_time()
    batch = collate([dataset[number]])
    task.loss(batch, Noise(0, batch["number"]), 0)[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - begun


def compare(model: SVD, plain: ClipDataset, cached: ClipDataset, trainable: str, frames: Frames, pairs: int) -> Any:
    """Losses of both sides on the same draws, then the paired times."""
    held_out = collate([plain[0]])
    sides = [(task_of(model, held_out, trainable, "all"), plain), (task_of(model, held_out, trainable, frames), cached)]
    ours, theirs = (losses(task, dataset, range(4)) for task, dataset in (sides[1], sides[0]))
    optimizer = torch.optim.AdamW([p for p in model.unet.parameters() if p.requires_grad], lr=1e-5)
    seconds: list[list[float]] = [[], []]
    for number in range(pairs + 2):
        for side in (0, 1) if number % 2 else (1, 0):
            seconds[side].append(step(*sides[side], optimizer, number))
    ratios = [a / b for a, b in zip(seconds[0][2:], seconds[1][2:], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) if frames == "first" else None
    return {
        "trainable": trainable, "largest difference of losses": difference, "speed-up": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)], "pairs": pairs,
        "milliseconds per step, files": round(1000 * statistics.median(seconds[0]), 1),
        "milliseconds per step, cache": round(1000 * statistics.median(seconds[1]), 1),
    }  # fmt: skip


def encoded(model: SVD, settings: Data) -> ClipDataset:
    """The dataset of a cache, filled now."""
    encoder = clip_encoder(model, settings, ImageToVideo())
    cache, dataset = ClipCache(settings.cache or ""), ClipDataset(replace(settings, cache=None))
    for row in dataset.rows:
        cache.note(row)
    fill(cache, dataset.rows, settings, encoder)
    made = ClipDataset(settings)
    made.read_encoded(encoder, CACHES["4 draws" if settings.cache_draws else next(iter(CACHES))][1])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--width", type=int, default=24, help="of the VAE's first level")
    arguments = parser.parse_args()
    model = family(arguments.width)
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    with TemporaryDirectory() as name:
        clips = build(Path(name) / "clips", clips=16, held_out=1)
        data = Data(path=str(clips), split="train", frames=FRAMES, height=SIDE, width=SIDE, memory_megabytes=0)
        plain = ClipDataset(data)
        found["FLOPs, encode / forward"] = round(ratio_of(model, plain[0]["pixels"][None]), 3)
        if not 0.8 < found["FLOPs, encode / forward"] / WANTED < 1.2:
            raise SystemExit(f"{found}: not within 20 % of {WANTED:.3f}; choose another --width")
        for label, (draws, frames) in CACHES.items():
            cached = encoded(model, replace(data, cache=f"{name}/cache-{draws}", cache_draws=draws))
            for trainable in ("all", "temporal"):
                row = compare(model, plain, cached, trainable, frames, arguments.pairs)
                found.setdefault("cases", []).append({"cache": label, **row})
                print(label, row, flush=True)
    write(arguments.output, record(command("OUT.json"), found))


if __name__ == "__main__":
    main()
