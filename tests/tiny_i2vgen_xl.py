"""I2VGen-XL, both stages, tiny, over the pocket model's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_dynamicrafter import STRETCHED, image_encoder
from tiny_video_ldm import FRAMES, PROMPT, SIDE, clip, write_text_model
from torch import Tensor

from helpers import randomise
from inflate.families import i2vgen_xl_refiner
from inflate.families.i2vgen_xl import Clips, I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.video_ldm import VideoLDM
from inflate.layers.hierarchy import Hierarchy
from inflate.models.unet import VIDEO_LDM, TemporalSpec
from inflate.sampling.i2vgen_xl import Sampling, sample
from inflate.sampling.refinement import Refinement, refine

HIERARCHY = Hierarchy(embedding=8, clip_tokens=2)


def base(
    folder: Path,
    hierarchy: Hierarchy = HIERARCHY,
    born: bool = False,
    spec: TemporalSpec = VIDEO_LDM,
    **schedule: Any,
) -> I2VGenXL:
    """A model of the base stage, all of whose layers do something unless it is newborn; an empty folder is for what it
    is made of."""
    parent = VideoLDM.load(write_text_model(folder, **(schedule or STRETCHED)), spec=spec)
    made = I2VGenXL.from_text_to_video(parent, image_encoder(), Clips(FRAMES, 8.0, SIDE, SIDE), hierarchy)
    if not born:
        randomise(made.unet)
    return made


def refiner(folder: Path, born: bool = False, spec: TemporalSpec = VIDEO_LDM, **schedule: Any) -> Refiner:
    """A model of the refinement stage, as `base`."""
    parent = VideoLDM.load(write_text_model(folder, **(schedule or STRETCHED)), spec=spec)
    if not born:
        randomise(parent.unet)
    clips = i2vgen_xl_refiner.Clips(FRAMES, 8.0, 2 * SIDE, 2 * SIDE)
    return Refiner(parent.unet, parent.vae, parent.text, parent.noise, clips)


def drawn(family: I2VGenXL | Refiner) -> Tensor:
    """A clip (1, F, 3, H, W) that a model draws of a fixed one, or of its first frame, by every part that it has."""
    given = clip(100)["pixels"]
    if isinstance(family, I2VGenXL):
        return sample(family, given[:, 0], [PROMPT], [0], Sampling(2, guidance=2.0, spacing="trailing"))
    return refine(family, given, [PROMPT], [0], settings=Refinement(steps=2, guidance=2.0))


def weights(family: I2VGenXL | Refiner) -> dict[str, Tensor]:
    """The tensors of every part, by its name and theirs."""
    return {f"{part}.{name}": value for part, each in family.parts.items() for name, value in each.state_dict().items()}
