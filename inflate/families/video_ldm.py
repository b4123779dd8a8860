"""Text-to-video by alignment of an image model (Video LDM, Blattmann et al., 2304.08818): loading, prompts, export.

The image model's layers stay as they were and temporal layers between them are trained, on the image model's own
noise schedule. Its text encoder gives the context of every frame, and of the temporal layers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from inflate.errors import CheckpointError
from inflate.models import folders, temporal_layers
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet, load_strictly
from inflate.models.vae import VideoVAE, decode_clips, encode_clips
from inflate.objectives import BETA_END, BETA_START, DDPM, TRAIN_TIMESTEPS, Predict
from inflate.surgery import inflate_unet

log = logging.getLogger(__name__)

Sampler = Literal["ddim", "euler"]
FAMILY = "video_ldm"
COUNTERS = ("text_model.embeddings.position_ids", "embeddings.position_ids")
"""What older text encoders' files hold beside weights."""


@dataclass(frozen=True)
class Clips:
    """What the clips of training were, which sampling repeats."""

    frames: int = 16
    """length"""
    fps: float = 8.0
    """frames per second"""
    height: int | None = None
    """pixels; none: the size that the UNet's configuration names"""
    width: int | None = None
    """pixels"""


class Encoding:
    """What a model with a VAE and a text encoder makes of frames and prompts."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents (B, F, C, h, w), the posterior's mode, of clips (B, F, 3, H, W) in [-1, 1]; no gradient."""
        return encode_clips(self.vae, pixels)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clips (B, F, 3, H, W), about in [-1, 1], of scaled latents (B, F, C, h, w), one clip at a time.

        Frame by frame with an image model's decoder, all frames of a clip together with a temporal one.
        """
        temporal = isinstance(self.vae, VideoVAE)
        return torch.cat([decode_clips(self.vae, clip, temporal=temporal) for clip in latents.split(1)])

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """The text encoder's states (B, L, D) of prompts, padded or cut to the tokenizer's length."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip
        states: Tensor = self.text_encoder(tokens.to(self.text_encoder.device)).last_hidden_state
        return states  # (B, L, D)


