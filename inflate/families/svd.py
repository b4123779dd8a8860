"""Stable Video Diffusion (Blattmann et al., 2311.15127): conditioning, loading, export.

A clip is animated from its first frame, which the UNet sees twice: as a CLIP embedding in cross-attention and as a
noised latent beside the noisy latents of every frame. `SVD.condition` is the one function that builds this, for
training and for sampling.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from inflate.errors import CheckpointError, ConfigError, DataError
from inflate.families import svd_encoders, svd_files, svd_original
from inflate.families.svd_encoders import (
    Encoding,
    encoder_of,
    load_video_vae,
    needed_encoder,
    refuse_another_encoder,
)
from inflate.families.svd_original import Original
from inflate.models import exchange, folders, image_encoders, temporal_layers
from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD, image_statistics
from inflate.models.moments import LatentMoments
from inflate.models.single_file import Prediction, is_single_image_model, load_image_model
from inflate.models.unet import TemporalSpec, VideoUNet
from inflate.models.vae import VideoVAE
from inflate.objectives import BETA_END, BETA_START, EDM, TRAIN_TIMESTEPS, Predict
from inflate.surgery import evaluating, inflate_unet, inflate_vae

log = logging.getLogger(__name__)

FAMILY = svd_encoders.FAMILY
LONGEST = 25
"""Frames that the longest of the published decoders was trained to decode together."""
SIGMA_MIN, SIGMA_MAX = 0.002, 700.0


@dataclass(frozen=True)
class Condition:
    """All that the UNet is given beside the noisy clip."""

    context: Tensor
    """CLIP embedding of the clean first frame, (B, 1, D)"""
    image_latent: Tensor
    """unscaled posterior mode of the noised first frame, (B, C, h, w)"""
    added_ids: Tensor
    """fps - 1, motion bucket and noise augmentation, (B, 3)"""

    def null(self) -> "Condition":
        """The condition that guidance leads away from: no embedding and no latent, the same ids."""
        return Condition(torch.zeros_like(self.context), torch.zeros_like(self.image_latent), self.added_ids)

    def without_image(self) -> "Condition":
        """The condition of an image: its latent, which is all but the answer, is withheld; its embedding stays."""
        return replace(self, image_latent=torch.zeros_like(self.image_latent))

    def drop(self, draw: Tensor, both: float, context_only: float = 0.0, image_only: float = 0.0) -> "Condition":
        """Zeroes parts of each clip's condition by its uniform draw (B,): both, the context, or the latent.

        The three rates are probabilities; ConfigError where they exceed 1 together or one is negative.
        """
        if min(both, context_only, image_only) < 0 or both + context_only + image_only > 1:
            raise ConfigError(
                f"drop rates {both}, {context_only}, {image_only} must be at least 0 and at most 1 in all"
            )
        no_context = draw < both + context_only
        no_image = (draw < both) | ((draw >= both + context_only) & (draw < both + context_only + image_only))
        context = self.context.masked_fill(no_context[:, None, None], 0.0)  # (B, 1, D)
        return Condition(context, self.image_latent.masked_fill(no_image[:, None, None, None], 0.0), self.added_ids)

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Several conditions as one batch."""
        return cls(
            torch.cat([each.context for each in conditions]),
            torch.cat([each.image_latent for each in conditions]),
            torch.cat([each.added_ids for each in conditions]),
        )


