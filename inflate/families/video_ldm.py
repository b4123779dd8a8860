"""Text-to-video by alignment of an image model (Video LDM, Blattmann et al., 2304.08818): loading, prompts, export.

The image model's layers stay as they were and temporal layers between them are trained, on the image model's own
noise schedule. Its text encoders give the context of every frame, and of the temporal layers.

Stable Diffusion XL is also told the pooled state of the prompt and six sizes in pixels: the source's height and width,
the top and left of what was cut out of it, and the clip's height and width. In training they are those of each clip's
file, by how its frames are scaled and cropped; a sampled clip is its own source, uncut. Its autoencoder overflows in
float16 (`force_upcast`): here every frozen network stays in float32, whatever precision the UNet is trained in.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from inflate.errors import CheckpointError
from inflate.models import exchange, folders, single_file, temporal_layers
from inflate.models.single_file_text import load_text_encoders, tokenizer_folder
from inflate.models.stable_diffusion import SHARED_WITH_EULER, Encoding, TextToVideo, load_noise, load_vae, noise_of
from inflate.models.text_encoders import ZEROS, TextCondition, TextEncoders
from inflate.models.trained_clips import TrainedClips
from inflate.models.unet import VIDEO_LDM, TemporalSpec, VideoUNet, load_strictly
from inflate.models.vae import VideoVAE
from inflate.objectives import Predict
from inflate.surgery import inflate_unet

log = logging.getLogger(__name__)

Sampler = Literal["ddim", "euler"]
FAMILY = "video_ldm"
SIZES = 6
"""Numbers that Stable Diffusion XL is told of a clip's pixels."""


@dataclass(frozen=True)
class Clips(TrainedClips):
    """What the clips of training were."""

    family: ClassVar[str] = FAMILY

    domain_adapter: str | None = None
    """what held their look below the temporal layers meanwhile, which sampling leaves out: file, weight and hash"""
    number: float | None = None
    """frames per second that the UNet is told unless asked otherwise, where they are not those above"""


@dataclass
class Encoders(Encoding):
    """The frozen networks without a UNet."""

    vae: AutoencoderKL
    text: TextEncoders

    @classmethod
    def load(cls, path: str | Path, tokenizer: str | Path | None = None, image_model: str | Path | None = None) -> Self:
        """The encoders of what `VideoLDM.load` loads; CheckpointError as there."""
        if str(path).endswith(folders.SAFETENSORS):
            refuse_other(path, image_model)
            file = Path(path).expanduser()
            tensors = exchange.read_saved(file)
            vae = single_file.load_vae(file, lambda _: tensors)
            return cls(vae, load_text_encoders(file, tokenizer, lambda _: tensors))
        folder = folders.resolve(path)
        if temporal_layers.are_in(folder):
            file = folder / folders.SETTINGS_FILE
            parent = image_model or temporal_layers.image_model_of(file, FAMILY)
            return cls.load(parent, tokenizer_of(file, parent, tokenizer))
        if image_model is not None:
            folders.unet_kind(folder / "unet", VideoUNet)
            return cls.load(image_model, tokenizer)
        refuse_of_file(path, tokenizer=tokenizer)
        return cls(load_vae(folder / "vae"), TextEncoders.load(folder))