@dataclass
class Encoders(Encoding):
    """The frozen networks without a UNet."""

    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The encoders of what `VideoLDM.load` loads; CheckpointError as there."""
        folder = folders.resolve(path)
        if temporal_layers.are_in(folder):
            return cls.load(entry(folder / folders.SETTINGS_FILE, "image_model"))
        refuse_two_text_encoders(folder)
        return cls(load_vae(folder / "vae"), load_text_encoder(folder), load_tokenizer(folder))


@dataclass
class VideoLDM(Encoding):
    """A text-to-video model: its networks, its noise schedule, and what its clips were."""

    unet: VideoUNet
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    noise: DDIMScheduler
    """the image model's noise schedule, as a DDIM sampler's settings"""
    clips: Clips

    def __post_init__(self) -> None:
        width, needed = self.text_encoder.config.hidden_size, self.unet.config.cross_attention_dim
        if width != needed:
            raise CheckpointError(f"the text encoder has {width} dimensions but the UNet's context has {needed}")
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise CheckpointError(f"the UNet takes {self.unet.config.in_channels} channels but the VAE has {channels}")

    @classmethod
    def load(cls, path: str | Path, image_model: str | Path | None = None) -> Self:
        """Loads what `path` is: an image model, which is inflated, an export of ours, or temporal layers alone.

        The temporal layers of the last two go over `image_model` where one is named, in place of their own: a
        fine-tuned one changes the look and keeps the motion. CheckpointError, listing the tensors, where a part is
        missing, does not fit, or is not whole.
        """
        folder = folders.resolve(path)
        if temporal_layers.are_in(folder):
            return cls._over_image_model(folder, image_model)
        if image_model is not None:
            return cls.load(folder).over(image_model)
        kind = folders.unet_kind(folder / "unet", UNet2DConditionModel, VideoUNet)
        encoders = Encoders.load(folder)
        noise = load_noise(folder / "scheduler")
        if kind is VideoUNet:
            clips = read_clips(folder / folders.SETTINGS_FILE)
            unet = load_strictly(VideoUNet.from_pretrained, folder / "unet", {"torch_dtype": torch.float32})
        else:
            clips = Clips()
            unet, report = inflate_unet(folders.load_parent(UNet2DConditionModel, folder / "unet"), VIDEO_LDM)
            log.info("inflated the UNet\n%s", report.table())
        return cls(unet, encoders.vae, encoders.text_encoder, encoders.tokenizer, noise, clips)

    @property
    def objective(self) -> DDPM:
        """What the image model was trained with."""
        config = self.noise.config
        return DDPM(config.prediction_type, config.rescale_betas_zero_snr)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The UNet and the frozen networks."""
        return self.unet, self.vae, self.text_encoder

    @property
    def device(self) -> torch.device:
        """Where the UNet's parameters are."""
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels of the clips of training or, freshly inflated, of the image model."""
        if self.clips.height and self.clips.width:
            return self.clips.height, self.clips.width
        latent = self.unet.config.sample_size
        height, width = (latent, latent) if isinstance(latent, int) else latent
        return height * self.factor, width * self.factor

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks, in place."""
        for network in self.networks:
            network.to(device)
        return self

    def predict(self, context: Tensor, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a context (B, L, D).

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed.
        """
        network = self.unet if unet is None else unet

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            marks = noisy.new_ones(noisy.shape[:2], dtype=torch.bool) if image_only else None  # (B, F)
            output: Tensor = network(noisy, timestep, context.to(noisy.dtype), image_only=marks).sample
            return output  # (B, F, C, h, w)

        return predict

    def scheduler(self, sampler: Sampler) -> DDIMScheduler | EulerDiscreteScheduler:
        """A sampler on the model's noise schedule."""
        if sampler == "ddim":
            return DDIMScheduler.from_config(self.noise.config)
        shared = {key: value for key, value in self.noise.config.items() if key in _SHARED_WITH_EULER}
        return EulerDiscreteScheduler.from_config(shared)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes every part in its own sub-folder, and what the clips were to inflate.json; atomic.

        CheckpointError, with nothing written, where the folder holds other files.
        """
        folders.write(Path(folder), self._write)

    def over(self, image_model: str | Path) -> Self:
        """The temporal layers over another image model of the same shape; CheckpointError where they do not fit."""
        other = _image_model(image_model)
        theirs, own = other.unet.created_parameters(), self.unet.created_parameters()
        shapes = [{name: value.shape for name, value in layers.items()} for layers in (theirs, own)]
        if other.unet.spec != self.unet.spec or shapes[0] != shapes[1]:
            raise CheckpointError(f"{image_model} is of another shape than the image model of these temporal layers")
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(own[name])
        other.clips = self.clips
        return other  # type: ignore[return-value]

    def save_temporal(self, folder: str | Path, image_model: str) -> None:
        """Writes the temporal layers alone, in half precision, and the name of the image model that they belong over.

        CheckpointError, with nothing written, where the image model is not this one's, to the bit.
        """
        settings = {**self._settings(), "spec": self.unet.spec.to_dict()}
        temporal_layers.save(Path(folder), self.parts, _image_model(image_model).parts, image_model, settings)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}

    @classmethod
    def _over_image_model(cls, folder: Path, image_model: str | Path | None) -> Self:
        file = folder / folders.SETTINGS_FILE
        family = _image_model(image_model or entry(file, "image_model"))
        spec = TemporalSpec.from_dict(entry(file, "spec"))
        if family.unet.spec != spec:
            raise CheckpointError(f"{file} is of temporal layers {spec}, not {family.unet.spec}")
        temporal_layers.load(folder, family.parts, check=image_model is None)
        family.clips = read_clips(file)
        return family  # type: ignore[return-value]

    def _write(self, folder: Path) -> None:
        parts = ("unet", "vae", "text_encoder", "tokenizer")
        for name in parts:
            getattr(self, name).save_pretrained(folder / name)
        self.noise.save_pretrained(folder / "scheduler")
        (folder / folders.SETTINGS_FILE).write_text(json.dumps(self._settings(), indent=2) + "\n")

    def _settings(self) -> dict[str, Any]:
        return {"family": FAMILY, "clips": asdict(self.clips)}


def _image_model(path: str | Path) -> VideoLDM:
    """An image model, inflated; CheckpointError where it is a video model."""
    folder = folders.resolve(path)
    if temporal_layers.are_in(folder) or not folders.holds(folder, UNet2DConditionModel):
        raise CheckpointError(f"{path} is no image model; name a Stable Diffusion folder as image_model")
    return VideoLDM.load(folder)


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket"
    """`pocket`; a Stable Diffusion 1 or 2 folder in diffusers' layout, or its name on the Hub; or an export of ours"""

    def load(self) -> VideoLDM:
        """The model, inflated where it is an image model; CheckpointError."""
        return VideoLDM.load(self.path)


_SHARED_WITH_EULER = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing",
    "steps_offset", "rescale_betas_zero_snr",
)  # fmt: skip


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, an image model's or one with a temporal decoder; CheckpointError."""
    kind = folders.unet_kind(folder, AutoencoderKL, VideoVAE)
    return folders.load_parent(kind, folder)


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """The CLIP text encoder of a pipeline's folder, in float32; CheckpointError where it is missing or not whole."""
    inside = folder / "text_encoder"
    folders.read_json(inside / "config.json")
    try:
        return load_strictly(CLIPTextModel.from_pretrained, inside, {"dtype": torch.float32}, COUNTERS)
    except SafetensorError as error:
        raise CheckpointError(f"{inside} cannot be read: {error}; download or copy it again") from error


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer of a pipeline's folder; CheckpointError where there is none."""
    if not (folder / "tokenizer").is_dir():
        raise CheckpointError(f"{folder / 'tokenizer'} is missing: text-to-video needs the image model's tokenizer")
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'tokenizer'} cannot be read: {error}") from error