@dataclass(frozen=True)
class MotionBuckets:
    """The measured map from a clip's motion score to 0..255; the published model's own was never told.

    `quantiles` are scores at evenly spaced shares of the training clips, so that the bucket says how many clips move
    less: 127 is the median. Without quantiles every clip is in bucket 127.
    """

    quantiles: tuple[float, ...] = ()

    @classmethod
    def fit(cls, scores: Sequence[float] | Tensor) -> Self:
        """Measures the map on motion scores of any unit; DataError where there are none or one is not finite."""
        values = torch.as_tensor(scores, dtype=torch.float64).flatten()
        if len(values) == 0 or not bool(values.isfinite().all()):
            raise DataError(f"motion buckets need finite motion scores of clips, got {len(values)} scores")
        shares = torch.linspace(0, 1, min(256, len(values)), dtype=torch.float64)
        return cls(tuple(torch.quantile(values, shares).tolist()))

    def bucket(self, score: Tensor) -> Tensor:
        """The bucket, 0..255 in whole numbers and in float32, of each score (B,)."""
        if len(self.quantiles) < 2 or self.quantiles[0] == self.quantiles[-1]:
            return torch.full_like(score, 127.0, dtype=torch.float32)
        edges, scores = torch.tensor(self.quantiles, dtype=torch.float64), score.cpu().double().contiguous()
        low = (torch.searchsorted(edges, scores, right=True) - 1).clamp(0, len(edges) - 2)
        step = (edges[low + 1] - edges[low]).clamp(min=torch.finfo(torch.float64).tiny)
        share = ((scores - edges[low]) / step).clamp(0.0, 1.0)
        return (255.0 * (low + share) / (len(edges) - 1)).round().float().to(score.device)


@dataclass(frozen=True)
class ExportGap:
    """Largest absolute differences between our models and their export, on random inputs of unit variance."""

    unet: float
    """rounding, and the group-norm epsilon of 1e-6 that diffusers has in its cross-attention blocks"""
    decoder: float
    """rounding, and at the border a folded post-quant convolution"""


