"""From one format of a model to another, through our own: bit for bit, in float32, or refused.

Temporal layers alone are in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel

from inflate.catalogue import recognise, unet_folder
from inflate.errors import CheckpointError, ConfigError
from inflate.families import (
    animatediff,
    dynamicrafter_original,
    i2vgen_xl_original,
    i2vgen_xl_pipeline,
    modelscope,
    svd,
    video_ldm,
)
from inflate.families.dynamicrafter import DynamiCrafter
from inflate.families.dynamicrafter_original import Original as DynamiCrafterFile
from inflate.families.i2vgen_xl import I2VGenXL
from inflate.families.i2vgen_xl_original import Beside, Trained, TrainedRefiner
from inflate.families.i2vgen_xl_refiner import Refiner
from inflate.families.svd import SVD
from inflate.families.svd_original import Original
from inflate.families.video_ldm import VideoLDM
from inflate.files import new_folder
from inflate.formats import FILES, WRITTEN
from inflate.layers.branches import NormOver
from inflate.models import exchange, folders
from inflate.models.exchange import listing, read_headers
from inflate.models.single_file import Prediction, load_image_model
from inflate.models.single_file_writing import save_image_model
from inflate.models.stable_diffusion import load_noise
from inflate.models.unet import VideoUNet

USUAL = {
    "stable-diffusion-file": "stable-diffusion",
    "stable-diffusion": "stable-diffusion-file",
    "svd-file": "svd",
    "svd": "svd-file",
    "dynamicrafter-file": "dynamicrafter",
    "dynamicrafter": "dynamicrafter-file",
    "videocrafter-file": "video-unet",
    "unet3d": "vgen",
    "vgen": "unet3d",
    "i2vgen_xl-file": "i2vgen_xl",
    "i2vgen_xl": "i2vgen_xl-file",
    "i2vgen_xl_refiner": "vgen",
    "unet-i2vgen": "i2vgen_xl",
    "unet-motion": "motion-adapter",
    "motion-adapter": "unet-motion",
}
"""What a format becomes where no other is asked for."""
READ_ONLY = {
    "videocrafter-file": "a text-to-video of ours has other layers, or is written as video-unet",
    "image-stream": "only stage=context of a run writes it",
    "checkpoint": "only a run writes its checkpoints",
}
"""Formats that are known and not written, and why."""


@dataclass(frozen=True)
class Extra:
    """What some formats do not hold, and others of them cannot be made without."""

    image_model: str | None = None
    """folder or single file of the Stable Diffusion that motion modules or temporal layers alone belong over, or whose
    autoencoder and text encoder a UNet's file goes with"""
    image_encoder: str | None = None
    """folder of the CLIP image encoder, where the original's file of Stable Video Diffusion or DynamiCrafter, or the
    image model of temporal layers alone, holds none; of I2VGen-XL, which never does, also OpenCLIP's file"""
    tokenizer: str | None = None
    """folder of the tokenizer, which no single file holds: of DynamiCrafter, VideoCrafter, or the image model of
    temporal layers or of a UNet alone"""
    prediction: Prediction | None = None
    """what a Stable Diffusion 2 in a single file predicts"""
    frames: int | None = None
    """clip length of the original's file of Stable Video Diffusion, where that does not tell it"""
    norm_per_frame: bool = False
    """whether diffusers' motion modules were trained with group norms per frame: those converted from AnimateDiff's own
    were, although diffusers runs them with norms over the clip"""
    published: dynamicrafter_original.Published | None = None
    """which published DynamiCrafter the original's file is, where it does not tell: 512_interp is like 512, and without
    a noise schedule 1024 is, too"""
    double_detail: bool = False
    """whether an I2VGenXLUNet has the first frame's detail at half strength, as published, which is to be mended"""

    @property
    def beside(self) -> Beside:
        """Where the networks beside a UNet's file are."""
        return Beside(self.image_model, self.tokenizer, self.image_encoder)

    @property
    def norm_over(self) -> NormOver:
        """What the group norms of diffusers' motion modules averaged over in training."""
        return "frame" if self.norm_per_frame else "clip"


