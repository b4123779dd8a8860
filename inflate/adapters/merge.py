"""Adapters merged into the weights of a UNet, and taken out of them again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from inflate.adapters import attach, bases, file, verify
from inflate.adapters.file import Adapter
from inflate.adapters.settings import Weighted
from inflate.errors import CheckpointError
from inflate.models.unet import VideoUNet

Change = dict[str, Tensor]
"""What is added to the weights of a UNet, or what they were before, by parameter."""
TOLERANCE = 1e-4
"""Largest difference between the output of merged weights and of the adapter beside them."""


def merge_files(unet: VideoUNet, wanted: Sequence[Weighted], any_base: bool = False) -> None:
    """Merge adapters from files, each in its weight, into a UNet; of whatever kinds, the order does not matter.

    CheckpointError, with the UNet as it was, where a file cannot be read, does not fit, or was made on another model
    and `any_base` is not set.
    """
    _add(unet, changes(unet, wanted, any_base))


def merge_keeping(unet: VideoUNet, wanted: Sequence[Weighted], any_base: bool = False) -> Change:
    """Merge as `merge_files` does; the weights that are changed, as they were."""
    added = changes(unet, wanted, any_base)
    held = _changed(unet, added)
    _add(unet, added)
    return held


@contextmanager
def merged(unet: VideoUNet, wanted: Sequence[Weighted], any_base: bool = False) -> Iterator[None]:
    """A UNet with adapters merged meanwhile; its weights are then, to the bit, what they were. Errors as above."""
    added = changes(unet, wanted, any_base)
    held = _changed(unet, added)
    try:
        _add(unet, added)
        yield
    finally:
        _put_back(unet, held)


@contextmanager
def exchanged(unet: VideoUNet, weights: Change) -> Iterator[None]:
    """A UNet with these weights in place of its own meanwhile, which are then, to the bit, what they were."""
    held = _copies(unet, weights)
    try:
        _put_back(unet, weights)
        yield
    finally:
        _put_back(unet, held)


def changes(unet: VideoUNet, wanted: Sequence[Weighted], any_base: bool = False) -> list[tuple[float, Change]]:
    """The weight of each adapter and what it adds to a UNet, which is left as it was; CheckpointError as above."""
    read = [(one, file.read(one.path)) for one in wanted]
    for one, adapter in read:
        if not any_base:
            bases.refuse_another(unet, adapter, one.path)
    return [(one.weight, change(unet, adapter, one.path)) for one, adapter in read]


def change(unet: VideoUNet, adapter: Adapter, origin: object = "the adapter") -> Change:
    """What an adapter adds to the weights of a UNet, by parameter; the UNet is left as it was.

    CheckpointError where the two do not fit.
    """
    attach.load(unet, adapter, origin)
    try:
        return {f"{name}.weight": _change(layer) for name, layer in attach.layers(unet)}
    finally:
        attach.detach(unet)


def unmerge(unet: VideoUNet, adapter: Adapter, weight: float = 1.0, origin: object = "the adapter") -> float:
    """Take a merged adapter out of the weights of a UNet; how far the result with it beside is from what it was.

    That is compared with the output that the file keeps of the trained model, so that nothing is taken out that was
    not merged: CheckpointError, with the UNet as it was, above TOLERANCE, or a tenth of the adapter's effect where that
    is less. Rounding leaves the last bit open, and the
    result is another base by its hash. The directions of a DoRA's weights hide their lengths: it cannot be taken out.
    """
    if adapter.kind == "dora":
        raise CheckpointError(f"{origin} is a DoRA, which replaces the lengths of weights: load its base again instead")
    tensors = change(unet, adapter, origin)
    held = _copies(unet, tensors)
    _add(unet, [(-weight, tensors)])
    difference = verify.difference(unet, adapter, origin)
    effect = (adapter.about.get("verified") or {"effect": math.inf})["effect"]
    if not difference <= min(TOLERANCE, effect / 10):
        _put_back(unet, held)
        raise CheckpointError(
            f"this model does not hold {origin} merged in weight {weight:g}: without it, the adapter beside it is "
            f"{difference:.1e} from what was trained; name the model and the weight of its merging"
        )
    return difference


@torch.no_grad()
def _add(unet: VideoUNet, added: Iterable[tuple[float, Change]]) -> None:
    for weight, tensors in added:
        for name, tensor in tensors.items():
            unet.get_parameter(name).add_(tensor, alpha=weight)


def _changed(unet: VideoUNet, added: Sequence[tuple[float, Change]]) -> Change:
    """The weights that adapters are about to change, as they are."""
    return _copies(unet, {name for _, tensors in added for name in tensors})


def _copies(unet: VideoUNet, names: Iterable[str]) -> Change:
    return {name: unet.get_parameter(name).detach().clone() for name in names}


@torch.no_grad()
def _put_back(unet: VideoUNet, held: Change) -> None:
    for name, tensor in held.items():
        unet.get_parameter(name).copy_(tensor)


@torch.no_grad()
def _change(layer: BaseTunerLayer) -> Tensor:
    """What merging adds to the weight of a layer."""
    weight: nn.Parameter = layer.get_base_layer().weight
    before = weight.detach().clone()
    layer.merge()
    added = weight.detach() - before
    weight.copy_(before)
    layer.merged_adapters.clear()
    return added
