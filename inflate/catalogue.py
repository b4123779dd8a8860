"""What a file or folder is: its format, its temporal layers, and how much of it is what.

Weights are accounted for tensor by tensor, as loading does, but their values are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusers import MotionAdapter
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME as ENCODER_INDEX_NAME
from transformers.utils import SAFE_WEIGHTS_NAME as ENCODER_WEIGHTS_NAME

from inflate.errors import CheckpointError
from inflate.families import (
    animatediff,
    dynamicrafter,
    i2vgen_xl,
    i2vgen_xl_original,
    i2vgen_xl_refiner,
    modelscope,
    modelscope_keys,
    svd_files,
)
from inflate.families import dynamicrafter_keys as keys
from inflate.families.dynamicrafter_original import Original as DynamiCrafterFile
from inflate.families.svd_original import Original
from inflate.formats import FORMATS
from inflate.models import exchange, folders, image_stream, schedule_buffers, single_file, temporal_layers
from inflate.models.original_video_names import DETAIL, TOKENS, WHOLE
from inflate.models.unet import OF_IMAGE, TemporalSpec, VideoUNet
from inflate.tables import aligned

CLASSES = {
    "UNet2DConditionModel": "stable-diffusion",
    "UNetSpatioTemporalConditionModel": "svd",
    "VideoUNet": "video-unet",
    "UNet3DConditionModel": "unet3d",
    "I2VGenXLUNet": "unet-i2vgen",
    "UNetMotionModel": "unet-motion",
    "MotionAdapter": "motion-adapter",
}
"""Formats of folders by the class that config.json names."""

FAMILIES = (dynamicrafter.FAMILY, i2vgen_xl.FAMILY, i2vgen_xl_refiner.FAMILY)
"""Families whose folders, of a UNet of ours, are formats of that name."""

MARKS = {
    ".pos_encoder.pe": "motion-module",
    keys.IMAGE_PROJ: "dynamicrafter-file",
    ".init_attn.": "videocrafter-file",
    **{f"{mark}.": "i2vgen_xl-file" for mark in (DETAIL, WHOLE, TOKENS)},
    ".temopral_conv.": "vgen",
    ".time_stack.": "svd-file",
    single_file.UNET: "stable-diffusion-file",
}
"""Formats of files by what is in their tensors' names; the first that is found counts."""

WEIGHTS = (folders.SAFETENSORS, ".ckpt", ".pt", ".pth", ".bin")
"""Names of files of weights end so."""
PARTS = ("vae", "image_encoder", "text_encoder", "text_encoder_2")
_PLACES = (
    (re.compile(r"^conv_in\.temporal\."), ("input",)),
    (re.compile(r"\.resnets\.\d+\.temporal\."), ("resnet", "conv", "motion")),
    (re.compile(r"\.temporal\."), ("block", "transformer", "motion")),
)
"""The slots of a temporal specification that may stand in a place of our names."""

Tensors = Mapping[str, Tensor]
Found = tuple[dict[str, str], dict[str, list[Tensor]]]
"""Facts and groups of tensors, as a description has them."""


@dataclass(frozen=True)
class Description:
    """What a file or folder is."""

    format: str
    facts: dict[str, str]
    """what is known of it beside its tensors"""
    groups: dict[str, list[Tensor]]
    """its tensors, without memory, by what they are for"""

    def table(self) -> str:
        """The facts, then a line for each group and one for all."""
        told = {"format": f"{self.format}: {FORMATS[self.format]}", **self.facts}
        facts = aligned([(f"{name}:", value) for name, value in told.items()])
        everything = [tensor for group in self.groups.values() for tensor in group]
        named = {**{name: group for name, group in self.groups.items() if group}, "all": everything}
        lines = aligned(
            [("group", "tensors", "parameters", "MiB", "precision"), *(_line(*each) for each in named.items())]
        )
        return "\n".join([*facts, "", *lines])


