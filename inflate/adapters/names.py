"""The names that the layers of a UNet have in each format of adapters: ours <-> those of other programs.

Ours are the hub, and are the image model's where a layer is the image model's. A format that has no name for a layer
has no place for an adapter of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from inflate.errors import CheckpointError
from inflate.families import animatediff_keys, modelscope_keys, svd_keys
from inflate.formats import ADAPTERS
from inflate.models import original_names
from inflate.models.exchange import Names, listing
from inflate.models.unet import OF_IMAGE, TemporalSpec, VideoUNet

CLASSES: dict[str, tuple[Callable[[Iterable[str]], Names], tuple[str, ...]]] = {
    "svd": (svd_keys.unet_to_diffusers, ("resnet", "block")),
    "unet3d": (modelscope_keys.unet_to_diffusers, ("conv", "transformer", "input")),
    "unet-motion": (animatediff_keys.to_diffusers, ("motion",)),
}
"""Classes of diffusers: their names for ours, and the temporal slots that they have."""
WEIGHT = ".weight"


@dataclass(frozen=True)
class Network:
    """The layers of a UNet that an adapter can be about, and what their names depend on."""

    shapes: Mapping[str, torch.Size]
    """of each layer's weight, by our name of the layer"""
    config: Mapping[str, Any]
    spec: TemporalSpec | None
    """None for an image model"""

    @classmethod
    def of(cls, unet: UNet2DConditionModel) -> Network:
        """The layers of a UNet of ours or of an image model, whose memory is not read."""
        weights = {key: value.shape for key, value in unet.state_dict().items() if key.endswith(WEIGHT)}
        shapes = {key.removesuffix(WEIGHT): shape for key, shape in weights.items() if len(shape) > 1}
        return cls(shapes, dict(unet.config), unet.spec if isinstance(unet, VideoUNet) else None)

    def has(self, *slots: str) -> bool:
        """Whether its temporal layers are those of these slots."""
        return self.spec is not None and all(getattr(self.spec, slot) for slot in slots)

    @property
    def is_xl(self) -> bool:
        """Whether the image model is a Stable Diffusion XL."""
        return self.config.get("addition_embed_type") == "text_time"


def names(format: str, network: Network) -> Names:
    """What a format calls the layers, by our names, without those it has no name for; CheckpointError for none."""
    found = _NAMES[format](network)
    if not found:
        raise CheckpointError(f"{format} is for other temporal layers than this UNet has: {ADAPTERS[format]}")
    return found


def named(format: str, network: Network, layers: Iterable[str]) -> Names:
    """The names of these layers in a format; CheckpointError, listing them, where it has no name for one."""
    found = names(format, network)
    nameless = [layer for layer in layers if layer not in found]
    if nameless:
        raise CheckpointError(f"{format} has no place for {len(nameless)} layers: {listing(nameless)}")
    return {layer: found[layer] for layer in layers}


def recognise(layers: Iterable[str], network: Network) -> tuple[str, Names]:
    """The format whose names these are, and ours by them.

    CheckpointError, listing those of the nearest format, where a name is no layer of the network.
    """
    wanted, best, fewest = list(layers), "", None
    for format, alternatives in _READ.items():
        found = {theirs: ours for name in alternatives for ours, theirs in name(network).items()}
        unknown = [layer for layer in wanted if layer not in found]
        if not unknown:
            return format, {layer: found[layer] for layer in wanted}
        if fewest is None or len(unknown) < len(fewest):
            best, fewest = format, unknown
    raise CheckpointError(
        f"no format has these layers in this UNet; {best} comes nearest and lacks {listing(fewest or [])}; name the "
        "model that the adapter was made for as --model"
    )


def flat(name: str) -> str:
    """A name of a layer as kohya's files have it."""
    return name.replace(".", "_")


def _own(network: Network) -> Names:
    return {layer: layer for layer in network.shapes}


def _class(format: str) -> Callable[[Network], Names]:
    rename, slots = CLASSES[format]
    return lambda network: _layers(_without_image(network), rename) if network.has(*slots) else {}


def _without_image(network: Network) -> list[str]:
    """The layers but those of an image in cross-attention, which no other format has names for."""
    return [layer for layer in network.shapes if not OF_IMAGE.search(layer)]


def _layers(layers: Iterable[str], rename: Callable[[Iterable[str]], Names]) -> Names:
    """A map of tensors' names as one of layers' names."""
    renamed = rename(layer + WEIGHT for layer in layers)
    return {key.removesuffix(WEIGHT): name.removesuffix(WEIGHT) for key, name in renamed.items()}


def _original(network: Network) -> Names:
    """The names of latent diffusion's own code, and for temporal layers of Stable Video Diffusion's."""
    layout = original_names.UNetLayout.of(network.config)
    spatial = [layer for layer in network.shapes if not _is_created(layer)]
    found = _layers(spatial, lambda keys: original_names.unet_names(keys, layout))
    if network.has("resnet", "block") and not network.is_xl:
        created = [layer for layer in _without_image(network) if _is_created(layer)]
        found |= _layers(created, lambda keys: svd_keys.unet_to_sgm(keys, layout))
    return found


def _kohya(network: Network) -> Names:
    """An image model's layers as kohya's scripts have them, flat; others flat by the original names, as ComfyUI does.

    Those scripts train Stable Diffusion 1 and 2 under diffusers' names and XL under the original ones.
    """
    original = _original(network)
    return {layer: flat(name if network.is_xl or _is_created(layer) else layer) for layer, name in original.items()}


def _flat(named: Callable[[Network], Names]) -> Callable[[Network], Names]:
    return lambda network: {layer: flat(name) for layer, name in named(network).items()}


def _processors(network: Network) -> Names:
    """What diffusers could load before it used PEFT: layers of image models, and of motion modules."""
    if network.has("motion"):
        return _class("unet-motion")(network)
    return {layer: layer for layer in network.shapes if not _is_created(layer)}


def _motion_original(network: Network) -> Names:
    """The names of motion modules in AnimateDiff's own files."""
    if not network.has("motion"):
        return {}
    return _layers((layer for layer in network.shapes if _is_created(layer)), animatediff_keys.to_original)


def _is_created(layer: str) -> bool:
    """Whether inflation made a layer."""
    temporal = ".temporal." in layer or layer.endswith(".temporal")
    return temporal or layer.startswith("class_embedding.") or OF_IMAGE.search(layer) is not None


_NAMES: dict[str, Callable[[Network], Names]] = {
    "inflate": _own,
    **{format: _class(format) for format in CLASSES},
    "comfyui": _original,
    "kohya": _kohya,
    "attention-processors": _processors,
}
_READ: dict[str, tuple[Callable[[Network], Names], ...]] = {
    "inflate": (_own,),
    **{format: (_class(format),) for format in CLASSES},
    "comfyui": (_original,),
    "kohya": (_kohya, _flat(_own), _flat(_original), *(_flat(_class(format)) for format in CLASSES)),
    "attention-processors": (_processors, _motion_original),
}
"""Whose names are looked for in a file, in this order; kohya's files are found under several."""
