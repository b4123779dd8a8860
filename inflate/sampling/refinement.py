"""Refining clips by I2VGen-XL's second stage: enlarged, noised up to a level, and drawn from there by their prompts.

Two ways are published. ModelScope's adds fresh noise (SDEdit, 2108.01073); VGen's inverts DDIM, which keeps more of the
clip. Both go on by DPM-Solver++ 2M with fresh noise. Clips of any length and size are refined: longer ones in windows
over time that overlap (`inflate.sampling.windows`), and sides that the autoencoder does not divide are lengthened
meanwhile.

The networks take turns on the device: each is there while it works, unless it is there already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.layers.freeu import PUBLISHED as FREEU
from inflate.layers.recompute import in_parts
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE, encode_frames
from inflate.models.visits import away, visiting
from inflate.objectives import Predict
from inflate.sampling.colours import check_levels, recoloured
from inflate.sampling.ddim import Inversion, standard_normal
from inflate.sampling.dpm_solver import DPMSolver, levels_of
from inflate.sampling.steps import (
    PARTS,
    TOGETHER,
    Progress,
    at_least_one,
    check_share,
    decode,
    guided,
    in_precision,
    is_large,
)
from inflate.sampling.windows import Windows
from inflate.surgery import evaluating

Start = Literal["noise", "inversion"]
Size = tuple[int, int]
"""(height, width) in pixels"""
SUFFIX = ", cinematic, High Contrast, highly detailed"
"""How the words begin that VGen's refinement adds to every prompt."""
DIMMED_FROM = 600
"""Noise levels of ModelScope's refinement, the fewer of the two published."""
FEW = TOGETHER // 16
"""Pixels of the frames that the autoencoder is given together, at least one: 512x512."""


