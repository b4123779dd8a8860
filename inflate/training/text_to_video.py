"""Text-to-video by alignment of an image model: what one step does, how it is measured and shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor, nn

from inflate.data import video
from inflate.data.pixels import to_uint8, unit
from inflate.errors import ConfigError
from inflate.families.video_ldm import Sampler, VideoLDM
from inflate.models.text_encoders import TextCondition
from inflate.models.unet import VideoUNet
from inflate.sampling.text_to_video import Sampling, sample
from inflate.training.captions import text_of, without_text
from inflate.training.denoising import Denoising, DenoisingTask, Given
from inflate.training.domain import Domain
from inflate.training.held_out import same_size, size_of
from inflate.training.noise import Noise
from inflate.training.player import Batch
from inflate.training.previews import sheet_name

Stage = Literal["spatial", "temporal", "joint"]


@dataclass
class TextToVideo(Denoising):
    """Settings of text-to-video training (Video LDM, 2304.08818)."""

    drop_caption: float = 0.1
    """share of samples with the empty prompt, the null condition of guidance"""
    domain_adapter: str | None = None
    """FILE or FILE:WEIGHT of an adapter on image layers that holds the clips' look (stage=spatial with
    adapters/spatial_lora.yaml makes one): stage=temporal trains on top of it, and draws and exports without it"""

    section: ClassVar[str] = "text_to_video"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.drop_caption <= 1:
            raise ConfigError(f"text_to_video.drop_caption={self.drop_caption}: a share from 0 to 1")


@dataclass
class Preview:
    """How previews are sampled; the prompt, the length and the seed are each held-out clip's own."""

    steps: int = 50
    """denoising steps"""
    guidance: float = 7.5
    """guidance scale; up to 1 there is no guidance, at half the cost"""
    negative: str = ""
    """prompt that guidance leads away from"""
    sampler: Sampler = "ddim"
    """ddim, or euler"""
    little_memory: bool | None = None
    """take guidance's passes in turn, feed-forwards in parts, and decode frame by frame: the same clips; none: where
    they are large, more than 8 frames of 512x512 together"""


class TextToVideoTask(DenoisingTask[VideoLDM, TextCondition]):
    """Trains `family.unet` to draw clips of their captions; measures and shows it on held-out clips.

    `spatial` trains the image model's layers on single frames, each with a timestep of its own; `temporal` the temporal
    layers, on clips, with the image model as it is; `joint` everything. Batches also hold the clips' `origin`, where it
    is known. The setting `domain_adapter` is merged into the UNet for every loss, and for no sample and no export.
    """

    settings: TextToVideo

    def __init__(self, family: VideoLDM, stage: Stage, settings: TextToVideo, sampling: Preview, given: Given) -> None:
        super().__init__(family, settings, given)
        self.stage, self.sampling = stage, sampling
        self.nothing = family.embed([""])
        self.domain = Domain.below(family.unet, settings.domain_adapter)
        family.clips = replace(family.clips, domain_adapter=self.domain.name if self.domain else None)
        if given.adapter is None:
            choose_trainable(family.unet, stage)

    def condition(self, batch: Batch, clean: Tensor, noise: Noise) -> TextCondition:
        """What the UNet is told of the clips: their captions, frame rates, and where their pixels come from."""
        beside = {name: batch[name].to(noise.device) for name in ("origin", "fps") if name in batch}
        return replace(text_of(self.family, batch, noise.device), **beside)

    def trained_condition(
        self, batch: Batch, clean: Tensor, timestep: Tensor, noise: Noise, step: int
    ) -> TextCondition:
        """The same, with the empty prompt in place of some captions."""
        dropped = noise.uniform("drop") < self.settings.drop_caption  # (B,)
        return without_text(self.condition(batch, clean, noise), dropped, self.nothing)

    def timestep(self, clean: Tensor, noise: Noise) -> Tensor:
        """The timesteps of a step's clips: (B,), or (B, F) where frames are drawn alone."""
        frames = (clean.shape[1],) if self.stage == "spatial" else ()
        return self.timestep_of(noise.uniform("timestep", *frames))

    @property
    def frames_alone(self) -> bool:
        """Whether only the image model's layers are trained, on frames."""
        return self.stage == "spatial"

    def preview(self, folder: Path) -> None:
        """Sample the first held-out clips' captions: an mp4 each, a contact sheet per size, and prompts.txt."""
        self._write_prompts(folder)
        for places, drawn in self.drawn():
            clips = [to_uint8(unit(clip)) for clip in drawn]
            for place, clip in zip(places, clips, strict=True):
                video.write(folder / f"{place:02d}.mp4", clip, float(self.shown[place]["fps"][0]))
            labels = [f"{place:02d}" for place in places]
            video.contact_sheet(folder / sheet_name(self.shown, places), clips, labels)

    def drawn(self) -> Iterator[tuple[list[int], Tensor]]:
        """What a preview shows, by size: places of clips, and the samples of their captions (`draw`)."""
        for places in same_size(self.shown, len(self.shown)):
            yield places, self.draw(places)

    def draw(self, places: list[int]) -> Tensor:
        """Samples (N, F, 3, H, W), about in [-1, 1], of the captions at places of one size; the place is the seed."""
        frames, height, width = size_of(self.shown[places[0]])
        settings = Sampling(**asdict(self.sampling), frames=frames, height=height, width=width)
        prompts = [self.shown[place]["caption"][0] for place in places]
        with self._as_exported():
            return sample(self.family, prompts, [self.seed + place for place in places], settings).cpu()

    def export(self, folder: Path) -> None:
        """Write the adapter or, without one, the whole model as a folder that `VideoLDM.load` reads."""
        with self._as_exported():
            super().export(folder)

    def fingerprint(self) -> Mapping[str, str]:
        """What the trained weights rest on that no checkpoint holds: the adapter below the temporal layers."""
        return {} if self.domain is None else self.domain.fingerprint

    def _idle(self) -> list[nn.Module]:
        """Nothing: the UNet stays on the device while text and frames are encoded, as while they are drawn."""
        return []

    def _as_exported(self) -> AbstractContextManager[None]:
        return nullcontext() if self.domain is None else self.domain.left_out()


def choose_trainable(unet: VideoUNet, stage: Stage) -> None:
    """Freeze what a stage does not train."""
    created = unet.created_parameters()
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(stage == "joint" or (name in created) == (stage == "temporal"))
