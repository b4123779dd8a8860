"""What is cached of clips: latents and, by family, image embeddings and noised first frames, or captions' states."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from inflate.data.settings import Data
from inflate.families.i2vgen_xl import FirstFrameEncoding
from inflate.families.svd_encoders import Encoding
from inflate.models import stable_diffusion
from inflate.models.animators import ImageEncoding
from inflate.models.text_encoders import SUFFIXES, TextEncoders
from inflate.models.vae import encoder_sha256
from inflate.models.weights import weights_sha256
from inflate.training.animating import FEATURES
from inflate.training.image_text_to_video import ALL_FEATURES, ImageTextToVideo
from inflate.training.image_to_video import ImageToVideo
from inflate.training.noise import seed_of

Precision = Literal["float32", "bfloat16", "float16"]
VAE_SETTINGS = ("act_fn", "norm_num_groups")
TEXT_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads")
POOLED_SETTINGS = (*TEXT_SETTINGS, "eos_token_id")
IMAGE_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")
"""Of the networks' configurations: what makes other results of the same weights."""


def clip_encoder(family: Encoding, data: Data, conditioning: ImageToVideo) -> ClipEncoder:
    """The encoder that the settings of a run ask for."""
    aug = conditioning.noise_aug_mean, conditioning.noise_aug_std
    return ClipEncoder(family, data.cache_dtype, data.cache_draws, *aug)


def image_text_encoder(family: ImageEncoding, data: Data, settings: ImageTextToVideo) -> ImageTextClipEncoder:
    """The encoder that the settings of a run ask for: of the frames that may be the image."""
    return ImageTextClipEncoder(family, data.cache_dtype, settings.condition_frame == "random")


def i2vgen_xl_encoder(stage: str, family: stable_diffusion.Encoding, data: Data) -> TextClipEncoder:
    """The encoder of a stage of I2VGen-XL: of captions and first frames for its base, of captions for refinement."""
    if stage == "base":
        assert isinstance(family, FirstFrameEncoding)
        return FirstFrameClipEncoder(family, data.cache_dtype)
    return TextClipEncoder(family, data.cache_dtype)


class ClipEncoder:
    """The frozen networks of a Stable Video Diffusion model, as `inflate.data.cache.Encoder`.

    `draws` condition frames are noised and encoded of each first frame, their noise levels log-normal with `aug_mean`
    and `aug_std`; 0 leaves that to the training step.
    """

    reads_captions = False

    def __init__(self, family: Encoding, precision: Precision, draws: int, aug_mean: float, aug_std: float) -> None:
        self.family, self.draws, self.aug = family, draws, (aug_mean, aug_std)
        self.precision, self.dtype = precision, getattr(torch, precision)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Hashes and settings of the encoders, the image encoder's input statistics, precision and draws."""
        family, (mean, std) = self.family, self.aug
        return {
            "vae": encoder_sha256(family.vae), "latent scale": str(family.vae.config.scaling_factor),
            "vae settings": _settings(family.vae, VAE_SETTINGS), **image_identity(family), "precision": self.precision,
            "condition frames": f"{self.draws} at log-normal {mean} {std}" if self.draws else "none",
        }  # fmt: skip

    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of frames (N, 3, H, W)."""
        return self.family.encode(pixels.to(self.family.vae.device)[None])[0].to(self.dtype)

    def of_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        """Nothing else."""
        return {}

    def starts(self, pixels: Tensor, seeds: Sequence[str]) -> dict[str, Tensor]:
        """`context` (N, 1, D), and with draws `image_latents` (N, K, C, h, w) of noise levels `augs` (N, K)."""
        pixels = pixels.to(self.family.vae.device)
        found = {"context": self.family.embed(pixels).to(self.dtype)}
        if self.draws:
            drawn = [self._drawn(frame, seed) for frame, seed in zip(pixels, seeds, strict=True)]
            found["image_latents"] = torch.stack([latents for latents, _ in drawn]).to(self.dtype)
            found["augs"] = torch.stack([augs for _, augs in drawn])
        return found

    def captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Nothing: the model reads none."""
        return {}

    def _drawn(self, frame: Tensor, seed: str) -> tuple[Tensor, Tensor]:
        """The latents (K, C, h, w) of a frame (3, H, W), noised anew for each, and the levels (K,) of the noise."""
        generator = torch.Generator().manual_seed(seed_of(seed))
        mean, std = self.aug
        augs = torch.exp(mean + std * torch.randn(self.draws, generator=generator))  # (K,)
        noise = torch.randn(self.draws, *frame.shape, generator=generator).to(frame.device)  # (K, 3, H, W)
        return self.family.image_latent(frame.expand(self.draws, -1, -1, -1), augs.to(frame.device), noise), augs


