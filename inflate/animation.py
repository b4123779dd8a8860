"""Clips from images, by whatever family a model is of: the options that each has, the clips' size, their drawing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from inflate import catalogue
from inflate.data.pixels import to_float, to_uint8, unit
from inflate.errors import CheckpointError, ConfigError
from inflate.families import dynamicrafter, i2vgen_xl, i2vgen_xl_refiner, svd, video_ldm
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.svd import SVD
from inflate.formats import FORMATS
from inflate.models import folders, image_stream
from inflate.models.text_encoders import TextEncoders
from inflate.options import option
from inflate.sampling import dynamicrafter as dynamicrafter_sampling
from inflate.sampling import i2vgen_xl as i2vgen_xl_sampling
from inflate.sampling import svd as svd_sampling

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]
"""(height, width)"""
CUT = 0.05
"""Share of an image that is cut off without a word."""


@dataclass(frozen=True)
class Take:
    """A clip to be drawn."""

    image: Pixels
    """its first frame, (H, W, 3)"""
    seed: int = 0
    prompt: str = ""
    """what happens in it, for a family that is told"""
    end: Pixels | None = None
    """its last frame, (H, W, 3), for a family that can be given one; of clips drawn together all have one, or none"""
    frames: int | None = None
    """its length; none: as was asked for all"""


class Animator(Protocol):
    """A model that animates images, with the options of its clips."""

    OPTIONS: ClassVar[frozenset[str]]
    """the options of the command that not every family has"""

    @classmethod
    def load(cls, path: str, given: Mapping[str, Any]) -> Self:
        """The model in `path`, with the options that were given, by their names."""

    @property
    def family(self) -> SVD | DynamiCrafter | I2VGenXL:
        """The model."""

    @property
    def fps(self) -> float:
        """Frames per second of its clips."""

    @property
    def frames(self) -> int:
        """Length of its clips."""

    def size(self, height: int, width: int) -> Size:
        """How large clips are by default of an image as large as this."""

    def notes(self, prompts: Sequence[str], ends: bool) -> list[str]:
        """What it was not trained for of clips by these prompts, and with last frames where they have `ends`.

        ConfigError where it cannot draw them.
        """

    def draw(self, takes: Sequence[Take]) -> list[Pixels]:
        """Clips (F, H, W, 3), showing the progress."""


@dataclass(frozen=True)
class SVDAnimator:
    """Clips of an image alone."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset(
        ("motion_bucket", "noise_aug", "guidance_min", "guidance_max", "image_model", "image_encoder", "prediction")
    )
    family: SVD
    settings: svd_sampling.Sampling

    @classmethod
    def load(cls, path: str, given: Mapping[str, Any]) -> Self:
        """The model, inflated if it is an image model.

        A folder's clip length stays: so many of a sample's frames, however long it is, are decoded together.
        """
        named = {name: given[name] for name in ("image_model", "image_encoder", "prediction") if name in given}
        frames = given.get("frames") if path.endswith(folders.SAFETENSORS) else None
        family = SVD.load(path, frames=frames, **named)
        start = {"sigma_max": given["start"]} if "start" in given else {}
        asked = {"fps": family.fps, **asked_of(svd_sampling.Sampling, given), **start}
        return cls(family, svd_sampling.Sampling(**asked))

    @property
    def fps(self) -> float:
        """What the model is told."""
        return self.settings.fps

    @property
    def frames(self) -> int:
        """As asked, or that of training."""
        return self.settings.frames or self.family.frames

    def size(self, height: int, width: int) -> Size:
        """The image's shape at about the area that the model was made for."""
        family = self.family
        if family.height and family.width:
            return fitting(height, width, family.height * family.width, block_of(family))
        latent = family.unet.config.sample_size
        sides = (latent, latent) if isinstance(latent, int) else latent
        return fitting(height, width, family.factor**2 * sides[0] * sides[1], block_of(family))

    def notes(self, prompts: Sequence[str], ends: bool) -> list[str]:
        """None: it is given neither."""
        return []

    def draw(self, takes: Sequence[Take]) -> list[Pixels]:
        """One clip after the other."""
        return [self._drawn(take) for take in takes]

    def _drawn(self, take: Take) -> Pixels:
        settings = replace(self.settings, seed=take.seed, frames=take.frames or self.settings.frames)
        return in_pixels(svd_sampling.sample(self.family, batch([take.image]), settings, progress)[0])