VIDEOCRAFTER_FPS = 28.0
"""Frames per second that VideoCrafter 2 is told by its authors' script."""
TEMPORAL = "temporal-layers"
EXPORTS: dict[str, Callable[[Path, Extra], SVD | VideoLDM]] = {
    "svd": lambda folder, extra: SVD.load(
        folder, extra.image_encoder, prediction=extra.prediction, image_model=extra.image_model
    ),
    "video-unet": lambda folder, extra: VideoLDM.load(folder, extra.image_model, extra.tokenizer, extra.prediction),
}
"""Formats whose models can leave their image model out, and how they are read, also from their temporal layers."""
_ALONE = {name: f"{TEMPORAL} of {name}" for name in EXPORTS}
_EXPORTED = {name: f"{name} to {TEMPORAL}" for name in EXPORTS}
_BASE, _REFINER = "i2vgen_xl-file to i2vgen_xl", "vgen to i2vgen_xl_refiner"
_OF_USE = {
    "image_model": ("motion-adapter", "motion-module", _BASE, _REFINER, *_ALONE.values(), *_EXPORTED.values()),
    "image_encoder": ("svd-file", "dynamicrafter-file", _BASE, _ALONE["svd"], _EXPORTED["svd"]),
    "tokenizer": (
        "dynamicrafter-file", "videocrafter-file", _BASE, _REFINER, _ALONE["video-unet"], _EXPORTED["video-unet"]
    ),
    "prediction": ("stable-diffusion-file", *_ALONE.values(), *_EXPORTED.values()),
    "frames": ("svd-file",),
    "norm_per_frame": ("motion-adapter", "unet-motion"),
    "published": ("dynamicrafter-file",),
    "double_detail": ("unet-i2vgen",),
}  # fmt: skip
"""The formats that are read with an extra, or what becomes what with it."""


def convert(path: str, target: Path, to: str | None = None, extra: Extra | None = None, overwrite: bool = False) -> str:
    """Writes the model in `path` to `target` in the format `to`, whole or not at all; returns what to know of it.

    CheckpointError, with nothing written, where that format cannot represent the model, the model is not whole, or
    `target` exists and is not to be replaced, or is no model. ConfigError for an unknown format and for an extra that
    the source has no use for.
    """
    source, place = recognise(path)
    usual = _export_of(place) if source == TEMPORAL else USUAL.get(source)
    wanted, given = _wanted(source, to or usual, path), extra or Extra()
    _refuse_useless(_ALONE[_export_of(place)] if source == TEMPORAL else source, wanted, given)
    _check_name(source, target, wanted)
    _check_target(place, target, wanted, overwrite)
    with _writing(target):
        if wanted == TEMPORAL:
            return _temporal_layers(source, place, target, given)
        if source == TEMPORAL and wanted in ("svd", usual):
            return _saved(EXPORTS[wanted](place, given), target)
        if (source, wanted) in PIPELINES:
            return PIPELINES[source, wanted](place, target, given)
        if source == "unet3d" and wanted == "video-unet" and (place / "text_encoder").is_dir():
            return _saved(_modelscope(place), target)
        unet = READERS[source](place, given)
        WRITERS[wanted](unet, target)
    return f"{target} is {wanted}{_of_unet(source, place, unet)}"


def _of_unet(source: str, place: Path, unet: VideoUNet) -> str:
    """What to know of a UNet that was converted alone."""
    if source == TEMPORAL:
        return ", the UNet alone: its other networks are the image model's"
    if source in ("i2vgen_xl", "i2vgen_xl_refiner"):
        return ", the UNet alone"
    if source == "vgen" and not modelscope.tells_padding(place, unet):
        return (
            f"; {place} was taken for text-to-video, whose tensors VGen's sr600 and ModelScope's Video-to-Video share: "
            "where it is one of these, convert it --to i2vgen_xl_refiner"
        )
    return ""


def _export_of(folder: Path) -> str:
    """The format of the whole export that temporal layers alone are of."""
    family = folders.read_json(folder / folders.SETTINGS_FILE).get("family")
    return "svd" if family == svd.FAMILY else "video-unet"


def _wanted(source: str, wanted: str | None, path: str) -> str:
    """The format to write; ConfigError where it is unknown or not told, CheckpointError where it cannot be made."""
    if wanted is None:
        told = f"say with --to which format it is to be: {', '.join(_becomes(source)) or 'none is made of it'}"
        raise ConfigError(f"{path} is {source}: {told}")
    if wanted in READ_ONLY:
        raise CheckpointError(f"--to {wanted}: is read, not written: {READ_ONLY[wanted]}")
    if wanted not in WRITTEN:
        raise ConfigError(f"--to {wanted}: is no format that is written; known are {', '.join(WRITTEN)}")
    targets = _becomes(source)
    if wanted not in targets:
        others = ", ".join(targets) or "none"
        raise CheckpointError(f"{path} is {source}, of which no {wanted} is made; what it can become: {others}")
    return wanted


