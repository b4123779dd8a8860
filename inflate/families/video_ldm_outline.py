"""A text-to-video model without memory, from configurations alone: what its training would cost."""

from __future__ import annotations

from pathlib import Path

from diffusers import UNet2DConditionModel

from inflate.families.video_ldm import FAMILY, Clips, VideoLDM
from inflate.models import exchange, folders, outlines, single_file, temporal_layers
from inflate.models.single_file_text import load_text_encoders
from inflate.models.stable_diffusion import load_noise, noise_of
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet


def outline(path: str | Path, tokenizer: str | Path | None = None, spec: TemporalSpec = VIDEO_LDM) -> VideoLDM:
    """What `VideoLDM.load` loads from a folder, by a published name, or from a file, on the meta device.

    No weights are read. CheckpointError where a configuration is missing, or a file is not whole.
    """
    if str(path).endswith(folders.SAFETENSORS):
        return _of_file(Path(path).expanduser(), tokenizer, spec)
    folder = folders.outline(path)
    if temporal_layers.are_in(folder):
        return outline(temporal_layers.image_model_of(folder / folders.SETTINGS_FILE, FAMILY), tokenizer)
    noise = load_noise(folder / "scheduler")
    return VideoLDM(
        _unet(folder / "unet", spec),
        outlines.outline_vae(folder / "vae"),
        outlines.outline_text(folder),
        noise,
        Clips(),
    )


def _of_file(file: Path, tokenizer: str | Path | None, spec: TemporalSpec) -> VideoLDM:
    image = single_file.load_image_model(file, "epsilon", exchange.read_headers)  # what it predicts costs nothing
    text = load_text_encoders(file, tokenizer, exchange.read_headers)
    for network in (image.vae, *text.networks):
        network.float()
    unet = exchange.build_unet(folders.plain(image.unet.config), spec)
    return VideoLDM(unet, image.vae, text, noise_of(image.noise.config, file), Clips())


def _unet(folder: Path, spec: TemporalSpec) -> VideoUNet:
    if folders.unet_kind(folder, UNet2DConditionModel, VideoUNet) is UNet2DConditionModel:
        return exchange.build_unet(exchange.with_defaults(UNet2DConditionModel, folder), spec)
    return outlines.outline_unet(folder)
