"""DynamiCrafter in the original's single file: which tensors are whose, read and written.

The files of VideoCrafter have the same parts: those of its text-to-video lack the image's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from inflate.errors import CheckpointError
from inflate.families import dynamicrafter_keys as keys
from inflate.families.dynamicrafter import Clips, DynamiCrafter
from inflate.layers.image_context import OtherLengths
from inflate.models import exchange, folders, open_clip, original_names, schedule_buffers, single_file, single_file_text
from inflate.models.image_encoders import CLIP_MEAN, CLIP_STD, encoder_folder, image_statistics, load_image_encoder
from inflate.models.moments import LatentMoments
from inflate.models.original_names import size_of
from inflate.models.original_video_names import FPS, LVDM, layout_of, refuse_what_originals_lack, with_fps
from inflate.models.single_file_writing import differing, vae_tensors
from inflate.models.stable_diffusion import noise_for
from inflate.models.text_encoders import TextEncoders
from inflate.models.unet import MODELSCOPE, VideoUNet
from inflate.objectives import DDPM

log = logging.getLogger(__name__)

HEAD_WIDTH = 64
"""Channels of a head of the published query transformers, which their tensors do not tell."""
Published = Literal["256", "512", "1024", "512_interp"]
_V = DDPM("v_prediction", zero_terminal_snr=True, base_scale=0.7)
PUBLISHED: dict[Published, tuple[DDPM, Clips]] = {
    "256": (DDPM("epsilon"), Clips(height=256, width=256, told="stride", number=3.0)),
    "512": (_V, Clips(height=320, width=512, number=24.0)),
    "1024": (replace(_V, base_scale=0.3), Clips(height=576, width=1024, number=10.0)),
    "512_interp": (_V, Clips(height=320, width=512, number=5.0, interpolation=True)),
}
"""What the published models were trained with, and their clips."""

Tensors = Mapping[str, Tensor]
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Original:
    """The tensors of a file, as precise as saved. The networks made of them are in float32."""

    origin: Path
    tensors: Tensors
    """by the names of today's files, without what nothing uses"""
    idle: Tensors = field(default_factory=dict)
    """what nothing uses"""
    stride: bool = False
    """whether the UNet is told the stride"""
    told: Mapping[str, Any] = field(default_factory=dict)
    """what the header of a file of ours tells"""
    named: Published | None = None
    """which of the published models it is said to be"""

    @classmethod
    def read(cls, file: Path, read: exchange.Read = exchange.read_saved, published: Published | None = None) -> Self:
        """The tensors of a file, which one of the `published` models it is where that is known.

        CheckpointError, listing tensors, where some are of no known part, or where the file tells another model.
        """
        saved = read(file)
        tensors = keys.plain(saved)
        surplus = [key for key in tensors if not key.startswith(keys.PARTS) and key not in schedule_buffers.NAMES]
        if surplus:
            listed = exchange.listing(surplus)
            raise CheckpointError(f"{file} holds tensors of no known part: {listed}; nothing was loaded")
        if any(keys.RELATIVE in key for key in tensors):
            raise CheckpointError(
                f"{file} is VideoCrafter 1, whose temporal layers know relative positions and lack convolutions: they "
                "are not known; VideoCrafter 2 has those of DynamiCrafter"
            )
        stride = any(keys.STRIDE in key or key.endswith(keys.GATE) for key in saved)
        used = {key: tensor for key, tensor in tensors.items() if not key.startswith(keys.IDLE)}
        idle = {key: tensor for key, tensor in tensors.items() if key not in used}
        found = cls(file, used, idle, stride, exchange.told_by(file), published)
        found.refuse_another()
        return found

    @property
    def has_image(self) -> bool:
        """Whether its UNet attends to an image, as that of text-to-video does not."""
        return keys.attends_to_image(self.tensors)

    def load_unet(self) -> VideoUNet:
        """The UNet with its query transformer; CheckpointError, listing tensors, where it is not whole."""
        unet = unet_of(self.tensors, str(self.origin), other_lengths=self.told.get("other_lengths", "interpolate"))
        unet.register_to_config(sample_size=self.told.get("sample_size") or unet.config.sample_size)
        return unet

    def load_vae(self) -> AutoencoderKL:
        """The autoencoder; CheckpointError, listing tensors, where it is not whole."""
        return single_file.load_vae(self.origin, lambda _: dict(self.tensors))

    def load_text(self, tokenizer: str | Path | None) -> TextEncoders:
        """The text encoder with the tokenizer in a folder; CheckpointError where one is missing or not whole.

        A file without one, as shared for ComfyUI, takes that of the same folder, a Stable Diffusion's.
        """
        if any(key.startswith(keys.TEXT_ENCODER) for key in self.tensors):
            return single_file_text.load_text_encoders(self.origin, tokenizer, lambda _: dict(self.tensors))
        folder = None if tokenizer is None else folders.resolve(tokenizer, single_file_text.ENCODER_FILES)
        if folder is None or not (folder / "text_encoder").is_dir():
            raise CheckpointError(
                f"{self.origin} holds no text encoder ({keys.TEXT_ENCODER}*): name a folder that has one beside its "
                "tokenizer, Stable Diffusion 2.1's (stabilityai/stable-diffusion-2-1), as tokenizer"
            )
        return TextEncoders.load(folder)

    def load_image_encoder(self) -> CLIPVisionModelWithProjection:
        """The image encoder; CheckpointError where there is none, or not a whole one of a known width."""
        own = keys.part(self.tensors, keys.IMAGE_ENCODER)
        if not own:
            raise CheckpointError(
                f"{self.origin} holds no image encoder ({keys.IMAGE_ENCODER}*): give its folder as image_encoder"
            )
        return open_clip.load_image_encoder(exchange.in_float32(own), str(self.origin))

    @cached_property
    def objective(self) -> DDPM:
        """What the model was trained with: as a file of ours tells, else as its saved schedule does.

        The log warns where that is odd or missing, and that of the published model is taken.
        """
        saved = self._saved
        if "objective" in self.told:
            return self._of_header(DDPM, "objective")
        if saved is not None:
            return saved
        usual = PUBLISHED[self.published][0] if self.has_image else DDPM("epsilon")
        if self.named is None:
            others = "; --published names another" if self.has_image else ""
            log.warning("%s holds no noise schedule (%s): %s is taken, that of the published model%s", self.origin,
                        schedule_buffers.SIGNAL, usual, others)  # fmt: skip
        return usual

    @cached_property
    def _saved(self) -> DDPM | None:
        """What the saved schedule tells, if there is one; the log warns where it is odd."""
        known = self._of_header(DDPM, "objective") if "objective" in self.told else None
        return schedule_buffers.told(self.tensors, str(self.origin), known)

    @property
    def published(self) -> Published:
        """Which of the published models it is, as far as can be known: that of two images is like the one of 512."""
        if self.named is not None:
            return self.named
        if self.stride:
            return "256"
        return "1024" if self._saved is not None and self._saved.base_scale == 0.3 else "512"

    def refuse_another(self) -> None:
        """CheckpointError where a file tells another model than the one that it is said to be."""
        if self.named is None:
            return
        if "clips" in self.told:
            raise CheckpointError(f"{self.origin} tells what its clips are: leave published={self.named} out")
        saved, (objective, clips) = self._saved, PUBLISHED[self.named]
        if (clips.told == "stride") != self.stride or (saved is not None and saved != objective):
            raise CheckpointError(
                f"{self.origin} is not the published {self.named}: it is told the "
                f"{'stride' if self.stride else 'frame rate'}, and its schedule is {saved or 'not saved'}"
            )

    @property
    def noise(self) -> DDIMScheduler:
        """The noise schedule, as a DDIM sampler's settings: its steps begin where those of the original do."""
        return noise_for(self.objective)

    @property
    def clips(self) -> Clips:
        """What the clips were: as a file of ours tells, else those of the published model of the same schedule."""
        if "clips" in self.told:
            return self._of_header(Clips, "clips")
        clips = PUBLISHED[self.published][1]
        groups = size_of(self.tensors, f"{keys.IMAGE_PROJ}latents", 1) // keys.QUERIES if self.has_image else 1
        return replace(clips, frames=groups) if groups > 1 else clips

    def _of_header(self, kind: Callable[..., Kind], name: str) -> Kind:
        try:
            return kind(**self.told[name])
        except TypeError as error:
            raise CheckpointError(f"{self.origin} has a damaged header: {name}: {error}; write it again") from error

    def load(self, tokenizer: str | Path | None, image_encoder: str | Path | None = None) -> DynamiCrafter:
        """The model, with the image encoder in a folder where one is named; CheckpointError where a part is missing."""
        text, statistics = self.load_text(tokenizer), {}
        if image_encoder is None:
            encoder = self.load_image_encoder()
        else:
            folder = encoder_folder(image_encoder)
            encoder, statistics = load_image_encoder(folder), image_statistics(folder)
        return DynamiCrafter(
            self.load_unet(), self.load_vae(), text, self.noise, self.clips, encoder, **statistics,
            base_scale=self.objective.base_scale, further=dict(self.told.get("further", {})),
            moments=LatentMoments.told(self.told),
        )  # fmt: skip