@dataclass(frozen=True)
class DynamiCrafterAnimator:
    """Clips of an image and a prompt, and of a last frame where there is one."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset(
        ("prompt", "negative", "end_image", "loop", "stride", "eta", "guidance", "image_guidance", "rescale")
    )
    path: str
    family: DynamiCrafter
    settings: dynamicrafter_sampling.Sampling

    @classmethod
    def load(cls, path: str, given: Mapping[str, Any]) -> Self:
        """The model; ConfigError for a rate where it is told a stride, and the reverse."""
        told = dynamicrafter.Clips.read(folders.resolve(path, folders.CONFIGURATIONS) / folders.SETTINGS_FILE).told
        for name in {"fps", "stride"} & given.keys() - {told}:
            raise ConfigError(
                f"{option(name)}: {path} is told the {told} of its clips: give {option(told)} in its place"
            )
        asked = asked_of(dynamicrafter_sampling.Sampling, given) | {"number": given.get(told)} | timestep_of(given)
        settings = dynamicrafter_sampling.Sampling(**asked)
        return cls(path, DynamiCrafter.load(path), settings)

    @property
    def fps(self) -> float:
        """That of its clips; or what it is asked for by a number that means just this."""
        clips, number = self.family.clips, self.settings.number
        means_itself = clips.told == "fps" and clips.number in (None, math.floor(clips.fps))
        return number if means_itself and number is not None else clips.fps

    @property
    def frames(self) -> int:
        """As asked, or that of training."""
        return self.settings.frames or self.family.clips.frames

    def size(self, height: int, width: int) -> Size:
        """That of its training, whatever the image's: it has seen no other."""
        return self.family.size

    def notes(self, prompts: Sequence[str], ends: bool) -> list[str]:
        """Unknown words, and a last frame where it was trained without one, or cannot see it (ConfigError)."""
        if ends and not self.family.takes_detail:
            raise ConfigError(f"{self.path} sees no latent of its image, so that no last frame can be given to it")
        trained = self.family.clips.interpolation
        untrained = f"{self.path} was not trained to end on a given frame (clips.interpolation): it may miss it"
        endless = f"{self.path} was trained between a first and a last frame (clips.interpolation): give --end-image"
        plain = f"{self.path} does not tell the moments of its latents: a lower --start begins from plain noise"
        found = [untrained] * (ends and not trained) + [endless] * (trained and not ends)
        found += [plain] * (self.settings.start is not None and self.family.moments is None)
        return found + unknown_words(self.family.text, prompts)

    def draw(self, takes: Sequence[Take]) -> list[Pixels]:
        """All together, or as many at a time as there is room for."""
        ends = [take.end for take in takes if take.end is not None]
        settings = replace(self.settings, frames=takes[0].frames or self.settings.frames)
        clips = dynamicrafter_sampling.sample(
            self.family, batch([take.image for take in takes]), [take.prompt for take in takes],
            [take.seed for take in takes], settings, batch(ends) if ends else None, progress, device=device(),
        )  # fmt: skip
        return [in_pixels(clip) for clip in clips]


@dataclass(frozen=True)
class I2VGenXLAnimator:
    """Clips of an image and a prompt."""

    OPTIONS: ClassVar[frozenset[str]] = frozenset(("prompt", "negative", "eta", "guidance", "rescale"))
    path: str
    family: I2VGenXL
    settings: i2vgen_xl_sampling.Sampling

    @classmethod
    def load(cls, path: str, given: Mapping[str, Any]) -> Self:
        """The model."""
        asked = asked_of(i2vgen_xl_sampling.Sampling, given) | timestep_of(given)
        settings = i2vgen_xl_sampling.Sampling(**asked)
        return cls(path, I2VGenXL.load(path), settings)

    @property
    def fps(self) -> float:
        """What the model is told."""
        return self.settings.fps or self.family.clips.fps

    @property
    def frames(self) -> int:
        """As asked, or that of training."""
        return self.settings.frames or self.family.clips.frames

    def size(self, height: int, width: int) -> Size:
        """That of its training, whatever the image's: it has seen no other."""
        return self.family.size

    def notes(self, prompts: Sequence[str], ends: bool) -> list[str]:
        """Unknown words, and clips longer than training's; ConfigError for prompts where it is told none."""
        clips = self.family.clips
        if any(prompts) and not clips.prompts:
            raise ConfigError(f"{self.path} is told images alone: leave the prompts out")
        longer = (
            f"{self.path} was trained on clips of {clips.frames} frames, and tells each its place in the clip: for "
            "longer videos let a story (--story) go on from the last frame"
        )
        return [longer] * (self.frames > clips.frames) + unknown_words(self.family.text, prompts)

    def draw(self, takes: Sequence[Take]) -> list[Pixels]:
        """All together, or as many at a time as there is room for."""
        settings = replace(self.settings, frames=takes[0].frames or self.settings.frames)
        clips = i2vgen_xl_sampling.sample(
            self.family, batch([take.image for take in takes]), [take.prompt for take in takes],
            [take.seed for take in takes], settings, progress, device=device(),
        )  # fmt: skip
        return [in_pixels(clip) for clip in clips]


KINDS: dict[str, type[Animator]] = {
    svd.FAMILY: SVDAnimator,
    dynamicrafter.FAMILY: DynamiCrafterAnimator,
    i2vgen_xl.FAMILY: I2VGenXLAnimator,
}
"""What animates images, by family."""


