"""What tasks share that train a model to animate an image: what is encoded of it, previews and their scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from inflate.data.pixels import unit
from inflate.metrics.video import ssim
from inflate.models.animators import Animator
from inflate.models.visits import away, visiting
from inflate.sampling.animators import decoded
from inflate.training.denoising import Condition, DenoisingTask
from inflate.training.held_out import same_size
from inflate.training.noise import Noise
from inflate.training.player import Batch
from inflate.training.previews import Drawn, scores, write_drawn

Family = TypeVar("Family", bound=Animator)
FEATURES = "features"
"""What the image encoder makes of each clip's conditioning frame: (B, P, E)."""


class AnimatingTask(DenoisingTask[Family, Condition], Generic[Family, Condition]):
    """Trains `family.unet` to animate images by texts; measures and shows it on held-out clips."""

    @abstractmethod
    def features(self, batch: Batch, clean: Tensor, noise: Noise) -> Tensor:
        """What the image encoder makes of each clip's conditioning frame: (B, P, E)."""

    @abstractmethod
    def animate(self, places: list[int]) -> Tensor:
        """Clips (N, F, 3, H, W), about in [-1, 1], of the captions and images at places of one size.

        The place is the seed.
        """

    @property
    def given_frames(self) -> dict[str, slice]:
        """The frames of a clip that an animation is given, by name."""
        return {"frame 0": slice(0, 1)}

    def _see(self, clips: list[Batch], encoded: list[Batch], device: torch.device) -> None:
        with away(self._idle()), visiting([self.family.image_encoder], device):
            for clip, found in zip(clips, encoded, strict=True):
                noise = Noise(self.seed, clip["number"], device)
                found[FEATURES] = self.features(clip, found["latents"], noise).cpu()

    def preview(self, folder: Path) -> None:
        """Animate the first held-out clips: an mp4 each, a contact sheet per size (truth above sample), prompts.txt.

        `scores.json` holds the mean over all of them.
        """
        self._write_prompts(folder)
        write_drawn(folder, self.shown, self.drawn())

    def drawn(self) -> Iterator[Drawn]:
        """What a preview shows, by size: places of clips, these and their animations (`animate`) by name, `score`."""
        for places in same_size(self.shown, len(self.shown)):
            truth = torch.cat([self.shown[place]["pixels"] for place in places])
            generated = self.animate(places)
            yield places, {"truth": truth, "sample": generated}, self.score(truth, generated)

    @torch.no_grad()
    def score(self, truth: Tensor, generated: Tensor) -> dict[str, float]:
        """How close animations come to their clips (`previews.scores`), and to the given frames in structure."""
        family, device = self.family, self._device()
        with visiting([family.vae], device):
            given = torch.cat([self._decoded(clip.to(device)).cpu() for clip in truth.split(1)])
        found = scores(truth, generated, given)
        for name, place in self.given_frames.items():
            for what, clip in (("sample", generated), ("autoencoder", given)):
                found[f"{name} ssim, {what}"] = float(ssim(unit(clip[:, place]), unit(truth[:, place])).mean())
        return found

    def _decoded(self, pixels: Tensor) -> Tensor:
        """A clip as the autoencoder has it."""
        return decoded(self.family, self.family.encode(pixels), idle=self._idle())