ORIGINALS_LAYERS = (
    "DynamiCrafter's single file is for models with VideoCrafter's layers, such as those that training began from its "
    "converted checkpoint or DynamiCrafter's; keep the folder of this one, which sampling and training read. The file"
)
"""What is told of it to whoever wants to write another model."""


def write(family: DynamiCrafter, file: Path) -> None:
    """Writes a .safetensors file that `Original.read` and the original's code read whole, atomic.

    What no tensor tells stands in its header. CheckpointError, with nothing written, where a reader would take it for
    another model, naming the settings.
    """
    refuse_what_originals_lack(family.unet, ORIGINALS_LAYERS)
    context = family.unet.image_context
    if context is not None and context.counted is not None:
        raise CheckpointError(
            f"the queries of {context.frames} frames weigh as {context.counted} groups, for which the original's "
            "format has no place: train stage=context with image_context.frames of the clips of stage=adapt"
        )
    tensors = tensors_of(family)
    told = _told(family)
    wrong = _differing(family, Original(file, {key: each.to("meta") for key, each in tensors.items()}, told=told))
    if wrong:
        raise CheckpointError(f"DynamiCrafter's file does not tell: {'; '.join(wrong)}")
    exchange.save_file_telling(tensors, file, told)


def tensors_of(family: DynamiCrafter) -> dict[str, Tensor]:
    """All tensors of the original's file, zeros for those that nothing uses; most share the model's memory."""
    text = single_file_text.open_clip_tensors(family.text.networks[0])
    image = open_clip.image_encoder_tensors(family.image_encoder)
    schedule = schedule_buffers.buffers(family.objective)
    if family.base_scale == 1.0:
        schedule.pop(schedule_buffers.SCALES)
    return {
        **schedule,
        **unet_tensors(family.unet),
        **vae_tensors(family.vae),
        **{f"{keys.TEXT_ENCODER}{key}": tensor for key, tensor in text.items()},
        **{f"{keys.IMAGE_ENCODER}{key}": tensor for key, tensor in image.items()},
        **_unused(text, len(image["proj"][0])),
    }