def kind_of(path: str, given: Iterable[str]) -> type[Animator]:
    """What animates images with the model in `path`, and has the options that were given, by their names.

    CheckpointError where nothing does, ConfigError for an option that only other families have.
    """
    _refuse_unconverted(path)
    family = folders.family_of(path) or svd.FAMILY
    if image_stream.is_in(Path(path).expanduser()):
        raise CheckpointError(f"{path} is an image stream alone: stage=adapt of a run makes a model of it")
    if family == video_ldm.FAMILY:
        raise CheckpointError(
            f'{path} is of {family}, which draws from prompts alone: inflate generate {path} "a prompt" -o out.mp4'
        )
    refuse_refiner(path, family)
    if family not in KINDS:
        raise CheckpointError(f"{path} is of {family}; images are animated by {' and '.join(KINDS)}")
    for name in given:
        others = [other for other, kind in KINDS.items() if name in kind.OPTIONS]
        if others and family not in others:
            of = " and ".join(others)
            raise ConfigError(f"{option(name)} is an option of {of}, and {path} is of {family}: leave it out")
    return KINDS[family]


def takes_prompts(path: str) -> bool:
    """Whether the model in `path`, of a family that animates images, is told prompts; CheckpointError."""
    family = folders.family_of(path) or svd.FAMILY
    kind = KINDS.get(family)
    if family == i2vgen_xl.FAMILY:
        return i2vgen_xl.Clips.read(folders.resolve(path, folders.CONFIGURATIONS) / folders.SETTINGS_FILE).prompts
    return kind is None or "prompt" in kind.OPTIONS


def unprompted(path: str, prompts: Sequence[str]) -> list[str]:
    """A note where a model that is told prompts is given none."""
    silent = not any(prompts) and takes_prompts(path)
    return ["no prompt: the model is told the empty one"] if silent else []


def refuse_refiner(path: str, family: str | None) -> None:
    """Raise CheckpointError for a model that refines clips and draws none by itself."""
    if family == i2vgen_xl_refiner.FAMILY:
        remedy = f"inflate refine VIDEO --model {path} -o out.mp4, or add --refine {path} to inflate sample MODEL IMAGE"
        raise CheckpointError(f"{path} is of {family}, which refines clips that there are: {remedy}")


def _refuse_unconverted(path: str) -> None:
    """Raise CheckpointError for a single file that only `inflate convert` reads."""
    file = Path(path).expanduser()
    found = catalogue.recognise(file)[0] if path.endswith(folders.SAFETENSORS) and file.is_file() else None
    if found in ("dynamicrafter-file", "videocrafter-file"):
        remedy = f"convert it first: inflate convert {path} OUT --tokenizer FOLDER"
        raise CheckpointError(f"{path} is {FORMATS[found]}; {remedy}")


def timestep_of(given: Mapping[str, Any]) -> dict[str, int]:
    """The timestep to start from, where one is given; ConfigError for a fraction."""
    start = given.get("start")
    if start is None:
        return {}
    if start != int(start):
        raise ConfigError(f"{option('start')} is {start}: it must be a whole number for this model")
    return {"start": int(start)}


def asked_of(schema: type[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of a sampler's settings."""
    return {field.name: given[field.name] for field in fields(schema) if field.name in given}


def unknown_words(text: TextEncoders, prompts: Sequence[str]) -> list[str]:
    """A note on words of prompts that the text encoders' vocabulary lacks, where there are some."""
    unknown = text.unknown_words(" ".join(prompts))
    return [f"the model's text encoder does not know: {', '.join(unknown)}"] if unknown else []


def block_of(family: SVD) -> int:
    """Pixels of which both sides must be a multiple, for every level of the UNet to be twice the next."""
    return int(family.factor * 2 ** (len(family.unet.config.block_out_channels) - 1))


def fitting(height: int, width: int, area: int, block: int) -> Size:
    """A size in whole blocks with about an image's shape, and this area in pixels."""
    scale = (area / (height * width)) ** 0.5
    return max(1, round(height * scale / block)) * block, max(1, round(width * scale / block)) * block


def cut(height: int, width: int, size: Size) -> float:
    """The share of an image that is left out where it is scaled to cover `size` and cropped about its centre."""
    shapes = sorted((width / height, size[1] / size[0]))
    return 1 - shapes[0] / shapes[1]


def batch(images: Sequence[Pixels]) -> Tensor:
    """Images (H, W, 3) of one size as (B, 3, H, W) in [-1, 1], on the GPU if there is one."""
    return torch.from_numpy(to_float(np.stack(images))).to(device())  # (B, 3, H, W)


def in_pixels(clip: Tensor) -> Pixels:
    """A clip (F, 3, H, W) in [-1, 1] as a file has it, (F, H, W, 3)."""
    return to_uint8(unit(clip))


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def progress(steps: Sequence[Any], doing: str = "sampling") -> Any:
    """Show the steps of a sampler as they are taken."""
    return tqdm(steps, desc=doing, unit="step")
