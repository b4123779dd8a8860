"""An adapter on a UNet, through PEFT: made anew, taken out as tensors, loaded, taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from inflate.adapters.file import Adapter, peft_settings
from inflate.adapters.fused import fuse
from inflate.adapters.settings import AdapterSettings, Kind
from inflate.adapters.targets import adaptable
from inflate.errors import CheckpointError
from inflate.layers.quantised import kind_of
from inflate.models.exchange import listing
from inflate.models.unet import VideoUNet

SLOT = "default"
"""PEFT's name of the one adapter that a UNet carries at a time."""


def create(unet: VideoUNet, settings: AdapterSettings, names: Sequence[str]) -> None:
    """Put a new adapter on the layers of these names; it alone is trained, and changes nothing yet.

    CheckpointError where the UNet carries one already, or its weights are stored in fewer bits.
    """
    _refuse_unready(unet)
    rank, alpha = dict.fromkeys(names, settings.rank), dict.fromkeys(names, settings.strength)
    unet.requires_grad_(False)
    _inject(unet, _config(Adapter({}, _kind(settings), rank, alpha), settings.dropout))


def load(unet: VideoUNet, adapter: Adapter, origin: object = "the adapter") -> None:
    """Put a kept adapter on a UNet, frozen; CheckpointError, with the UNet as it was, where one does not fit the other.

    Every tensor of the file must find its place, and every place its tensor.
    """
    _refuse_unready(unet)
    strange = sorted(adapter.rank.keys() - adaptable(unet).keys())
    if strange:
        raise CheckpointError(f"{origin} is for layers that this model does not have: {listing(strange)}")
    training = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    _inject(unet, _config(adapter))
    wanted = {name: value.shape for name, value in tensors(unet).items()}
    differing = {(name, value.shape) for name, value in adapter.tensors.items()} ^ {*wanted.items()}
    if differing:
        detach(unet)
        names = sorted({name for name, _ in differing})
        raise CheckpointError(f"{origin} does not fit this model, tensor by tensor: {listing(names)}")
    set_peft_model_state_dict(unet, {n.removeprefix("unet."): v for n, v in adapter.tensors.items()}, SLOT)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.replace(".base_layer.", ".") in training)


def tensors(unet: VideoUNet) -> dict[str, Tensor]:
    """The tensors of the adapter that a UNet carries, by PEFT's names below `unet.`; the same memory."""
    found: Mapping[str, Tensor] = get_peft_model_state_dict(unet, adapter_name=SLOT)
    return {f"unet.{name}": value.detach() for name, value in found.items()}


def carried(unet: VideoUNet, settings: AdapterSettings, about: dict[str, Any]) -> Adapter:
    """The adapter that `create` put on a UNet, as it is to be kept: a copy on the CPU."""
    names = [name for name, _ in layers(unet)]
    kept = {name: value.cpu().clone() for name, value in tensors(unet).items()}
    rank, alpha = dict.fromkeys(names, settings.rank), dict.fromkeys(names, settings.strength)
    return Adapter(kept, _kind(settings), rank, alpha, about)


def layers(unet: VideoUNet) -> Iterator[tuple[str, BaseTunerLayer]]:
    """The layers that carry the adapter, by the names that they have without it."""
    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def carries(unet: VideoUNet) -> bool:
    """Whether there is an adapter on a UNet."""
    return any(True for _ in layers(unet))


def detach(unet: VideoUNet) -> None:
    """Take the adapter off: the UNet is what it was, in the same memory."""
    for name, layer in list(layers(unet)):
        unet.set_submodule(name, layer.get_base_layer())
    del unet.peft_config
    unet._hf_peft_config_loaded = False


def _inject(unet: VideoUNet, config: PeftConfig) -> None:
    unet.add_adapter(config, SLOT)
    for _, layer in layers(unet):
        layer.train(unet.training)
        fuse(layer)


def _config(adapter: Adapter, dropout: float = 0.0) -> PeftConfig:
    told = peft_settings(adapter)
    if adapter.kind not in ("lokr", "loha"):
        return LoraConfig(**told, lora_dropout=dropout)
    alpha = told.pop("lora_alpha")
    shared = {name: told[name] for name in ("r", "target_modules", "rank_pattern", "alpha_pattern")}
    kind = LoKrConfig if adapter.kind == "lokr" else LoHaConfig
    return kind(**shared, alpha=alpha, rank_dropout=dropout)


def _kind(settings: AdapterSettings) -> Kind:
    if settings.kind == "none":
        raise CheckpointError("adapter.kind is none: there is no adapter to make")
    return settings.kind


def _refuse_unready(unet: VideoUNet) -> None:
    if kind_of(unet):  # of such layers PEFT would make the adapter's own
        raise CheckpointError("this UNet's weights are stored in fewer bits (memory.base): that comes after an adapter")
    if carries(unet):
        raise CheckpointError("this UNet carries an adapter already: merge it, or take it off, before another")