def recognise(path: str | Path) -> tuple[str, Path]:
    """The format of a file, a folder or a model on the Hub, and where it lies.

    CheckpointError, saying what was looked for and what is there, where it is none of the formats.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _file_format(place), place
    folder = folders.resolve(path)
    return _folder_format(folder), folder


def describe(path: str | Path) -> Description:
    """What a file, a folder or a model on the Hub is; CheckpointError, listing tensors, where it is not whole."""
    found, place = recognise(path)
    facts, groups = _READERS[found](place)
    return Description(found, facts, groups)


def unet_folder(folder: Path) -> Path:
    """The folder of a pipeline's UNet, or the folder itself where it is a model's."""
    inside = folder / "unet"
    return inside if (inside / "config.json").is_file() else folder


def _file_format(file: Path) -> str:
    if file.suffix not in WEIGHTS:
        raise CheckpointError(f"{file} is no file of weights, whose names end in {', '.join(WEIGHTS)}")
    keys = list(exchange.read_headers(file))
    for mark, found in MARKS.items():
        if any(mark in key for key in keys):
            return found
    if any(".lora_" in key or key.startswith("lora_") for key in keys):
        raise CheckpointError(f"{file} is an adapter, not a model: `inflate adapter show` says of what")
    raise CheckpointError(
        f"{file} is of no known format: no tensor's name has {', '.join(MARKS)}; it holds {exchange.listing(keys)}"
    )


def _folder_format(folder: Path) -> str:
    if temporal_layers.are_in(folder):
        return "temporal-layers"
    if image_stream.is_in(folder):
        return "image-stream"
    if (folder / "state.json").is_file():
        return "checkpoint"
    file = unet_folder(folder) / "config.json"
    if not file.is_file():
        there = exchange.listing(sorted(file.name for file in folder.iterdir())) or "nothing"
        raise CheckpointError(
            f"{folder} is of no known format: it has no unet/config.json, config.json, {folders.TEMPORAL_FILE}, "
            f"{image_stream.FILE} or state.json; it holds {there}"
        )
    name = folders.read_json(file).get("_class_name")
    if name not in CLASSES:
        raise CheckpointError(f"{file} is of class {name}, which is not known; known are {', '.join(CLASSES)}")
    own = folder / folders.SETTINGS_FILE
    family = folders.read_json(own).get("family") if own.is_file() else None
    return str(family) if family in FAMILIES and name == "VideoUNet" else CLASSES[name]


def _stable_diffusion_file(file: Path) -> Found:
    image, tensors = single_file.load_image_model(file, "epsilon", exchange.read_headers), exchange.read_headers(file)
    told = single_file.told_prediction(tensors, image.generation)
    facts = {"model": image.generation, "prediction": told or "v_prediction or epsilon, which the file does not tell"}
    own = {**_by_kind(image.unet.state_dict()), "VAE": list(image.vae.state_dict().values())}
    return {**facts, **_context(image.unet.config)}, {**own, **_others(tensors)}


def _stable_diffusion(folder: Path) -> Found:
    inside = unet_folder(folder)
    config = folders.read_json(inside / "config.json")
    facts = {"model": _generation(config), **_prediction(folder), **_context(config)}
    return facts, {**_by_kind(exchange.read_weights(inside, exchange.read_headers)), **_parts(folder)}


def _svd_file(file: Path) -> Found:
    original = Original.read(file, exchange.read_headers)
    facts, groups = _video_unet(original.load_unet())
    for load in (original.load_vae, *([original.load_image_encoder] if original.image_encoder else [])):
        load()
    parts = {
        "VAE": original.first_stage,
        "VAE's encoder again": original.autoencoder,
        "image encoder": original.image_encoder,
        "idle": original.idle,
    }
    return facts, {**groups, **{name: list(tensors.values()) for name, tensors in parts.items()}}


def _svd(folder: Path) -> Found:
    own = folder / folders.SETTINGS_FILE
    settings = folders.read_json(own) if own.is_file() else {}
    unet = svd_files.load_diffusers_unet(unet_folder(folder), settings.get("unet"), exchange.read_headers)
    facts, groups = _video_unet(unet)
    origin = f"an export of ours ({own.name})" if settings else "diffusers' own"
    return {"written as": origin, **_prediction(folder), **facts}, {**groups, **_parts(folder)}


def _dynamicrafter_file(file: Path) -> Found:
    told, original = DynamiCrafterFile.read(file), DynamiCrafterFile.read(file, exchange.read_headers)
    facts, groups = _video_unet(original.load_unet())
    original.load_vae()
    parts = {"VAE": keys.FIRST_STAGE, "text encoder": keys.TEXT_ENCODER, "image encoder": keys.IMAGE_ENCODER}
    named = {name: keys.part(original.tensors, prefix) for name, prefix in parts.items()}
    schedule = {name: tensor for name, tensor in original.tensors.items() if name in schedule_buffers.NAMES}
    every = {**named, "schedule": schedule, "idle": original.idle}
    about = {"clips": _listed(asdict(told.clips))} if original.has_image else {}
    groups |= {name: list(tensors.values()) for name, tensors in every.items()}
    return {"objective": _listed(asdict(told.objective)), **about, **facts}, groups


def _of_family(folder: Path) -> Found:
    settings = folders.read_json(folder / folders.SETTINGS_FILE)
    facts, groups = _our_unet(folder)
    return {**{name: _listed(settings[name]) for name in ("objective", "clips") if name in settings}, **facts}, groups


def _our_unet(folder: Path) -> Found:
    inside = unet_folder(folder)
    config = folders.read_json(inside / "config.json")
    spec = TemporalSpec.from_dict(config.get("temporal") or {})
    groups = _by_kind(exchange.read_weights(inside, exchange.read_headers), spec)
    return {**_prediction(folder), **_context(config), **_temporal(spec)}, {**groups, **_parts(folder)}


def _temporal_layers(folder: Path) -> Found:
    file = folder / folders.SETTINGS_FILE
    settings, spec = folders.read_json(file), temporal_layers.spec_of(file)
    tensors = exchange.read_headers(folder / folders.TEMPORAL_FILE)
    unet = {name.removeprefix("unet."): value for name, value in tensors.items() if name.startswith("unet.")}
    decoder = [value for name, value in tensors.items() if name.startswith("vae.")]
    facts = {"family": str(settings.get("family")), "over": str(settings.get("image_model")), **_temporal(spec)}
    return facts, {**_by_kind(unet, spec), "temporal: decoder": decoder}


def _unet3d(folder: Path) -> Found:
    facts, groups = _video_unet(modelscope.load_diffusers(unet_folder(folder), exchange.read_headers))
    return {**_prediction(folder), **facts}, {**groups, **_parts(folder)}


def _vgen(file: Path) -> Found:
    unet = modelscope.load_vgen(file, exchange.read_headers)
    facts, groups = _video_unet(unet)
    kinds = "text-to-video or, as no tensor tells, the refinement of I2VGen-XL"
    if modelscope.tells_padding(file, unet):
        kinds = "refinement" if unet.config.downsample_padding == modelscope.REFINEMENT else "text-to-video"
    return {"model": kinds, **facts}, groups


def _i2vgen_xl_file(file: Path) -> Found:
    unet = modelscope.load_vgen(file, exchange.read_headers)
    about = i2vgen_xl_original.trained(unet, exchange.told_by(file), file)
    facts, groups = _video_unet(unet)
    return {name: _listed(asdict(each)) for name, each in about._asdict().items()} | facts, groups


def _unet_i2vgen(folder: Path) -> Found:
    inside = unet_folder(folder)
    unet = modelscope.load_diffusers(inside, exchange.read_headers)
    facts, groups = _video_unet(unet)[0], _by_kind(modelscope_keys.apart(unet.state_dict()), unet.spec)
    detail = "half of VGen's, as far as is known" if modelscope.is_halved(inside) else "as VGen's"
    return {**_prediction(folder), "detail": detail, **facts}, {**groups, **_parts(folder)}


def _unet_motion(folder: Path) -> Found:
    unet = animatediff.load_diffusers(unet_folder(folder), read=exchange.read_headers)
    facts, groups = _video_unet(unet)
    return {**_prediction(folder), **facts}, {**groups, **_parts(folder)}


def _motion_adapter(folder: Path) -> Found:
    spec = animatediff.adapter_spec(exchange.with_defaults(MotionAdapter, folder))
    return _temporal(spec), {"temporal: motion": list(exchange.read_weights(folder, exchange.read_headers).values())}


def _motion_module(file: Path) -> Found:
    tensors = exchange.read_headers(file)
    return _temporal(animatediff.original_spec(tensors, file)), {"temporal: motion": list(tensors.values())}


def _image_stream(folder: Path) -> Found:
    context, tensors = image_stream.context_of(folder), exchange.read_headers(folder / image_stream.FILE)
    return {"image": _listed(context.to_dict())}, {"image": list(tensors.values())}


def _checkpoint(folder: Path) -> Found:
    step = folders.read_json(folder / "state.json").get("step")
    files = sorted(folder.glob(f"*{folders.SAFETENSORS}"))
    return {"step": str(step)}, {file.stem: list(exchange.read_headers(file).values()) for file in files}


_READERS: dict[str, Callable[[Path], Found]] = {
    "stable-diffusion-file": _stable_diffusion_file,
    "stable-diffusion": _stable_diffusion,
    "svd-file": _svd_file,
    "svd": _svd,
    "dynamicrafter-file": _dynamicrafter_file,
    **dict.fromkeys(FAMILIES, _of_family),
    "videocrafter-file": _dynamicrafter_file,
    "video-unet": _our_unet,
    "temporal-layers": _temporal_layers,
    "unet3d": _unet3d,
    "vgen": _vgen,
    "i2vgen_xl-file": _i2vgen_xl_file,
    "unet-i2vgen": _unet_i2vgen,
    "unet-motion": _unet_motion,
    "motion-adapter": _motion_adapter,
    "motion-module": _motion_module,
    "image-stream": _image_stream,
    "checkpoint": _checkpoint,
}


def _video_unet(unet: VideoUNet) -> Found:
    return {**_context(unet.config), **_temporal(unet.spec)}, _by_kind(unet.state_dict(), unet.spec)


def _by_kind(tensors: Tensors, spec: TemporalSpec | None = None) -> dict[str, list[Tensor]]:
    """A UNet's tensors, under our names, by what they are for."""
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        groups.setdefault("2D" if spec is None else _kind(key, spec), []).append(tensor)
    return groups