def load_noise(folder: Path) -> DDIMScheduler:
    """The noise schedule of an image model's scheduler, of whatever class; CheckpointError where it is not SD's.

    With zero terminal SNR sampling begins at the last timestep, which other spacings leave out.
    """
    config = folders.read_json(folder / "scheduler_config.json")
    betas = tuple(config.get(name) for name in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"))
    if betas != (BETA_START, BETA_END, "scaled_linear", TRAIN_TIMESTEPS):
        raise CheckpointError(f"{folder} has betas {betas}; only Stable Diffusion's schedule is known")
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise CheckpointError(f"{folder} predicts {config['prediction_type']}; only epsilon and v_prediction are known")
    spacing = {"timestep_spacing": "trailing"} if config.get("rescale_betas_zero_snr") else {}
    known = {key: value for key, value in config.items() if key in _DDIM_SETTINGS}
    return DDIMScheduler.from_config({**known, **spacing, "clip_sample": False})


_DDIM_SETTINGS = (*_SHARED_WITH_EULER, "set_alpha_to_one")


def read_clips(file: Path) -> Clips:
    """What an export's settings file says of its clips; CheckpointError where it is missing or not whole."""
    try:
        return Clips(**entry(file, "clips"))
    except TypeError as error:
        raise CheckpointError(f"{file} is not whole: {error}; export the model again") from error


def entry(file: Path, name: str) -> Any:
    """An entry of an export's settings file; CheckpointError where it is missing, or the file is another family's."""
    return temporal_layers.entry(file, FAMILY, name)


def refuse_two_text_encoders(folder: Path) -> None:
    """Raise CheckpointError for Stable Diffusion XL."""
    if (folder / "text_encoder_2").is_dir():
        raise CheckpointError(
            f"{folder} has two text encoders (Stable Diffusion XL), whose pooled states and image sizes the UNet adds "
            "to its time embedding; text-to-video knows Stable Diffusion 1 and 2 only"
        )
