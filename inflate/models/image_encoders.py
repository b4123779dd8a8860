"""CLIP image encoders: how one is loaded, and what it is shown of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.models import folders
from inflate.models.unet import load_strictly

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ENCODER_FILES = ("*.json", "model*.safetensors", "image_encoder/*", "feature_extractor/*")
"""Files to download of a pipeline, and of a CLIP model of its own."""
ENCODERS = {
    768: "that of Stable Diffusion 1 is openai/clip-vit-large-patch14",
    1024: "that of Stable Diffusion 2 and Stable Video Diffusion is laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    2048: "that of Stable Diffusion XL joins two text encoders, and no image encoder embeds in it: use another parent",
}
"""Which image encoder fits a context, by its width."""
TEXT_TOWER = ("text_model.", "text_projection.", "logit_scale")
"""Tensors of a whole CLIP model that its image encoder does without."""


def encoder_folder(path: str | Path) -> Path:
    """The folder of the image encoder that `path` is or, being a pipeline, has; CheckpointError where there is none."""
    folder = folders.resolve(path, ENCODER_FILES)
    inside = folder / "image_encoder"
    return inside if inside.is_dir() else folder


def load_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    """The CLIP image encoder of a folder, also of a whole CLIP model's, in float32.

    CheckpointError, listing the tensors, where it is not whole.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no CLIP image encoder; give the folder of one, or its name on the Hub, as image_encoder; "
            "it must embed in as many dimensions as the UNet's context has (1024, Stable Diffusion 2 and Stable Video "
            "Diffusion: laion/CLIP-ViT-H-14-laion2B-s32B-b79K; 768, Stable Diffusion 1: openai/clip-vit-large-patch14)"
        )
    whole, config = _encoder_config(folder)
    settings: dict[str, Any] = {"dtype": torch.float32, "config": config}
    others = TEXT_TOWER if whole else ()
    try:
        return load_strictly(CLIPVisionModelWithProjection.from_pretrained, folder, settings, others)
    except SafetensorError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}; download or copy it again") from error


def outline_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    """The same without memory; the folder's weights are not read."""
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(_encoder_config(folder)[1])


def _encoder_config(folder: Path) -> tuple[bool, CLIPVisionConfig]:
    """Whether a folder holds a whole CLIP model, and the configuration of its image encoder."""
    if folders.read_json(folder / "config.json").get("model_type") != "clip":
        return False, CLIPVisionConfig.from_pretrained(folder)
    both = CLIPConfig.from_pretrained(folder)
    both.vision_config.projection_dim = both.projection_dim
    return True, both.vision_config


def image_statistics(*places: Path) -> dict[str, Any]:
    """The input mean and deviation that the first preprocessor_config.json found states; none: the class's own."""
    for folder in places:
        file = folder / "preprocessor_config.json"
        if file.is_file():
            stated = folders.read_json(file)
            return {name: tuple(stated[name]) for name in ("image_mean", "image_std") if name in stated}
    return {}


def shown(
    encoder: CLIPVisionModelWithProjection, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """What an encoder is shown (B, 3, size, size) of images (B, 3, H, W) in [-1, 1], squashed to its square.

    `mean` and `std` are those of its inputs in [0, 1], per channel.
    """
    size = encoder.config.image_size
    return normalised(encoder, resize_antialiased(images, (size, size)), mean, std)


def shown_squarely(
    encoder: CLIPVisionModelWithProjection, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """What an encoder is shown (B, 3, size, size) of the central square of images (B, 3, H, W) in [-1, 1], resized
    bilinearly, as I2VGen-XL's was."""
    size = encoder.config.image_size
    square = central_square(images)
    small = F.interpolate(square, size=(size, size), mode="bilinear", antialias=True)  # (B, 3, size, size)
    return normalised(encoder, small, mean, std)


def normalised(
    encoder: CLIPVisionModelWithProjection, small: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Images (B, 3, size, size) in [-1, 1] as an encoder's inputs, of its precision."""
    small = (small + 1.0) / 2.0
    centre, spread = (small.new_tensor(value)[:, None, None] for value in (mean, std))
    return ((small - centre) / spread).to(encoder.dtype)


def central_square(images: Tensor) -> Tensor:
    """The largest square (B, C, S, S) in the middle of images (B, C, H, W)."""
    height, width = images.shape[2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[:, :, top : top + side, left : left + side]


def resize_antialiased(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) at another size (h, w): a Gaussian blur as wide as the shrinking needs, then bicubic.

    The corners stay in place; each axis has its own standard deviation (shrinking - 1) / 2, in pixels, and a window
    of four of them: what the published model's image encoder was fed with.
    """
    for axis, target in zip((2, 3), size, strict=True):
        image = _blur(image, axis, image.shape[axis] / target)
    return F.interpolate(image, size=size, mode="bicubic", align_corners=True)  # (B, C, h, w)


def _blur(image: Tensor, axis: int, shrinking: float) -> Tensor:
    deviation = max((shrinking - 1.0) / 2.0, 0.001)
    radius = int(max(4.0 * deviation, 3)) // 2
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    weights = torch.exp(-(offsets**2) / (2.0 * deviation**2))
    kernel = (weights / weights.sum()).reshape((1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1))
    padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    padded = F.pad(image, padding, mode="reflect").flatten(0, 1).unsqueeze(1)  # (B C, 1, H', W')
    return F.conv2d(padded, kernel).reshape(image.shape)  # (B, C, H, W)