def _kind(key: str, spec: TemporalSpec) -> str:
    for pattern, slots in _PLACES:
        if pattern.search(key):
            return f"temporal: {next((slot for slot in slots if getattr(spec, slot)), 'unknown')}"
    if OF_IMAGE.search(key):
        return "image"
    return "conditioning" if spec.added_ids and key.startswith("class_embedding.") else "2D"


def _parts(folder: Path) -> dict[str, list[Tensor]]:
    """The tensors of the networks beside a pipeline's UNet."""
    groups = {part: _part(folder / part) for part in PARTS if (folder / part).is_dir()}
    exact = folder / folders.TENSORS_FILE
    return {**groups, "vae, exactly": list(exchange.read_headers(exact).values())} if exact.is_file() else groups


def _part(folder: Path) -> list[Tensor]:
    if (folder / ENCODER_WEIGHTS_NAME).is_file() or (folder / ENCODER_INDEX_NAME).is_file():
        files = exchange.weight_files(folder, ENCODER_INDEX_NAME, ENCODER_WEIGHTS_NAME)
    else:
        names = (SAFETENSORS_WEIGHTS_NAME, folders.HALF_WEIGHTS_NAME, "model.fp16.safetensors")
        files = exchange.weight_files(folder, SAFE_WEIGHTS_INDEX_NAME, *names)
    return [tensor for file in files for tensor in exchange.read_headers(file).values()]


