"""Measure the noise that a sampler leaves in latents: what a temporal decoder has to remove.

    python benchmarks/sampler_noise.py MODEL CLIPS OUT.json

MODEL is an exported Stable Video Diffusion folder or `pocket`, CLIPS a folder of held-out clips. Two measures, both in
scaled latents, whose own deviation is about 1:

- error: held-out latents are noised to a level, brought back by the remaining sampler steps, and compared with what
  they were; its deviation, and the correlation between neighbouring frames (0 = it flickers, 1 = it moves along).
- flicker of full samples from first frames alone: noise that is independent per frame adds 6 times its variance to
  the second difference over time, so a sixth of what samples have more than real clips is that variance.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from inflate.data.clips import ClipDataset, collate
from inflate.data.settings import Data
from inflate.families.svd import SVD
from inflate.sampling.svd import Sampling, condition_of, euler, initial_noise, sample_latents
from inflate.training.image_to_video import join

LEVELS = (0.25, 0.5, 1.0, 2.0)
STEPS = 25


@torch.no_grad()
def returned(family: SVD, pixels: Tensor, settings: Sampling, level: float) -> Tensor:
    """Latents (B, F, C, h, w) after noising the clips' own to `level` and sampling the rest of the way."""
    clean = family.encode(pixels)
    generator = torch.Generator().manual_seed(settings.seed)
    condition = condition_of(family, pixels[:, 0], settings, generator)
    scheduler = family.scheduler(sigma_max=level)
    scheduler.set_timesteps(max(2, round(STEPS / 2)))
    noise = torch.randn(clean.shape, generator=generator)
    start = (clean + level * noise) / scheduler.init_noise_sigma
    return euler(family.predict(condition), start, scheduler) - clean


def correlation(error: Tensor) -> float:
    """Correlation of each frame's error with the next frame's, over everything."""
    a, b = error[:, :-1].flatten(), error[:, 1:].flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def second_difference(latents: Tensor) -> Tensor:
    """Mean square of x[t-1] - 2 x[t] + x[t+1] over everything."""
    return (latents[:, :-2] - 2 * latents[:, 1:-1] + latents[:, 2:]).square().mean()


@torch.no_grad()
def sampled(family: SVD, pixels: Tensor, settings: Sampling) -> Tensor:
    """Latents of a sample from the clips' first frames."""
    generator = torch.Generator().manual_seed(settings.seed)
    condition = condition_of(family, pixels[:, 0], settings, generator)
    return sample_latents(family, condition, initial_noise(family, pixels[:, 0], settings, generator), settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("clips")
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=1.5)
    arguments = parser.parse_args()
    family = SVD.load(arguments.model, frames=arguments.frames)
    probe = ClipDataset(
        Data(arguments.clips, frames=arguments.frames, height=64, width=64, window="centre"), shuffle=False
    )
    batch = join([collate([probe[number]]) for number in range(min(arguments.count, len(probe)))])
    pixels, bucket = batch["pixels"], family.motion.bucket(batch["motion"])
    settings = Sampling(
        steps=STEPS, fps=float(batch["fps"][0]), frames=arguments.frames, guidance_max=arguments.guidance
    )
    settings = replace(settings, motion_bucket=float(bucket.median()))
    real = family.encode(pixels)
    rows = []
    for level in LEVELS:
        error = returned(family, pixels, settings, level)
        rows.append({"level": level, "deviation": float(error.std()), "correlation": correlation(error)})
    extra = float(second_difference(sampled(family, pixels, settings)) - second_difference(real)) / 6
    result = {
        "command": f"python benchmarks/sampler_noise.py {arguments.model} CLIPS OUT.json",
        "clips": len(pixels), "latent deviation": float(real.std()), "returned": rows,
        "independent noise of samples": max(extra, 0.0) ** 0.5,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
