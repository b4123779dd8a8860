"""What ComfyUI makes of an adapter's file, written anew after what its loader does: which names it looks for, and how
it scales each kind."""

from __future__ import annotations

import torch
from torch import Tensor

PREFIX = "diffusion_model."


def apply(weights: dict[str, Tensor], diffusers: dict[str, str], tensors: dict[str, Tensor]) -> int:
    """Add a file's adapters to weights under the original names; returns how many of its tensors were of use.

    `diffusers` are the names of the image model's layers in diffusers, by the original ones.
    """
    used = 0
    for key in [key for key in weights if key.endswith(".weight")]:
        layer = key.removesuffix(".weight").removeprefix(PREFIX)
        places = [f"{PREFIX}{layer}", flat(layer), *([flat(diffusers[layer])] if layer in diffusers else [])]
        for place in (f"{place}." for place in dict.fromkeys(places)):
            own = {name.removeprefix(place): v.double() for name, v in tensors.items() if name.startswith(place)}
            if own:
                change, rank = _change(own)
                weights[key] += (float(own["alpha"]) / rank if rank else 1.0) * change.reshape(weights[key].shape)
                used += len(own)
    return used


def flat(layer: str) -> str:
    """A layer's name in the manner of kohya's files."""
    return f"lora_unet_{layer.replace('.', '_')}"


def _change(own: dict[str, Tensor]) -> tuple[Tensor, int | None]:
    """The change that a layer's tensors mean before it is scaled, and the rank that alpha is divided by."""
    for up, down in (("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")):
        if up in own:
            return own[up].flatten(1) @ own[down].flatten(1), len(own[down])
    if "hada_w1_a" in own:
        halves = [own[f"hada_w{number}_a"] @ own[f"hada_w{number}_b"] for number in (1, 2)]
        return halves[0] * halves[1], len(own["hada_w1_b"])
    ranks = [len(own[f"lokr_{factor}_b"]) for factor in ("w1", "w2") if f"lokr_{factor}" not in own]
    first, second = (_factor(own, f"lokr_{factor}") for factor in ("w1", "w2"))
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second), ranks[-1] if ranks else None


def _factor(own: dict[str, Tensor], name: str) -> Tensor:
    return own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]
