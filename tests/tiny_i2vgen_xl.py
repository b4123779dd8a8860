"""I2VGen-XL, both stages, tiny, over the pocket model's text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_dynamicrafter import STRETCHED, image_encoder
from tiny_video_ldm import FRAMES, SIDE, write_text_model

from helpers import randomise
from inflate.families import i2vgen_xl_refiner
from inflate.families.i2vgen_xl import Clips, I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.video_ldm import VideoLDM
from inflate.layers.hierarchy import Hierarchy

HIERARCHY = Hierarchy(embedding=8, clip_tokens=2)


def base(folder: Path, hierarchy: Hierarchy = HIERARCHY, born: bool = False, **schedule: Any) -> I2VGenXL:
    """A model of the base stage, all of whose layers do something unless it is newborn; an empty folder is for what it
    is made of."""
    parent = VideoLDM.load(write_text_model(folder, **(schedule or STRETCHED)))
    made = I2VGenXL.from_text_to_video(parent, image_encoder(), Clips(FRAMES, 8.0, SIDE, SIDE), hierarchy)
    if not born:
        randomise(made.unet)
    return made


def refiner(folder: Path, born: bool = False, **schedule: Any) -> Refiner:
    """A model of the refinement stage, as `base`."""
    parent = VideoLDM.load(write_text_model(folder, **(schedule or STRETCHED)))
    if not born:
        randomise(parent.unet)
    clips = i2vgen_xl_refiner.Clips(FRAMES, 8.0, 2 * SIDE, 2 * SIDE)
    return Refiner(parent.unet, parent.vae, parent.text, parent.noise, clips)