class TextClipEncoder:
    """The frozen networks of a text-to-video model, as `inflate.data.cache.Encoder`."""

    reads_captions = True

    def __init__(self, family: stable_diffusion.Encoding, precision: Precision) -> None:
        self.family, self.precision, self.dtype = family, precision, getattr(torch, precision)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """Hashes and settings of the encoders, what of their tokenizers shows in tokens, and the precision."""
        family = self.family
        return {
            "vae": encoder_sha256(family.vae), "latent scale": str(family.vae.config.scaling_factor),
            "vae settings": _settings(family.vae, VAE_SETTINGS), **text_identity(family.text),
            "precision": self.precision,
        }  # fmt: skip

    def latents(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of frames (N, 3, H, W)."""
        return self.family.encode(pixels.to(self.family.vae.device)[None])[0].to(self.dtype)

    def of_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        """Nothing else."""
        return {}

    def starts(self, pixels: Tensor, seeds: Sequence[str]) -> dict[str, Tensor]:
        """Nothing: no frame is a condition."""
        return {}

    def captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`caption_states` (N, L, D), the text encoders' states, and, where there are two, `caption_pooled` (N, P)."""
        found = self.family.embed(texts)
        states = {"caption_states": found.context.to(self.dtype)}
        return states if found.pooled is None else {**states, "caption_pooled": found.pooled.to(self.dtype)}


class ImageTextClipEncoder(TextClipEncoder):
    """The frozen networks of a model that animates an image by a text, as `inflate.data.cache.Encoder`.

    The image encoder's features are those of every frame, or of first frames alone.
    """

    family: ImageEncoding

    def __init__(self, family: ImageEncoding, precision: Precision, every_frame: bool) -> None:
        super().__init__(family, precision)
        self.every_frame = every_frame

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """That of a text-to-video model, the image encoder's, and of which frames the features are."""
        features = "every frame" if self.every_frame else "first frames"
        return {**super().identity, **image_identity(self.family), "image features": features}

    def of_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        """`frame_features` (N, P, E), where they are of every frame."""
        return {ALL_FEATURES: self._features(pixels)} if self.every_frame else {}

    def starts(self, pixels: Tensor, seeds: Sequence[str]) -> dict[str, Tensor]:
        """`features` (N, P, E), where they are of first frames."""
        return {} if self.every_frame else {FEATURES: self._features(pixels)}

    def _features(self, pixels: Tensor) -> Tensor:
        return self.family.embed_image(pixels.to(self.family.vae.device)).to(self.dtype)


class FirstFrameClipEncoder(ImageTextClipEncoder):
    """The frozen networks of I2VGen-XL's base stage, as `inflate.data.cache.Encoder`."""

    def __init__(self, family: FirstFrameEncoding, precision: Precision) -> None:
        super().__init__(family, precision, every_frame=False)

    @cached_property
    def identity(self) -> Mapping[str, str]:
        """That of a text-to-video model, the image encoder's, and what its features are."""
        return {**super().identity, "image features": "projected embeddings of first frames"}


def image_identity(family: Encoding | ImageEncoding) -> dict[str, str]:
    """All that an image encoder's results depend on."""
    return {
        "image_encoder": weights_sha256(family.image_encoder),
        "image settings": _settings(family.image_encoder, IMAGE_SETTINGS),
        "image statistics": f"{family.image_mean} {family.image_std}",
    }


def text_identity(text: TextEncoders) -> dict[str, str]:
    """All that the states of prompts depend on."""
    found: dict[str, str] = {}
    for one, network, tokenizer in zip(SUFFIXES, text.networks, text.tokenizers, strict=False):
        found |= {
            f"text_encoder{one}": weights_sha256(network), f"vocabulary{one}": vocabulary_sha256(tokenizer),
            f"text settings{one}": _settings(network, POOLED_SETTINGS if one else TEXT_SETTINGS),
            f"tokens{one}": str(tokenizer.model_max_length),
        }  # fmt: skip
        if tokenizer.pad_token != tokenizer.eos_token:
            found[f"padding{one}"] = str(tokenizer.pad_token)
    return found | ({"empty caption": "zeros"} if text.zeros_for_empty else {})


def vocabulary_sha256(tokenizer: CLIPTokenizer) -> str:
    """A hash of a tokenizer's words and their numbers."""
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()


def _settings(network: Any, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {getattr(network.config, name)}" for name in names)
