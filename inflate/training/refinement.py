"""I2VGen-XL's refinement stage: what one step does, how it is measured and shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from inflate.errors import ConfigError
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.models.text_encoders import TextCondition
from inflate.sampling.colours import check_levels
from inflate.sampling.refinement import Refinement, Start, fitted, refine
from inflate.training.captions import text_of, without_text
from inflate.training.denoising import DenoisingTask, Given
from inflate.training.held_out import same_size, size_of
from inflate.training.i2vgen_xl import I2VGenXLSettings, spatial_rates
from inflate.training.noise import Noise
from inflate.training.player import Batch
from inflate.training.previews import Drawn, restored, write_drawn


@dataclass
class RefinementPreview:
    """How previews of stage=refine are made: held-out clips are shrunk, enlarged again and refined by captions."""

    shrink: int = 2
    """how many times smaller the sides are that clips are shrunk to"""
    start: Start = "noise"
    """what an enlarged clip becomes before it is drawn again: noise = itself with fresh noise, inversion = what DDIM
    would have drawn it from, which keeps more of it"""
    strength: float = 1.0
    """how much is drawn anew: the share of the trained timesteps that an enlarged clip is noised over, 0 to 1"""
    steps: int = 30
    """denoising steps"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    rescale: float = 0.2
    """share of a guided prediction that is brought to the spread of the one it leads to, 0 to 1"""
    keep_colours: int = 0
    """wavelet levels beyond which frames stay as enlarged, against shifts of colour and flicker; 0: none of them"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""

    def __post_init__(self) -> None:
        if self.shrink < 2:
            raise ConfigError(f"refining.shrink={self.shrink}: must be at least 2, else there is nothing to refine")
        check_levels(self.keep_colours)

    @property
    def refinement(self) -> Refinement:
        """How the enlarged clips are drawn anew."""
        return Refinement(**{name: value for name, value in asdict(self).items() if name != "shrink"})


class RefinementTask(DenoisingTask[Refiner, TextCondition]):
    """Trains `family.unet` to denoise large clips by their captions, on the less noisy timesteps alone.

    The image model's layers learn at `gamma` times the rate of the others.
    """

    settings: I2VGenXLSettings

    def __init__(
        self, family: Refiner, settings: I2VGenXLSettings, sampling: RefinementPreview, given: Given, gamma: float = 1.0
    ) -> None:
        super().__init__(family, settings, given, spatial_rates(family.unet, gamma))
        self.sampling = sampling
        self.no_text = family.embed([family.clips.negative])
        if given.adapter is None:
            family.unet.requires_grad_(True)

    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> TextCondition:
        """What the UNet is told of clips: their captions."""
        return text_of(self.family, batch, noise.device)

    def trained_condition(
        self, batch: Batch, clean: Tensor, timestep: Tensor, noise: Noise, step: int
    ) -> TextCondition:
        """The same, with the negative prompt in place of some captions."""
        dropped = noise.uniform("drop") < self.settings.drop_text  # (B,)
        return without_text(self.condition(batch, clean, noise), dropped, self.no_text)

    @property
    def levels(self) -> int:
        """How many timesteps are trained, the less noisy ones."""
        return self.family.clips.levels

    @property
    def offset(self) -> float:
        """Spread of the shift of the noise of each frame and channel."""
        return self.settings.offset_noise

    @property
    def parts(self) -> tuple[str, ...]:
        """The text."""
        return ("text",)

    def lacking(self, condition: TextCondition, part: str) -> TextCondition:
        """The condition with the negative prompt for its text, or as it is."""
        everyone = torch.ones(len(condition.context), dtype=torch.bool, device=condition.context.device)
        return without_text(condition, everyone, self.no_text) if part == "text" else condition

    def preview(self, folder: Path) -> None:
        """Refine the first held-out clips, shrunk and enlarged: an mp4 each, a contact sheet per size, prompts.txt.

        In the sheet their truth and the enlarged clips are above them. `scores.json` holds the mean over all of them,
        of enlarged clips and of refined ones (`previews.restored`).
        """
        self._write_prompts(folder)
        write_drawn(folder, self.shown, self.drawn())

    def drawn(self) -> Iterator[Drawn]:
        """What a preview shows, by size: places of clips, these, enlarged ones and samples by name, and scores."""
        for places in same_size(self.shown, len(self.shown)):
            truth = torch.cat([self.shown[place]["pixels"] for place in places])
            small = shrunk(truth, self.sampling.shrink)
            _, height, width = size_of(self.shown[places[0]])
            enlarged = fitted(small.flatten(0, 1), (height, width)).unflatten(0, truth.shape[:2])  # (N, F, 3, H, W)
            clips = {"truth": truth, "enlarged": enlarged, "sample": self.refine(small, places)}
            told = {what: restored(truth, clips[what]) for what in ("sample", "enlarged")}
            yield places, clips, {f"{name}, {what}": value for what in told for name, value in told[what].items()}

    def refine(self, clips: Tensor, places: list[int]) -> Tensor:
        """Clips (N, F, 3, h, w) in [-1, 1] enlarged and drawn anew by the captions at places of one size.

        The place is the seed.
        """
        prompts, seeds = [self.shown[place]["caption"][0] for place in places], [self.seed + place for place in places]
        _, height, width = size_of(self.shown[places[0]])
        return refine(
            self.family, clips, prompts, seeds, height, width, self.sampling.refinement, idle=self._idle(),
            device=self._device(),
        ).cpu()  # fmt: skip


def shrunk(clips: Tensor, factor: int) -> Tensor:
    """Clips (N, F, 3, H, W) at so many times smaller sides, bilinearly."""
    size = [side // factor for side in clips.shape[-2:]]
    small = functional.interpolate(clips.flatten(0, 1), size, mode="bilinear", antialias=True)  # (N*F, 3, h, w)
    return small.unflatten(0, clips.shape[:2])