@dataclass
class VideoLDM(TextToVideo):
    """A text-to-video model: its networks, its noise schedule, and what its clips were."""

    clips: Clips

    def __post_init__(self) -> None:
        super().__post_init__()
        check_added(self.unet, self.text.pooled_width)
        channels = self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise CheckpointError(f"the UNet takes {self.unet.config.in_channels} channels but the VAE has {channels}")
        if self.unet.spec.added_ids > 1:
            raise CheckpointError(f"the UNet is told {self.unet.spec.added_ids} numbers; the frame rate alone is known")

    @classmethod
    def load(
        cls,
        path: str | Path,
        image_model: str | Path | None = None,
        tokenizer: str | Path | None = None,
        prediction: single_file.Prediction | None = None,
        spec: TemporalSpec = VIDEO_LDM,
    ) -> Self:
        """Loads what `path` is: an image model, which is inflated by `spec`, an export of ours, or temporal layers
        alone.

        The temporal layers of the last two go over `image_model` where one is named, in place of their own: a
        fine-tuned one changes the look. An image model in a .safetensors file goes with a folder
        that holds a `tokenizer`, and `prediction` says what it predicts, where the file does not tell.
        CheckpointError, listing the tensors, where a part is missing, does not fit, or is not whole.
        """
        if str(path).endswith(folders.SAFETENSORS):
            refuse_other(path, image_model)
            return cls._from_single_file(Path(path).expanduser(), tokenizer, prediction, spec)
        folder = folders.resolve(path)
        if temporal_layers.are_in(folder):
            return cls._over_image_model(folder, image_model, tokenizer, prediction)
        kind = folders.unet_kind(folder / "unet", UNet2DConditionModel, VideoUNet)
        if kind is UNet2DConditionModel:
            refuse_other(path, image_model)
        if image_model is not None:
            return cls.load(folder).over(image_model, tokenizer, prediction)
        refuse_of_file(path, tokenizer=tokenizer, prediction=prediction)
        encoders = Encoders.load(folder)
        noise = load_noise(folder / "scheduler")
        if kind is VideoUNet:
            file = folder / folders.SETTINGS_FILE
            clips, base_scale = Clips.read(file), folders.read_json(file).get("base_scale", 1.0)
            unet = load_strictly(VideoUNet.from_pretrained, folder / "unet", {"torch_dtype": torch.float32})
        else:
            clips, base_scale = Clips(), 1.0
            unet = inflated(folders.load_parent(UNet2DConditionModel, folder / "unet"), spec)
        return cls(unet, encoders.vae, encoders.text, noise, clips, base_scale=base_scale)

    @classmethod
    def _from_single_file(
        cls,
        file: Path,
        tokenizer: str | Path | None,
        prediction: single_file.Prediction | None,
        spec: TemporalSpec,
    ) -> Self:
        if not single_file.is_single_image_model(file):
            raise CheckpointError(f"{file} holds no image model of Stable Diffusion; give one, or a model's folder")
        tokenizer_folder(file, tokenizer)  # before anything slow
        tensors = exchange.read_saved(file)
        image = single_file.load_image_model(file, prediction, lambda _: tensors)
        text = load_text_encoders(file, tokenizer, lambda _: tensors)
        return cls(inflated(image.unet, spec), image.vae, text, noise_of(image.noise.config, file), Clips())

    def predict(self, condition: TextCondition, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it, for a condition on prompts.

        `unet` is its wrapped form (DDP, EMA) where there is one. `image_only` takes all frames for images: every
        temporal layer is bypassed.
        """
        network = self.unet if unet is None else unet

        def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
            marks = self.unet.all_images(noisy) if image_only else None
            context, added = condition.context.to(noisy.dtype), self.added(condition, noisy)
            told = self.told(condition, noisy)
            output: Tensor = network(noisy, timestep, context, told, image_only=marks, **added).sample
            return output  # (B, F, C, h, w)

        return predict

    def told(self, condition: TextCondition, noisy: Tensor) -> Tensor | None:
        """The frame rate (B, 1) of latents (B, F, C, h, w), in whole frames per second, where the UNet is told it."""
        if self.unet.spec.added_ids == 0:
            return None
        usual = self.clips.fps if self.clips.number is None else self.clips.number
        fps = noisy.new_full((len(noisy),), usual) if condition.fps is None else condition.fps
        return fps.to(noisy).floor()[:, None]  # (B, 1)

    def added(self, condition: TextCondition, noisy: Tensor) -> dict[str, dict[str, Tensor]]:
        """What the UNet adds to the time embedding of every frame of latents (B, F, C, h, w); nothing of SD 1 and 2."""
        if condition.pooled is None:
            return {}
        frames, sizes = noisy.shape[1], time_ids(condition.origin, noisy, self.factor)
        added = {"text_embeds": condition.pooled.to(noisy.dtype), "time_ids": sizes}  # (B, P), (B, 6)
        return {"added_cond_kwargs": {name: each.repeat_interleave(frames, 0) for name, each in added.items()}}

    def scheduler(self, sampler: Sampler) -> DDIMScheduler | EulerDiscreteScheduler:
        """A sampler on the model's noise schedule."""
        if sampler == "ddim":
            return DDIMScheduler.from_config(self.noise.config)
        shared = {key: value for key, value in self.noise.config.items() if key in SHARED_WITH_EULER}
        return EulerDiscreteScheduler.from_config(shared)

    def over(
        self,
        image_model: str | Path,
        tokenizer: str | Path | None = None,
        prediction: single_file.Prediction | None = None,
    ) -> Self:
        """The temporal layers over another image model of the same shape; CheckpointError where they do not fit."""
        if isinstance(self.vae, VideoVAE):
            raise CheckpointError(f"a temporal decoder belongs over its own autoencoder, not that of {image_model}")
        other = self._of_image_model(image_model, tokenizer, prediction)
        theirs, own = other.unet.created_parameters(), self.unet.created_parameters()
        shapes = [{name: value.shape for name, value in layers.items()} for layers in (theirs, own)]
        if other.unet.spec != self.unet.spec or shapes[0] != shapes[1]:
            raise CheckpointError(f"{image_model} is of another shape than the image model of these temporal layers")
        temporal_layers.refuse_other_layers(temporal_layers.layers_beside(self.unet), other.unet, "this export")
        if temporal_layers.differing(self.parts, other.parts):
            temporal_layers.say_other("this export", image_model)
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(own[name])
        other.clips, other.base_scale = self.clips, self.base_scale
        return other

    def save_temporal(
        self,
        folder: str | Path,
        image_model: str,
        tokenizer: str | None = None,
        prediction: single_file.Prediction | None = None,
    ) -> None:
        """Writes the temporal layers alone, in half precision, and the name of the image model that they belong over.

        That is read with a tokenizer and a prediction, as by `load`, which are kept. CheckpointError, with nothing
        written, where the image model is not this one's, to the bit.
        """
        born = self._of_image_model(image_model, tokenizer, prediction)
        trained = {"spec": self.unet.spec.to_dict(), "objective": asdict(self.objective)}
        settings = {**self._told(), **trained, **temporal_layers.sources(prediction, tokenizer=tokenizer)}
        temporal_layers.save(Path(folder), self.parts, born.parts, image_model, settings)

    @classmethod
    def _of_image_model(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        prediction: single_file.Prediction | None = None,
    ) -> Self:
        """An image model, inflated; CheckpointError where it is a video model."""
        if not str(path).endswith(folders.SAFETENSORS):
            folder = folders.resolve(path)
            if temporal_layers.are_in(folder) or not folders.holds(folder, UNet2DConditionModel):
                raise CheckpointError(f"{path} is no image model; name a Stable Diffusion folder as image_model")
        return cls.load(path, None, tokenizer, prediction)

    @classmethod
    def _over_image_model(
        cls,
        folder: Path,
        image_model: str | Path | None,
        tokenizer: str | Path | None,
        prediction: single_file.Prediction | None,
    ) -> Self:
        file = folder / folders.SETTINGS_FILE
        clips, spec = Clips.read(file), temporal_layers.spec_of(file)
        parent = image_model or temporal_layers.image_model_of(file, FAMILY)
        if image_model is None:
            prediction = temporal_layers.source(file, "prediction", prediction)
        family = cls._of_image_model(parent, tokenizer_of(file, parent, tokenizer), prediction)
        if family.unet.spec != spec:
            raise CheckpointError(f"{file} is of temporal layers {spec}, not {family.unet.spec}")
        temporal_layers.load(folder, family.parts, image_model)
        _compare_objectives(file, family, parent, refuse=image_model is None)
        family.clips = clips
        return family

    @property
    def settings(self) -> dict[str, Any]:
        """What is kept of the model beside its parts, as JSON values."""
        return {**self._told(), "base_scale": self.base_scale, ZEROS: self.text.zeros_for_empty}

    def _told(self) -> dict[str, Any]:
        return {"family": FAMILY, "clips": asdict(self.clips)}


def _compare_objectives(file: Path, family: VideoLDM, image_model: str | Path, refuse: bool) -> None:
    """Say, or raise CheckpointError, where an image model predicts otherwise than temporal layers were trained with."""
    trained, own = folders.read_json(file).get("objective"), asdict(family.objective)
    if trained is None or {**own, **trained} == own:  # what an earlier version did not say is as it was
        return
    told = f"{file} is of temporal layers trained with {trained}, but {image_model} has {own}"
    if refuse:
        raise CheckpointError(f"{told}: mend its scheduler, or say what it predicts")
    log.warning("%s: its samples may fall apart", told)


@dataclass
class Model:
    """The model that training starts from."""

    path: str = "pocket"
    """`pocket`; a Stable Diffusion 1, 2 or XL folder in diffusers' layout, or its name on the Hub; one in a
    .safetensors file, as communities share them; or an export of ours, whole or its temporal layers alone"""
    image_model: str | None = None
    """for temporal layers, alone or of an export: the Stable Diffusion that they go over, where it is another than
    their own or lies elsewhere"""
    tokenizer: str | None = None
    """for a single file, which holds none: folder of a tokenizer or of any Stable Diffusion, or its name on the Hub"""
    prediction: single_file.Prediction | None = None
    """what a Stable Diffusion 2 in a single file predicts, which it does not tell: the 768-pixel ones v_prediction"""

    def load(self) -> VideoLDM:
        """The model, inflated where it is an image model; CheckpointError."""
        return VideoLDM.load(self.path, self.image_model, self.tokenizer, self.prediction)


def inflated(unet: UNet2DConditionModel, spec: TemporalSpec) -> VideoUNet:
    """An image model's UNet with temporal layers; the log says what was made."""
    video, report = inflate_unet(unet, spec)
    log.info("inflated the UNet\n%s", report.table())
    return video


def refuse_of_file(path: str | Path, **given: object) -> None:
    """Raise CheckpointError for a setting of a single file's that is given with a folder, which tells it itself."""
    for name, value in given.items():
        if value is not None:
            raise CheckpointError(f"{path} is no single file, and its folder says its {name}: leave {name} out")


def refuse_other(path: str | Path, image_model: str | Path | None) -> None:
    """Raise CheckpointError where an image model, which has no temporal layers, is to go over another."""
    if image_model is not None:
        raise CheckpointError(f"{path} is an image model, without temporal layers to go over another one")


def tokenizer_of(file: Path, image_model: str | Path, tokenizer: str | Path | None) -> Any:
    """The tokenizer that goes with the image model of temporal layers, whose settings are in `file`; none: its own."""
    is_file = str(image_model).endswith(folders.SAFETENSORS)
    return temporal_layers.source(file, "tokenizer", tokenizer) if is_file else tokenizer


def check_added(unet: VideoUNet, pooled: int) -> None:
    """Raise CheckpointError unless a UNet adds to its time embedding what encoders give: `pooled` numbers, or none."""
    config = unet.config
    if config.addition_embed_type not in (None, "text_time"):
        raise CheckpointError(f"the UNet adds {config.addition_embed_type} to its time embedding; known is text_time")
    if (config.addition_embed_type is None) != (pooled == 0):
        raise CheckpointError("Stable Diffusion XL's UNet and a second text encoder belong together: one is missing")
    width = SIZES * config.addition_time_embed_dim + pooled if pooled else None
    if pooled and config.projection_class_embeddings_input_dim != width:
        needed = config.projection_class_embeddings_input_dim
        raise CheckpointError(f"the pooled text and {SIZES} sizes have {width} dimensions but the UNet adds {needed}")


def time_ids(origin: Tensor | None, latents: Tensor, factor: int) -> Tensor:
    """The sizes (B, 6), float32, of the pixels of latents (B, F, C, h, w): origin (B, 4), else uncut, then own size."""
    own = latents.new_tensor([side * factor for side in latents.shape[-2:]], dtype=torch.float32)
    target = own.expand(len(latents), -1)  # (B, 2)
    before = torch.cat([target, torch.zeros_like(target)], dim=1) if origin is None else origin.to(target)  # (B, 4)
    return torch.cat([before, target], dim=1)  # (B, 6)