def _unused(text: Tensors, embedding: int) -> dict[str, Tensor]:
    """The tensors that the original's code asks for and does not use, in place of which there are zeros: the text
    encoder's last block and projection, and its twin beside the image encoder."""
    depth = original_names.count_of(text, r"transformer\.resblocks\.(\d+)\.")
    first = {key: tensor for key, tensor in text.items() if key.startswith("transformer.resblocks.0.")}
    last = {key.replace(".0.", f".{depth}.", 1): tensor for key, tensor in first.items()}
    width = text["ln_final.bias"]
    ends = {"text_projection": width.new_zeros(len(width), embedding), "logit_scale": width.new_zeros(())}
    twin = {key: tensor for key, tensor in text.items() if key not in last and not key.startswith("transformer.")}
    own = {f"{keys.TEXT_ENCODER}{key}": torch.zeros_like(tensor) for key, tensor in {**last, **ends}.items()}
    return own | {f"{keys.TWIN}{key}": torch.zeros_like(tensor) for key, tensor in {**twin, **ends}.items()}


def _told(family: DynamiCrafter) -> dict[str, Any]:
    """What stands in a file's header."""
    context = family.unet.image_context
    return {
        "clips": asdict(family.clips), "objective": asdict(family.objective), "further": family.further,
        "other_lengths": context.other_lengths if context else "interpolate",
        "sample_size": family.unet.config.sample_size,
        "latent_moments": asdict(family.moments) if family.moments else None,
    }  # fmt: skip


def _differing(family: DynamiCrafter, read: Original) -> list[str]:
    """The settings of a model that are others in what is read of its file, with their values."""
    text = family.text
    wrong = [*differing("unet", family.unet.config, read.load_unet().config)]
    wrong += differing("vae", family.vae.config, read.load_vae().config)
    wrong += open_clip.differing(family.image_encoder) + single_file_text.differing(text.networks[0])
    if len(text.networks) > 1 or text.zeros_for_empty:
        wrong.append("a second text encoder, or zeros for the empty prompt")
    statistics = {"image_mean": (family.image_mean, CLIP_MEAN), "image_std": (family.image_std, CLIP_STD)}
    return wrong + [f"{name} {own}" for name, (own, usual) in statistics.items() if own != usual]


def unet_of(
    tensors: Tensors, origin: str, head_width: int = HEAD_WIDTH, other_lengths: OtherLengths = "interpolate"
) -> VideoUNet:
    """The UNet of a file's tensors, in float32, with its query transformer, whose heads are so many channels wide.

    No tensor tells what becomes of clips of `other_lengths`. CheckpointError, listing the tensors, where one is
    missing, left over or of another shape.
    """
    own = {key: tensor for key, tensor in tensors.items() if key.startswith((keys.UNET, keys.IMAGE_PROJ))}
    diffusion = keys.part(own, keys.UNET)
    config, context = LVDM.config(diffusion), keys.image_context(own, head_width)
    told = {"image_context": {**context.to_dict(), "other_lengths": other_lengths}} if context else {}
    layers = with_fps(size_of(diffusion, FPS, 1)) if FPS in diffusion else MODELSCOPE
    unet = exchange.build_unet({**config, **told}, layers)
    wanted = exchange.shapes(unet)
    names = exchange.inverse(keys.unet_names(wanted, layout_of(config)))
    exchange.adopt(unet, exchange.in_float32(exchange.convert(own, names, wanted, origin)))
    return unet


def unet_tensors(unet: VideoUNet) -> dict[str, Tensor]:
    """The tensors of a UNet, which share its memory, as a file has them; it must have LVDM's layers."""
    own = exchange.detached(unet)
    names = keys.unet_names(own, layout_of(unet.config))
    return exchange.convert(own, names, LVDM.shapes(exchange.shapes(unet), names), "this UNet")