@dataclass
class SVD(Encoding):
    """A Stable Video Diffusion model: its networks, and what training fixed that sampling must repeat."""

    unet: VideoUNet
    vae: VideoVAE
    image_encoder: CLIPVisionModelWithProjection
    objective: EDM = field(default_factory=EDM)
    motion: MotionBuckets = field(default_factory=MotionBuckets)
    moments: LatentMoments | None = None
    """of the scaled latents of training; none: not measured"""
    frames: int = 14
    """clip length of training"""
    decode_chunk: int = 14
    """frames decoded together: the norms of the decoder couple them, so it is the chunk of the decoder's training"""
    fps: float = 7.0
    """frames per second of the clips"""
    height: int | None = None
    """of the clips of training, pixels; none: the size that the UNet's configuration names"""
    width: int | None = None
    """of the clips of training, pixels"""
    sigma_min: float = SIGMA_MIN
    """lowest noise level of sampling"""
    sigma_max: float = SIGMA_MAX
    """highest noise level of sampling"""
    image_mean: tuple[float, ...] = CLIP_MEAN
    """per channel, of the image encoder's inputs in [0, 1]"""
    image_std: tuple[float, ...] = CLIP_STD
    """per channel, of the image encoder's inputs in [0, 1]"""

    def __post_init__(self) -> None:
        self.sigma_max = min(self.sigma_max, self.objective.sigma_limit)
        width, needed = self.image_encoder.config.projection_dim, self.unet.config.cross_attention_dim
        if width != needed:
            fitting = image_encoders.ENCODERS.get(needed, f"one that embeds in {needed} dimensions is needed")
            raise CheckpointError(
                f"the image encoder embeds in {width} dimensions but the UNet's context has {needed}: {fitting}"
            )
        channels = 2 * self.vae.config.latent_channels
        if self.unet.config.in_channels != channels:
            raise CheckpointError(
                f"the UNet takes {self.unet.config.in_channels} channels but the VAE's need {channels}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        image_encoder: str | Path | None = None,
        epsilon: float = 1e-5,
        frames: int | None = None,
        prediction: Prediction | None = None,
        image_model: str | Path | None = None,
    ) -> Self:
        """Loads what `path` is: an image model, which is inflated, or a video model; a folder or a .safetensors file.

        `epsilon` is the group-norm epsilon that a newly inflated UNet has in its cross-attention blocks: 1e-5 is the
        parent's and the original's, and keeps the parent exact; 1e-6 is diffusers', whose pipeline then samples the
        export exactly. `frames` is its clip length, or that of the original's file, where it does not tell: none, 14.
        A folder of a video model has both already. `prediction` is what an image model in a single file predicts, where
        the file does not tell. Temporal layers alone go over `image_model` where one is named, in place of the one that
        they were trained on.
        """
        place = folders.place_of(path)
        if image_model is not None or temporal_layers.are_in(place):
            return cls._over_image_model(place, image_model, image_encoder, prediction)
        if is_image_model(place):
            spec = TemporalSpec(cross_attention_resnet_eps=epsilon)
            return cls._inflated(place, image_encoder, prediction, spec, frames or cls.frames)
        refuse_prediction(path, prediction)
        if place.suffix == folders.SAFETENSORS:
            return cls.from_sgm(place, image_encoder, frames)
        refuse_another_encoder(path, image_encoder)
        return cls.from_pretrained(place)

    @classmethod
    def from_image_model(
        cls,
        path: str | Path,
        image_encoder: str | Path | None = None,
        spec: TemporalSpec | None = None,
        objective: EDM | None = None,
        frames: int = 14,
    ) -> Self:
        """Inflates a Stable Diffusion folder in diffusers' layout, or one on the Hub named owner/name.

        Without `objective` the network is told of noise as its scheduler did, which keeps a v-predicting model's
        denoiser exact. CheckpointError, with nothing made, where a part is missing, not whole, or does not fit.
        """
        folder = folders.resolve(path)
        scheduler = folders.read_json(folder / "scheduler" / "scheduler_config.json")
        inherited = objective or objective_of(scheduler, folder)
        encoder_folder = image_encoders.encoder_folder(image_encoder) if image_encoder else folder / "image_encoder"
        encoder = image_encoders.load_image_encoder(encoder_folder)
        image_unet = folders.load_parent(UNet2DConditionModel, folder / "unet")
        image_vae = folders.load_parent(AutoencoderKL, folder / "vae")
        statistics = image_statistics(encoder_folder, folder / "feature_extractor")
        networks = inflated(image_unet, image_vae, spec or TemporalSpec())
        return cls(*networks, encoder, inherited, frames=frames, decode_chunk=frames, **statistics)

    @classmethod
    def from_single_file(
        cls,
        file: Path,
        image_encoder: str | Path,
        spec: TemporalSpec | None = None,
        prediction: Prediction | None = None,
        frames: int = 14,
    ) -> Self:
        """Inflates a Stable Diffusion 1 or 2 in a single file; the image encoder comes from its own folder.

        CheckpointError, with nothing made, where the file is not whole or does not fit.
        """
        image = load_image_model(file, prediction)
        folder = image_encoders.encoder_folder(image_encoder)
        encoder = image_encoders.load_image_encoder(folder)
        objective = objective_of(image.scheduler, file)
        networks = inflated(image.unet, image.vae, spec or TemporalSpec())
        return cls(*networks, encoder, objective, frames=frames, decode_chunk=frames, **image_statistics(folder))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Loads diffusers' Stable Video Diffusion folder, or an export of ours, which is the same and more.

        CheckpointError, listing the tensors, where they do not match the models one to one.
        """
        folder = folders.resolve(path)
        own = folder / folders.SETTINGS_FILE
        settings = folders.read_json(own) if own.is_file() else {}
        unet = svd_files.load_diffusers_unet(folder / "unet", settings.get("unet"))
        vae = load_video_vae(folder)
        encoder = image_encoders.load_image_encoder(folder / "image_encoder")
        statistics = image_statistics(folder / "feature_extractor")
        if settings:
            return cls(unet, vae, encoder, **_remembered(settings, own), **statistics)
        frames = folders.read_json(folder / "unet" / "config.json").get("num_frames", cls.frames)
        return cls(unet, vae, encoder, frames=frames, decode_chunk=frames, **statistics)

    @classmethod
    def _over_image_model(
        cls,
        folder: Path,
        image_model: str | Path | None,
        image_encoder: str | Path | None,
        prediction: Prediction | None,
    ) -> Self:
        temporal_layers.refuse_others(folder)
        file = folder / folders.SETTINGS_FILE
        temporal_layers.entry(file, FAMILY, "unet")
        spec = temporal_layers.spec_of(file)
        parent = image_place(image_model or temporal_layers.image_model_of(file, FAMILY))
        encoder = temporal_layers.source(file, "image_encoder", image_encoder)
        if parent.suffix == folders.SAFETENSORS:
            prediction = temporal_layers.source(file, "prediction", prediction)
        family = cls._inflated(parent, encoder, prediction, spec)
        temporal_layers.load(folder, family.parts, image_model)
        return replace(family, **_remembered(folders.read_json(file), file))

    @classmethod
    def _inflated(
        cls,
        place: Path,
        image_encoder: str | Path | None,
        prediction: Prediction | None,
        spec: TemporalSpec,
        frames: int = 14,
    ) -> Self:
        """An image model in a folder or a file, inflated."""
        if place.suffix == folders.SAFETENSORS:
            return cls.from_single_file(place, needed_encoder(place, image_encoder), spec, prediction, frames)
        refuse_prediction(place, prediction)
        return cls.from_image_model(place, image_encoder, spec, frames=frames)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The networks by the names of their folders."""
        return {"unet": self.unet, "vae": self.vae, "image_encoder": self.image_encoder}

    def save_temporal(
        self,
        folder: str | Path,
        image_model: str,
        image_encoder: str | None = None,
        prediction: Prediction | None = None,
    ) -> None:
        """Writes the temporal layers and the input convolution alone, in half precision, for over `image_model`.

        That is read with an image encoder and a prediction, as by `load`, which are kept. CheckpointError, with nothing
        written, where the image model is not this one's, to the bit.
        """
        born = SVD._inflated(image_place(image_model), image_encoder, prediction, self.unet.spec)
        settings = {**self._settings(), **temporal_layers.sources(prediction, image_encoder=image_encoder)}
        temporal_layers.save(Path(folder), self.parts, born.parts, image_model, settings)

    @classmethod
    def from_sgm(
        cls,
        file: str | Path,
        image_encoder: str | Path | None = None,
        frames: int | None = None,
        head_channels: int = svd_files.HEAD_CHANNELS,
    ) -> Self:
        """Loads a single .safetensors file in the original's names; `image_encoder` is for a file without one.

        No tensor tells the clip length: without `frames` and where no header of ours tells, it is that of the smaller
        of the two published models, and the log says so. CheckpointError, listing the tensors, where one is missing,
        left over or of another shape.
        """
        place = Path(file).expanduser()
        original, told = Original.read(place), exchange.told_by(place)
        encoder, statistics = encoder_of(original, image_encoder)
        unet, vae = original.load_unet(head_channels), original.load_vae()
        unet.register_to_config(sample_size=told.get("sample_size") or svd_files.SAMPLE_SIZE)
        settings = {name: told[name] for name in _PLAIN_SETTINGS if name in told}
        if frames is None and "frames" not in told:
            frames = cls.frames
            log.warning(
                "%s does not tell how long its clips are: SVD's %d frames are assumed; SVD-XT, of tensors alike, has "
                "25, which is said by --frames or model.frames", file, frames,
            )  # fmt: skip
        if frames is not None:
            settings = {"decode_chunk": min(frames, LONGEST), **settings, "frames": frames}
        return cls(unet, vae, encoder, **settings, **statistics)

    @property
    def device(self) -> torch.device:
        """Where the UNet's parameters are."""
        return next(self.unet.parameters()).device

    @property
    def factor(self) -> int:
        """Pixels along a latent's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def to(self, device: torch.device | str) -> Self:
        """Moves the networks, in place."""
        for network in (self.unet, self.vae, self.image_encoder):
            network.to(device)
        return self

    @torch.no_grad()
    def condition(
        self,
        first_frame: Tensor,
        fps: Tensor,
        bucket: Tensor,
        aug: Tensor,
        noise: Tensor,
        context: Tensor | None = None,
    ) -> Condition:
        """The condition of clips from their first frames (B, 3, H, W) in [-1, 1]: the one of training and sampling.

        `fps` in frames per second, `bucket` in 0..255 and the noise augmentation `aug` (a sigma, in pixel values)
        are (B,); `noise` is standard normal like `first_frame`. CLIP sees the clean frame, the latent is unscaled
        (2311.15127, appendix D.3). `context` is the embedding where it is known.
        """
        context = self.embed(first_frame) if context is None else context
        return assemble(context, self.image_latent(first_frame, aug, noise), fps, bucket, aug)

    def predict(self, condition: Condition, unet: nn.Module | None = None, image_only: bool = False) -> Predict:
        """The network as objectives and samplers call it; `unet` is its wrapped form (DDP, EMA) where there is one.

        `image_only` takes all frames for images: every temporal layer is bypassed.
        """
        return predictor(self.unet if unet is None else unet, condition, image_only)

    def scheduler(self, sigma_min: float | None = None, sigma_max: float | None = None) -> EulerDiscreteScheduler:
        """The sampler's schedule; ConfigError where its noise exceeds what the network can be told of."""
        low = self.sigma_min if sigma_min is None else sigma_min
        high = self.sigma_max if sigma_max is None else sigma_max
        return euler_scheduler(self.objective, low, high)

    def export_gap(self, seed: int = 0) -> ExportGap:
        """Measures what diffusers' classes compute otherwise with these weights, on two frames of noise."""
        return self._gap(*self._twins(), seed)

    def save_pretrained(self, folder: str | Path) -> ExportGap:
        """Writes the layout of diffusers' StableVideoDiffusionPipeline, and beside it what only we need; atomic.

        Returns the measured gap, which `inflate.json` states too. CheckpointError, with nothing written, where
        diffusers' classes cannot hold the models or the folder holds other files.
        """
        svd_files.refuse_what_diffusers_lacks(self.unet, self.vae, self.image_encoder.config.image_size)
        unet, vae = self._twins()
        gap = self._gap(unet, vae, seed=0)
        folders.write(Path(folder), lambda aside: self._write(aside, unet, vae, gap))
        return gap

    def save_sgm(self, file: str | Path) -> list[str]:
        """Writes a single .safetensors file in the original's names, atomic; returns the settings that it cannot tell.

        Its header tells what the clips are and the size of the latents. CheckpointError, with nothing written, where
        the original's networks cannot hold the models.
        """
        wrong = svd_original.differing(self.unet, self.vae, self.image_encoder)
        if self.objective.noise_condition != "edm":
            wrong.append(f"noise_condition {self.objective.noise_condition}, of the image model that it was made of")
        if (self.image_mean, self.image_std) != (CLIP_MEAN, CLIP_STD):
            wrong.append(f"image_mean {self.image_mean}, image_std {self.image_std}")
        if wrong:
            raise CheckpointError(f"the original's file of Stable Video Diffusion has no place for: {'; '.join(wrong)}")
        told = {"sample_size": self.unet.config.sample_size, **{name: getattr(self, name) for name in _PLAIN_SETTINGS}}
        tensors = svd_original.tensors_of(self.unet, self.vae, self.image_encoder)
        exchange.save_file_telling(tensors, Path(file), told)
        return self._untold()

    def _untold(self) -> list[str]:
        """What the original's file does not tell, where it is not as `from_sgm` has it."""
        settings = ["motion_quantiles"] if self.motion.quantiles else []
        settings += ["latent_moments"] if self.moments else []
        epsilon = self.unet.spec.cross_attention_resnet_eps
        if epsilon != TemporalSpec.cross_attention_resnet_eps:
            settings.append(f"cross_attention_resnet_eps {epsilon:g}")
        return settings

    def _twins(self) -> tuple[UNetSpatioTemporalConditionModel, AutoencoderKLTemporalDecoder]:
        """The same models as diffusers' classes, in the same memory."""
        return svd_files.diffusers_unet(self.unet, self.frames), svd_files.diffusers_vae(self.vae)

    @torch.no_grad()
    def _gap(self, unet: UNetSpatioTemporalConditionModel, vae: AutoencoderKLTemporalDecoder, seed: int) -> ExportGap:
        generator = torch.Generator().manual_seed(seed)
        side = 2 ** len(self.unet.config.block_out_channels)
        sample = _normal((1, 2, self.unet.config.in_channels, side, side), generator, self.unet)
        context = _normal((1, 1, self.unet.config.cross_attention_dim), generator, self.unet)
        inputs = (sample, torch.ones(1).to(sample), context, torch.tensor([[6.0, 127.0, 0.02]]).to(sample))
        latent = _normal((1, 2, self.vae.config.latent_channels, 8, 8), generator, self.vae)
        with evaluating(self.unet, self.vae):
            unet_gap = self.unet(*inputs).sample - unet(*inputs).sample
            decoder_gap = self.vae.decode(latent, return_dict=False)[0] - vae.decode(latent[0], num_frames=2).sample
        return ExportGap(float(unet_gap.abs().max()), float(decoder_gap.abs().max()))

    def _write(
        self,
        folder: Path,
        unet: UNetSpatioTemporalConditionModel,
        vae: AutoencoderKLTemporalDecoder,
        gap: ExportGap,
    ) -> None:
        pipeline = StableVideoDiffusionPipeline(
            vae=vae,
            image_encoder=self.image_encoder,
            unet=unet,
            scheduler=self.scheduler(),
            feature_extractor=CLIPImageProcessorPil(image_mean=list(self.image_mean), image_std=list(self.image_std)),
        )
        pipeline.save_pretrained(folder)
        index = folders.read_json(folder / "model_index.json")
        # transformers writes the name of Pillow's own, which older releases do not know
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        settings = {**self._settings(), "export_gap": asdict(gap)}
        (folder / folders.SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        exact = svd_files.exact_vae_tensors(self.vae)
        if exact:
            save_file(exact, folder / folders.TENSORS_FILE)

    def _settings(self) -> dict[str, Any]:
        return {
            "family": FAMILY,
            "unet": folders.plain(self.unet.config),
            "vae": folders.plain(self.vae.config),
            "objective": asdict(self.objective),
            "motion_quantiles": list(self.motion.quantiles),
            "latent_moments": asdict(self.moments) if self.moments else None,
            **{name: getattr(self, name) for name in _PLAIN_SETTINGS},
        }


def assemble(context: Tensor, image_latent: Tensor, fps: Tensor, bucket: Tensor, aug: Tensor) -> Condition:
    """The condition of its parts: an embedding (B, 1, D), a latent (B, C, h, w), and what the model is told (B,) each.

    `fps` in frames per second, of which the model is told one less.
    """
    ids = torch.stack([fps - 1.0, bucket, aug], dim=1)  # (B, 3)
    return Condition(context, image_latent.to(context.dtype), ids.to(context.dtype))


_PLAIN_SETTINGS = ("frames", "decode_chunk", "fps", "height", "width", "sigma_min", "sigma_max")


def inflated(unet: UNet2DConditionModel, vae: AutoencoderKL, spec: TemporalSpec) -> tuple[VideoUNet, VideoVAE]:
    """The networks of an image model as video networks, the UNet taking the image latent, too; logs what was done."""
    video_unet, unet_report = inflate_unet(unet, spec, in_channels=2 * vae.config.latent_channels)
    video_vae, vae_report = inflate_vae(vae)
    log.info("inflated the UNet\n%s\nand the VAE\n%s", unet_report.table(), vae_report.table())
    return video_unet, video_vae


def predictor(unet: nn.Module, condition: Condition, image_only: bool = False) -> Predict:
    """F(c_in x, c_noise) of a video UNet: the image latent joins every frame's channels."""

    def predict(scaled: Tensor, c_noise: Tensor) -> Tensor:
        latent = condition.image_latent.to(scaled)[:, None].expand(-1, scaled.shape[1], -1, -1, -1)  # (B, F, C, h, w)
        inputs = torch.cat([scaled, latent], dim=2)  # (B, F, 2C, h, w)
        marks = inputs.new_ones(inputs.shape[:2], dtype=torch.bool) if image_only else None  # (B, F)
        context = condition.context.to(scaled)  # (B, 1, D)
        output: Tensor = unet(inputs, c_noise, context, added_time_ids=condition.added_ids, image_only=marks).sample
        return output  # (B, F, C, h, w)

    return predict


def euler_scheduler(
    objective: EDM, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> EulerDiscreteScheduler:
    """diffusers' Euler scheduler on Karras' noise levels, whose timesteps are the objective's noise inputs.

    ConfigError where `sigma_max` exceeds what the network can be told of: there the timesteps would repeat.
    """
    if not 0 < sigma_min < sigma_max <= objective.sigma_limit:
        raise ConfigError(
            f"sampling from sigma_max {sigma_max:g} to sigma_min {sigma_min:g}: needs 0 < sigma_min < sigma_max"
            f" <= {objective.sigma_limit:.4f}, the highest level that the network knows"
        )
    discrete = objective.noise_condition == "discrete"
    return EulerDiscreteScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_start=BETA_START,
        beta_end=BETA_END,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_type="discrete" if discrete else "continuous",
        rescale_betas_zero_snr=discrete and objective.zero_terminal_snr,
        timestep_spacing="leading",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=sigma_min,
        sigma_max=sigma_max,
    )


def is_image_model(place: Path) -> bool:
    """Whether a file or a folder holds an image model, which is to be inflated; CheckpointError for an unknown one."""
    if place.suffix == folders.SAFETENSORS:
        return is_single_image_model(place)
    return not temporal_layers.are_in(place) and svd_files.is_image_model(place)


def image_place(path: str | Path) -> Path:
    """The file or the folder of an image model; CheckpointError where it is a video model."""
    place = folders.place_of(path)
    if not is_image_model(place):
        raise CheckpointError(f"{path} is no image model; name a Stable Diffusion as image_model")
    return place


def refuse_prediction(path: str | Path, prediction: Prediction | None) -> None:
    """Raise CheckpointError for what an image model's single file predicts, where `path` is something else."""
    if prediction is not None:
        raise CheckpointError(f"{path} is no image model's single file and says what it predicts: leave prediction out")


def objective_of(scheduler: dict[str, Any], folder: Path) -> EDM:
    """The objective that keeps an image model's noise condition; CheckpointError for a schedule that is not SD's."""
    betas = scheduler.get("beta_start"), scheduler.get("beta_end"), scheduler.get("beta_schedule")
    if betas != (BETA_START, BETA_END, "scaled_linear"):
        raise CheckpointError(
            f"{folder}/scheduler has betas {betas}; only Stable Diffusion's schedule is known: pass an objective"
        )
    if scheduler.get("prediction_type", "epsilon") != "v_prediction":
        log.warning("%s predicts noise, not v: it must be fine-tuned before its samples mean anything", folder)
    return EDM(noise_condition="discrete", zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr", False)))


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: nn.Module) -> Tensor:
    return torch.randn(shape, generator=generator).to(next(like.parameters()))


def _remembered(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """The fields of the family that an export's settings file holds."""
    try:
        objective = EDM(**settings["objective"])
        motion = MotionBuckets(tuple(settings["motion_quantiles"]))
        remembered = {"objective": objective, "motion": motion, "moments": LatentMoments.told(settings)}
        return {**remembered, **{name: settings[name] for name in _PLAIN_SETTINGS}}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not whole: {error}; export the model again") from error