@dataclass(frozen=True)
class Refinement:
    """How clips are refined; the defaults are ModelScope's, `PUBLISHED` has VGen's beside them."""

    start: Start = "noise"
    """what the clip becomes before it is drawn again: noise = itself with fresh noise, inversion = what DDIM would have
    drawn it from, by the negative prompt, on the plain cosine schedule"""
    strength: float = 1.0
    """how much is drawn anew: the share of `levels` that noise is added over, from 0 (nothing) to 1"""
    levels: int | None = None
    """noise levels that `strength` is a share of; none: those that the model was trained on"""
    steps: int = 30
    """denoising steps, and as many of an inversion; fewer where there are fewer levels"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    rescale: float = 0.2
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1"""
    eta: float = 1.0
    """fresh noise of each step, 0 (none) to 1"""
    negative: str | None = None
    """prompt that guidance leads away from; none: the one that stood for none in training"""
    suffix: str = ""
    """words that are added to every prompt"""
    freeu: bool = False
    """whether FreeU acts meanwhile, by VGen's factors (2309.11497)"""
    double_frames: bool = False
    """refine every frame twice and keep one of each pair, for short clips of a model of longer ones"""
    dimmed: bool | None = None
    """give the first step the noised clip times its share of noise, 0.97 of 600 levels, as published; none: from 600
    levels on, for of fewer the clip would fade"""
    window: int | None = None
    """frames that the network is given together; none: the length of training's clips. Longer clips are drawn in
    overlapping windows"""
    overlap: int | None = None
    """frames that neighbouring windows share, at least; none: a quarter of a window"""
    keep_colours: int = 0
    """wavelet levels beyond which frames stay as enlarged, against shifts of colour and flicker: what is larger than
    2**levels pixels; StableSR has 5 (2305.07015), 0 leaves frames as drawn"""
    little_memory: bool | None = None
    """take guidance's passes in turn and feed-forwards in parts: the same clips; none: where they are large, more than
    8 frames of 512x512 together"""

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, levels=self.levels, window=self.window)
        check_levels(self.keep_colours)
        check_share(rescale=self.rescale)
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"strength is {self.strength}: it must be 0 (the clip as it is) to 1 (all levels)")

    def solver(self, family: Refiner) -> DPMSolver | None:
        """What draws clips of a model; none where nothing is to be drawn. ConfigError where it cannot."""
        if not self.strength:
            return None
        levels = levels_of(self.strength, self.levels or family.clips.levels)
        return DPMSolver(family.objective, levels, min(self.steps, levels), self.eta)

    def windows(self, family: Refiner) -> Windows:
        """How clips are cut for a model."""
        frames = self.window or family.clips.frames
        return Windows(frames, frames // 4 if self.overlap is None else self.overlap)


PUBLISHED: dict[Start, Refinement] = {
    "noise": Refinement(),
    "inversion": Refinement("inversion", levels=700, guidance=9.0, rescale=0.3, suffix=SUFFIX, freeu=True),
}
"""The published ways: ModelScope's (2311.04145, section 3.2) and VGen's."""


def refine(
    family: Refiner,
    clips: Tensor,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int | None = None,
    width: int | None = None,
    settings: Refinement | None = None,
    progress: Progress | None = None,
    idle: Sequence[nn.Module] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Refines clips (N, F, 3, h, w) in [-1, 1], each by its prompt and seed: (N, F, 3, H, W), about in [-1, 1].

    They are scaled to cover the size (none: the model's) and cropped about their centre. One clip after the other is
    drawn, of its own seed alone. The networks visit the device one after the other; none: where the UNet is. Those that
    are `idle` but for the drawing leave it while the autoencoder works. `progress` wraps the list of steps, as tqdm
    does. ConfigError where the size is too small for the model, or the settings do not fit it.
    """
    settings, device = settings or Refinement(), device or family.device
    size = height or family.size[0], width or family.size[1]
    check_size(family, size)
    if not len(clips) == len(prompts) == len(seeds):
        raise ConfigError(f"{len(clips)} clips, {len(prompts)} prompts and {len(seeds)} seeds: give as many of each")
    refined = []
    for clip, prompt, seed in zip(clips, prompts, seeds, strict=True):
        with away(idle):
            latents = encoded(family, clip, size, device)
        latents = refine_latents(family, latents, prompt, seed, settings, progress)
        with away(idle):
            parts = recoloured(decoded(family, latents, size), enlarged(clip, size), settings.keep_colours)
            refined.append(torch.cat(list(parts)))
    return torch.stack(refined)


def check_size(family: Refiner, size: Size) -> None:
    """Raise ConfigError for a size in which the UNet's deepest level has not a pixel."""
    least = family.factor * 2 ** (len(family.unet.config.block_out_channels) - 1)
    if min(size) < least:
        raise ConfigError(f"height {size[0]} and width {size[1]}: this model needs at least {least} of each")


@torch.no_grad()
def encoded(family: Refiner, frames: Tensor, size: Size, device: torch.device | None = None) -> Tensor:
    """Scaled latents (F, C, h', w') of frames (F, 3, h, w) in [-1, 1], made as large as `size` and a few at a time.

    What `size` lacks of whole latents is filled by repeating the last rows and columns, which `decoded` cuts off.
    """
    device, vae = device or family.device, family.vae
    few = max(1, FEW // (size[0] * size[1]))
    parts = []
    with visiting([vae], device), evaluating(vae):
        for part in frames.split(few):
            whole = _lengthened(fitted(part.to(device).float(), size), family.factor)  # (f, 3, H', W')
            parts.append(vae.config.scaling_factor * encode_frames(vae, whole))  # (f, C, h', w')
    latents = torch.cat(parts)
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def fitted(frames: Tensor, size: Size) -> Tensor:
    """Frames (F, 3, h, w) scaled bilinearly, as published, to cover a size, and cropped about their centre."""
    sides = frames.shape[-2:]
    scale = max(asked / side for asked, side in zip(size, sides, strict=True))
    covered = [max(asked, round(side * scale)) for asked, side in zip(size, sides, strict=True)]
    scaled = functional.interpolate(frames, covered, mode="bilinear", antialias=scale < 1.0)  # (F, 3, H'', W'')
    top, left = ((there - asked) // 2 for there, asked in zip(covered, size, strict=True))
    return scaled[..., top : top + size[0], left : left + size[1]]  # (F, 3, H, W)


def enlarged(frames: Iterable[Tensor], size: Size) -> Iterator[Tensor]:
    """Frames, each (3, h, w) in [-1, 1] and made (3, H, W), one after the other."""
    return (fitted(frame[None].float(), size)[0] for frame in frames)


def _lengthened(frames: Tensor, factor: int) -> Tensor:
    below, right = (-side % factor for side in frames.shape[-2:])
    return functional.pad(frames, (0, right, 0, below), mode="replicate")


def decoded(family: Refiner, latents: Tensor, size: Size) -> Iterator[Tensor]:
    """Frames (f, 3, H, W), about in [-1, 1] and float32, of scaled latents (F, C, h', w'), a few at a time.

    A temporal decoder is given as many as training's clips had.
    """
    pixels, vae = size[0] * size[1], family.vae
    few = family.clips.frames if isinstance(vae, VideoVAE) else max(1, FEW // pixels)
    with visiting([vae], latents.device):
        for part in latents.split(few):
            yield decode(family, part[None], few > 1 and few * pixels > FEW)[0][..., : size[0], : size[1]]


@torch.no_grad()
def refine_latents(
    family: Refiner,
    latents: Tensor,
    prompt: str,
    seed: int,
    settings: Refinement | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents (F, C, h, w) of a clip, drawn anew by its prompt, on the device where they are."""
    settings = settings or Refinement()
    solver = settings.solver(family)
    if solver is None:
        return latents
    clip = latents[None]  # (1, F, C, h, w)
    if settings.double_frames:
        clip = clip.repeat_interleave(2, dim=1)  # (1, 2F, C, h, w)
    noise = standard_normal([seed], clip.shape[1:], clip)
    windows, unet = settings.windows(family), family.unet
    large = is_large(clip[:, : windows.frames], family.factor, settings.little_memory)
    told = _told(family, prompt, settings, large, clip.device)
    with visiting([unet], clip.device), evaluating(unet), in_parts(unet, PARTS if large else 0):
        with freed(unet, settings.freeu):
            away_from, towards = (windows.over(each) for each in told)
            noised = _noised(settings, solver, away_from, clip, noise, progress)
            drawn = solver.draw(towards, noised, noise, progress)  # (1, F or 2F, C, h, w)
    return drawn[0, :: 2 if settings.double_frames else 1]


def _told(
    family: Refiner, prompt: str, settings: Refinement, in_turn: bool, device: torch.device
) -> tuple[Predict, Predict]:
    """The predictions by the negative prompt alone, and by a prompt with guidance."""
    negative = family.clips.negative if settings.negative is None else settings.negative
    scales = [settings.guidance] if settings.guidance > 1.0 else []
    texts = [[negative], [prompt + settings.suffix]] if scales else [[prompt + settings.suffix]]
    parts = texts if in_turn else [sum(texts, [])]
    with visiting(family.text.networks, device), evaluating(*family.text.networks):
        by = [in_precision(family.predict(family.embed(part)), family.unet.dtype) for part in [[negative], *parts]]
    return by[0], guided(by[1:], scales, settings.rescale)


def _noised(
    settings: Refinement,
    solver: DPMSolver,
    negative: Predict,
    clip: Tensor,
    noise: Iterator[Tensor],
    progress: Progress | None,
) -> Tensor:
    """What the solver begins from (1, F, C, h, w): the clip at the last of its levels."""
    if settings.start == "noise":
        noised = solver.noised(clip, next(noise))
    else:
        cosine = replace(Inversion.objective, prediction=solver.objective.prediction)
        noised = Inversion(cosine, solver.levels, solver.steps).draw(negative, clip, progress)
    dimmed = solver.levels >= DIMMED_FROM if settings.dimmed is None else settings.dimmed
    share = (1.0 - solver.objective.signal[solver.levels - 1]).sqrt()  # by which the solver multiplies
    return noised if dimmed else noised / float(share)


@contextmanager
def freed(unet: VideoUNet, wanted: bool) -> Iterator[None]:
    """A UNet in which FreeU acts meanwhile, if `wanted`, and is off afterwards."""
    unet.set_freeu(FREEU if wanted else ())
    try:
        yield
    finally:
        unet.set_freeu(())