def _others(tensors: Tensors) -> dict[str, list[Tensor]]:
    """What a single file holds beside the UNet and the autoencoder, by the first word of the names."""
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        if not key.startswith((single_file.UNET, single_file.VAE)):
            groups.setdefault(key.split(".")[0], []).append(tensor)
    return groups


def _generation(config: Mapping[str, Any]) -> str:
    if config.get("addition_embed_type") == "text_time":
        return "Stable Diffusion XL"
    return f"Stable Diffusion {2 if config.get('use_linear_projection') else 1}"


def _prediction(folder: Path) -> dict[str, str]:
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return {}
    return {"prediction": folders.read_json(file).get("prediction_type", "epsilon")}


def _context(config: Mapping[str, Any]) -> dict[str, str]:
    image = config.get("image_context") or config.get("hierarchy")
    return {"context width": str(config["cross_attention_dim"]), **({"image": _listed(image)} if image else {})}


def _temporal(spec: TemporalSpec) -> dict[str, str]:
    told = {name: value for name, value in spec.to_dict().items() if exchange.matters(name, spec)}
    return {"temporal layers": _listed(told)}


def _listed(settings: Mapping[str, Any]) -> str:
    """Settings in a line, without those that are not so."""
    told = {name: value for name, value in settings.items() if value is not False and value not in (None, "")}
    return ", ".join(f"{name}={value}" for name, value in told.items())


def _line(name: str, tensors: Iterable[Tensor]) -> tuple[str, ...]:
    group = list(tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in group) / 2**20
    precision = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in group})
    return name, str(len(group)), f"{sum(tensor.numel() for tensor in group):,}", f"{size:.2f}", ", ".join(precision)
