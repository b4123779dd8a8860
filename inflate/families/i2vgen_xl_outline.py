"""I2VGen-XL, both stages, without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from pathlib import Path

from inflate.families import i2vgen_xl, i2vgen_xl_refiner
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.models import folders
from inflate.models.image_encoders import outline_image_encoder
from inflate.models.outlines import outline_text, outline_unet, outline_vae
from inflate.models.stable_diffusion import load_noise


def outline(path: str | Path) -> I2VGenXL:
    """What `I2VGenXL.load` loads, on the meta device; no weights are read.

    CheckpointError where a configuration is missing.
    """
    folder = folders.outline(path)
    unet, vae, text = outline_unet(folder / "unet"), outline_vae(folder / "vae"), outline_text(folder)
    clips, vision = (
        i2vgen_xl.read_clips(folder / folders.SETTINGS_FILE),
        outline_image_encoder(folder / "image_encoder"),
    )
    return I2VGenXL(unet, vae, text, load_noise(folder / "scheduler"), clips, vision)


def outline_refiner(path: str | Path) -> Refiner:
    """The same of what `Refiner.load` loads."""
    folder = folders.outline(path)
    unet, vae, text = outline_unet(folder / "unet"), outline_vae(folder / "vae"), outline_text(folder)
    clips = i2vgen_xl_refiner.read_clips(folder / folders.SETTINGS_FILE)
    return Refiner(unet, vae, text, load_noise(folder / "scheduler"), clips)
