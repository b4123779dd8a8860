"""Measure the noise that a sampler leaves in latents: what a temporal decoder has to remove.

    python benchmarks/sampler_noise.py MODEL CLIPS OUT.json

MODEL is an exported Stable Video Diffusion folder or `pocket`, CLIPS a folder of held-out clips. In scaled latents,
whose own deviation is about 1; noise that is independent per frame adds 6 times its variance to the second difference
over time, so a sixth of that difference's mean square is called independent noise here.

- independent noise of samples, the figure for `decoder.py --noise`: of full samples from the clips' first frames, told
  each clip's own motion bucket, less what the clips themselves have. Its square is stated with its sign: where it is
  negative the samples move less than the clips and the figure says nothing.
- returned: the clips' latents are noised to a level of the sampler, which goes the rest of its way; what the result
  differs by. Most of that is the spread of clips that are as likely, which no decoder should remove; its independent
  part is noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from inflate.data.clips import ClipDataset, collate
from inflate.data.settings import Data
from inflate.families.svd import SVD, Condition
from inflate.sampling.svd import Sampling, euler, sample_latents
from inflate.training.held_out import join
from record import command, record, write

LEVELS = (0.25, 0.5, 1.0, 2.0)
STEPS = 25
AUG = 0.02


def condition_of(family: SVD, pixels: Tensor, fps: Tensor, motion: Tensor, generator: torch.Generator) -> Condition:
    """The condition of each clip's first frame, with the clip's own frame rate and motion bucket."""
    first = pixels[:, 0]
    noise = torch.randn(first.shape, generator=generator)
    return family.condition(first, fps, family.motion.bucket(motion), torch.full_like(fps, AUG), noise)


@torch.no_grad()
def returned(family: SVD, clean: Tensor, condition: Condition, level: float, generator: torch.Generator) -> Tensor:
    """What clips' latents (B, F, C, h, w) differ by after noise of a level and the sampler's steps from there."""
    whole = family.scheduler()
    whole.set_timesteps(STEPS)
    rest = [float(sigma) for sigma in whole.sigmas[:-1] if sigma <= level]
    scheduler = family.scheduler(sigma_max=rest[0])  # Karras' levels from there on are those of the whole
    scheduler.set_timesteps(len(rest))
    noise = torch.randn(clean.shape, generator=generator)
    start = (clean + rest[0] * noise) / scheduler.init_noise_sigma
    return euler(family.predict(condition), start, scheduler) - clean


def correlation(error: Tensor) -> float:
    """Correlation of each frame's error with the next frame's, over everything."""
    a, b = error[:, :-1].flatten(), error[:, 1:].flatten()
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def independent(latents: Tensor) -> float:
    """A sixth of the mean square of x[t-1] - 2 x[t] + x[t+1]: the variance of noise that is independent per frame."""
    return float((latents[:, :-2] - 2 * latents[:, 1:-1] + latents[:, 2:]).square().mean()) / 6


@torch.no_grad()
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
    data = Data(arguments.clips, frames=arguments.frames, height=64, width=64, window="centre")
    probe = ClipDataset(data, shuffle=False)
    batch = join([collate([probe[number]]) for number in range(min(arguments.count, len(probe)))])
    generator = torch.Generator().manual_seed(0)
    clean = family.encode(batch["pixels"])
    condition = condition_of(family, batch["pixels"], batch["fps"], batch["motion"], generator)
    rows = []
    for level in LEVELS:
        error = returned(family, clean, condition, level, generator)
        noise = independent(error) ** 0.5
        rows.append({"level": level, "deviation": float(error.std()), "correlation": correlation(error),
                     "independent noise": noise})  # fmt: skip
    settings = Sampling(steps=STEPS, guidance_max=arguments.guidance)
    sampled = sample_latents(family, condition, torch.randn(clean.shape, generator=generator), settings)
    extra = independent(sampled) - independent(clean)
    result = {
        "clips": len(clean), "latent deviation": float(clean.std()), "returned": rows,
        "independent variance of clips": independent(clean), "of samples": independent(sampled),
        "independent variance added by the sampler": extra,
        "independent noise of samples": extra**0.5 if extra > 0 else None,
    }  # fmt: skip
    write(arguments.out, record(command("MODEL", "CLIPS", "OUT.json"), result))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
