"""DynamiCrafter without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from pathlib import Path

from inflate.families.dynamicrafter import DynamiCrafter, read_clips
from inflate.models import folders
from inflate.models.image_encoders import outline_image_encoder
from inflate.models.outlines import outline_text, outline_unet, outline_vae
from inflate.models.stable_diffusion import load_noise


def outline(path: str | Path) -> DynamiCrafter:
    """What `DynamiCrafter.load` loads, on the meta device; no weights are read.

    CheckpointError where a configuration is missing.
    """
    folder = folders.outline(path)
    unet, vae, text = outline_unet(folder / "unet"), outline_vae(folder / "vae"), outline_text(folder)
    vision = outline_image_encoder(folder / "image_encoder")
    return DynamiCrafter(
        unet, vae, text, load_noise(folder / "scheduler"), read_clips(folder / folders.SETTINGS_FILE), vision
    )