def _becomes(source: str) -> list[str]:
    """The formats that one can become."""
    targets = [wanted for whole, wanted in PIPELINES if whole == source]
    targets += list(WRITERS) if source in READERS else []
    targets += [TEMPORAL] if source in EXPORTS else ["svd"] if source == TEMPORAL else []
    return [name for name in dict.fromkeys(targets) if name != source]


def _refuse_useless(source: str, wanted: str, extra: Extra) -> None:
    both = f"{source} to {wanted}"
    partly = any(use.startswith(f"{source} to ") for uses in _OF_USE.values() for use in uses)
    for name, uses in _OF_USE.items():
        if getattr(extra, name) and not {source, both} & {*uses}:
            told, about = f"--{name.replace('_', '-')} is for {' and '.join(uses)}", both if partly else source
            raise ConfigError(f"{told}, not for {about}: leave it out")


def _check_name(source: str, target: Path, wanted: str) -> None:
    if wanted in FILES and target.suffix != folders.SAFETENSORS:
        others = ", ".join(name for name in _becomes(source) if name not in FILES)
        told = f", or say with --to which folder it is to be: {others}" if others else ""
        raise CheckpointError(f"{target}: {wanted} is a file; give it a name that ends in {folders.SAFETENSORS}{told}")


def _check_target(place: Path, target: Path, wanted: str, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists already; choose another name or add --overwrite")
    if target.resolve() in (place.resolve(), *place.resolve().parents):
        raise CheckpointError(f"{target} is or holds the model that is to be converted; choose another name")
    empty = target.is_dir() and not any(target.iterdir())
    if target.is_dir() == (wanted in FILES) or (target.is_dir() and not empty and recognise(target)[0] != wanted):
        raise CheckpointError(f"{target} is no {wanted} that could be replaced; choose another name")


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def _image_model(file: Path, target: Path, extra: Extra) -> str:
    image = load_image_model(file, extra.prediction)
    with new_folder(target) as aside:
        for name, part in {"unet": image.unet, "vae": image.vae, "scheduler": image.noise}.items():
            part.save_pretrained(aside / name)
    return f"{target} is a {image.generation} that predicts {image.scheduler['prediction_type']}, without text encoders"


def _image_file(folder: Path, target: Path, _: Extra) -> str:
    unet = folders.load_parent(UNet2DConditionModel, folder / "unet")
    vae = folders.load_parent(AutoencoderKL, folder / "vae")
    scheduler = folders.read_json(folder / "scheduler" / "scheduler_config.json")
    return f"{target} is a {save_image_model(unet, vae, scheduler, target)}, without text encoders"


def _svd(file: Path, target: Path, extra: Extra) -> str:
    told = _saved(SVD.from_sgm(file, extra.image_encoder, extra.frames), target)
    idle = list(Original.read(file, read_headers).idle)
    return f"{told}; left out, as nothing uses them: {listing(idle)}" if idle else told


def _saved(family: SVD | VideoLDM, target: Path) -> str:
    """Writes a whole export."""
    gap = family.save_pretrained(target)
    if gap is None:
        return f"{target} is a whole export of text-to-video, which `inflate generate` draws with"
    return f"{target}: what diffusers computes otherwise: UNet {gap.unet:.1e}, decoder {gap.decoder:.1e}"


def _svd_file(folder: Path, target: Path, _: Extra) -> str:
    untold = SVD.from_pretrained(folder).save_sgm(target)
    told = f"{target} is svd-file, without what lies idle in published ones: parts of a text encoder, an image decoder"
    return f"{told}; it does not tell: {', '.join(untold)}" if untold else told


def _dynamicrafter(file: Path, target: Path, extra: Extra) -> str:
    original = DynamiCrafterFile.read(file, published=extra.published)
    family = original.load(extra.tokenizer, extra.image_encoder)
    family.save_pretrained(target)
    told = f"{target} is dynamicrafter, trained with {original.objective}"
    if "clips" not in original.told:
        told += f", its clips those of the published {original.published} (--published names another)"
    return f"{told}; left out, as nothing uses them: {listing(list(original.idle))}" if original.idle else told


def _dynamicrafter_file(folder: Path, target: Path, _: Extra) -> str:
    dynamicrafter_original.write(DynamiCrafter.load(folder), target)
    return f"{target} is dynamicrafter-file; zeros are where the original's code asks for what it does not use"


def _videocrafter(file: Path, target: Path, extra: Extra) -> str:
    original = DynamiCrafterFile.read(file)
    text, about = original.load_text(extra.tokenizer), original.clips
    unet = original.load_unet()
    told = VIDEOCRAFTER_FPS if unet.spec.added_ids else None
    clips = video_ldm.Clips(about.frames, about.fps, about.height, about.width, number=told)
    own = unet, original.load_vae(), text, original.noise, clips
    return _saved(VideoLDM(*own, base_scale=original.objective.base_scale), target)


def _modelscope(folder: Path) -> VideoLDM:
    """The text-to-video model of a whole pipeline."""
    encoders, noise = video_ldm.Encoders.load(folder), load_noise(folder / "scheduler")
    unet = modelscope.load_diffusers(folder / "unet")
    return VideoLDM(unet, encoders.vae, encoders.text, noise, video_ldm.Clips())


def _i2vgen_xl(file: Path, target: Path, extra: Extra) -> str:
    """A whole model of a UNet's file."""
    unet, told = modelscope.load_vgen(file), exchange.told_by(file)
    about = i2vgen_xl_original.trained(unet, told, file)
    i2vgen_xl_original.base(unet, about, extra.beside).save_pretrained(target)
    return _trained(target, "i2vgen_xl", told, about)


def _trained(target: Path, family: str, told: Mapping[str, object], about: Trained | TrainedRefiner) -> str:
    """What became of a UNet's file that tells what it was trained with, or is taken for the published one."""
    published = "" if "clips" in told else ", as published,"
    return f"{target} is {family}{published} with {about.objective} and {about.clips}"


def _i2vgen_xl_file(folder: Path, target: Path, _: Extra) -> str:
    family = I2VGenXL.load(folder)
    modelscope.save_vgen(family.unet, target, i2vgen_xl_original.told_of(family))
    return f"{target} is i2vgen_xl-file, the UNet alone, as VGen has it; its header tells the noise schedule and clips"


def _i2vgen_xl_of_diffusers(folder: Path, target: Path, extra: Extra) -> str:
    folders.refuse_network(folder)
    family = i2vgen_xl_pipeline.load(folder, _i2vgen_unet(folder, extra))
    family.save_pretrained(target)
    padding = i2vgen_xl_pipeline.padding_of(folder)
    odd = "" if padding is None else f"; its tokenizer pads with token {padding}, where VGen's pads with 0"
    return f"{target} is i2vgen_xl, with {family.objective} and {family.clips}{odd}"


def _i2vgen_xl_to_diffusers(folder: Path, target: Path, _: Extra) -> str:
    family = I2VGenXL.load(folder)
    i2vgen_xl_pipeline.save(family, modelscope.to_i2vgen(family.unet), target)
    skipping = "where diffusers cannot leave it out, as beside transformers from 5.6 on, clip_skip=None draws the same"
    return (
        f"{target} is the folder of an I2VGenXLPipeline, whose text encoder ends in a layer that changes nothing: "
        f"{skipping}"
    )


def _i2vgen_xl_refiner(file: Path, target: Path, extra: Extra) -> str:
    told = exchange.told_by(file)
    unet = modelscope.load_vgen(file, refinement="clips" not in told)
    about = i2vgen_xl_original.trained_refiner(told, file)
    i2vgen_xl_original.refiner(unet, about, extra.beside).save_pretrained(target)
    return _trained(target, "i2vgen_xl_refiner", told, about)


def _i2vgen_xl_refiner_file(folder: Path, target: Path, _: Extra) -> str:
    family = Refiner.load(folder)
    modelscope.save_vgen(family.unet, target, i2vgen_xl_original.told_of(family))
    return f"{target} is vgen, the UNet alone; its header tells the noise schedule and clips"


PIPELINES: dict[tuple[str, str], Callable[[Path, Path, Extra], str]] = {
    ("stable-diffusion-file", "stable-diffusion"): _image_model,
    ("stable-diffusion", "stable-diffusion-file"): _image_file,
    ("svd-file", "svd"): _svd,
    ("svd", "svd-file"): _svd_file,
    ("dynamicrafter-file", "dynamicrafter"): _dynamicrafter,
    ("dynamicrafter", "dynamicrafter-file"): _dynamicrafter_file,
    ("videocrafter-file", "video-unet"): _videocrafter,
    ("i2vgen_xl-file", "i2vgen_xl"): _i2vgen_xl,
    ("i2vgen_xl", "i2vgen_xl-file"): _i2vgen_xl_file,
    ("unet-i2vgen", "i2vgen_xl"): _i2vgen_xl_of_diffusers,
    ("i2vgen_xl", "unet-i2vgen"): _i2vgen_xl_to_diffusers,
    ("vgen", "i2vgen_xl_refiner"): _i2vgen_xl_refiner,
    ("i2vgen_xl_refiner", "vgen"): _i2vgen_xl_refiner_file,
}
"""How a model of several networks goes from one format into another; returns what to know of it."""


def _temporal_layers(source: str, folder: Path, target: Path, extra: Extra) -> str:
    """What an export has beyond the image model that it was trained over."""
    if extra.image_model is None:
        raise ConfigError(f"--to {TEMPORAL}: name the image model that they were trained over as --image-model")
    family, beside = EXPORTS[source](folder, Extra()), extra.image_encoder or extra.tokenizer
    family.save_temporal(target, extra.image_model, beside, extra.prediction)
    return f"{target} goes over {extra.image_model}, in half precision"


def _parent(path: str | None) -> UNet2DConditionModel:
    """The UNet that motion modules alone belong over."""
    if path is None:
        raise ConfigError("motion modules alone are read over an image model: name its folder or file as --image-model")
    if path.endswith(folders.SAFETENSORS):
        return load_image_model(Path(path).expanduser(), "epsilon").unet
    unet: UNet2DConditionModel = folders.load_parent(UNet2DConditionModel, unet_folder(folders.resolve(path)))
    return unet


def _our_unet(folder: Path, _: Extra) -> VideoUNet:
    unet: VideoUNet = VideoUNet.from_pretrained(unet_folder(folder), torch_dtype=torch.float32)
    return unet


def _i2vgen_unet(folder: Path, extra: Extra) -> VideoUNet:
    return modelscope.load_diffusers(unet_folder(folder), double_detail=extra.double_detail)


READERS: dict[str, Callable[[Path, Extra], VideoUNet]] = {
    "video-unet": _our_unet,
    "i2vgen_xl": _our_unet,
    "i2vgen_xl_refiner": _our_unet,
    "i2vgen_xl-file": lambda file, _: modelscope.load_vgen(file),
    "unet-i2vgen": _i2vgen_unet,
    TEMPORAL: lambda folder, extra: EXPORTS[_export_of(folder)](folder, extra).unet,
    "unet3d": lambda folder, _: modelscope.load_diffusers(unet_folder(folder)),
    "vgen": lambda file, _: modelscope.load_vgen(file),
    "unet-motion": lambda folder, extra: animatediff.load_diffusers(unet_folder(folder), extra.norm_over),
    "motion-adapter": lambda folder, extra: animatediff.load_adapter(
        _parent(extra.image_model), folder, extra.norm_over
    ),
    "motion-module": lambda file, extra: animatediff.load_original(_parent(extra.image_model), file),
}
"""How the video UNet of a format is read; Stable Video Diffusion's has parts of its own."""


def _write_folder(model: VideoUNet, target: Path, as_written: Callable[[VideoUNet], ModelMixin]) -> None:
    written = as_written(model)
    with new_folder(target) as aside:
        written.save_pretrained(aside)


def _told(unet: VideoUNet, first_frames: bool) -> VideoUNet:
    """The same UNet; CheckpointError where it is told first frames and is not to be, or the reverse."""
    if (unet.hierarchy is not None) != first_frames:
        told, other = ("no first frames", "vgen") if first_frames else ("first frames", "i2vgen_xl-file")
        raise CheckpointError(f"this UNet is told {told}: its format of VGen's names is {other}")
    return unet


WRITERS: dict[str, Callable[[VideoUNet, Path], None]] = {
    "video-unet": lambda unet, target: _write_folder(unet, target, lambda same: same),
    "unet3d": lambda unet, target: _write_folder(unet, target, modelscope.to_diffusers),
    "vgen": lambda unet, target: modelscope.save_vgen(_told(unet, False), target),
    "i2vgen_xl-file": lambda unet, target: modelscope.save_vgen(_told(unet, True), target),
    "unet-i2vgen": lambda unet, target: _write_folder(unet, target, modelscope.to_i2vgen),
    "unet-motion": lambda unet, target: _write_folder(unet, target, animatediff.to_diffusers),
    "motion-adapter": animatediff.save_adapter,
    "motion-module": animatediff.save_original,
}
"""How a video UNet is written in a format; each refuses what it has no place for."""
