"""Calculating with adapters: another rank, sums, other strengths, and the difference of two models as one.

LoRA's and rsLoRA's change of a weight is the product of two factors, with which all of this is possible. The others'
are not: a DoRA's depends on the base's weight, and LoKr's and LoHa's products are of other forms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from inflate.adapters.file import Adapter
from inflate.adapters.foreign import DOWN, UNET, UP, plain_alpha
from inflate.errors import CheckpointError
from inflate.models.exchange import listing

REASONS = {
    "dora": "a DoRA's change depends on the base's weight, too: merge it into the base",
    "lokr": "a LoKr is a Kronecker product, and not of two factors of a rank: merge it into the base",
    "loha": "a LoHa is a product of two products, and not of two factors of a rank: merge it into the base",
}
"""Why kinds other than LoRA are not calculated with."""
OF_RUN = ("config", "data", "held_out", "hardware", "run", "reference", "verified")
"""What is known of a trained adapter and no longer holds of one that was calculated."""


@dataclass(frozen=True)
class Resized:
    """An adapter of another rank."""

    adapter: Adapter
    lost: dict[str, float]
    """by layer, the length of what was left out in units of that of the whole change; 0 = nothing"""
    lost_in_all: float
    """the same of all layers together"""


def remembered(adapter: Adapter, **made: Any) -> Adapter:
    """The adapter with a note of how it was made."""
    return replace(adapter, about={**adapter.about, "made": made})


def scaled(adapter: Adapter, strength: float) -> Adapter:
    """The adapter with its change of each weight times `strength`, tensors untouched; CheckpointError for a DoRA."""
    if adapter.kind == "dora":
        raise CheckpointError(f"cannot be scaled: {REASONS['dora']}, or give its weight where it is used")
    return replace(_calculated(adapter), alpha={layer: alpha * strength for layer, alpha in adapter.alpha.items()})


def resized(adapter: Adapter, rank: int) -> Resized:
    """The nearest LoRA of that rank in every layer, by singular values; what it leaves out is told.

    CheckpointError for kinds other than LoRA and rsLoRA.
    """
    _check_kind(adapter)
    lost, whole, tensors = {}, {}, {}
    for layer in adapter.rank:
        down, up = _factors(adapter, layer)
        small, lost[layer], whole[layer] = _truncated(*_singular(down, up), rank)
        tensors.update(_named(layer, small, adapter.tensors[f"{UNET}{layer}.{DOWN}"]))
    made = _made(adapter, tensors, dict.fromkeys(adapter.rank, rank))
    return Resized(made, {layer: _share(lost[layer], whole[layer]) for layer in lost}, _share_in_all(lost, whole))


def combined(adapters: Sequence[Adapter], weights: Sequence[float], any_base: bool = False) -> Adapter:
    """The LoRA whose change is the weighted sum of the adapters' changes; ranks add up.

    CheckpointError for other kinds, for adapters over different bases unless `any_base`, and for layers of different
    shapes.
    """
    for adapter in adapters:
        _check_kind(adapter)
    _check_bases(adapters, any_base)
    tensors: dict[str, Tensor] = {}
    rank = {}
    for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.rank):
        parts = [(each, weight) for each, weight in zip(adapters, weights, strict=True) if layer in each.rank]
        downs = [each.tensors[f"{UNET}{layer}.{DOWN}"] for each, _ in parts]
        ups = [_scaled_up(each, layer, weight) for each, weight in parts]
        _check_stackable(layer, downs, ups)
        tensors[f"{UNET}{layer}.{DOWN}"] = torch.cat(_alike(downs))
        tensors[f"{UNET}{layer}.{UP}"] = torch.cat(_alike(ups), 1)
        rank[layer] = sum(each.rank[layer] for each, _ in parts)
    return _made(replace(adapters[0], about={**adapters[0].about, **_common(adapters)}), tensors, rank)


def extracted(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], rank: int, leave_rest: bool = False) -> Resized:
    """The nearest LoRA of that rank to the difference of two models' tensors; what it leaves out is told.

    CheckpointError, listing tensors, where the models are not of the same, or one changed that a LoRA cannot change (a
    bias, a norm, a mix), unless `leave_rest`; and where nothing changed.
    """
    _check_same(base, tuned)
    changed = [name for name in base if not torch.equal(base[name], tuned[name])]
    layers = [name for name in changed if name.endswith(".weight") and base[name].ndim > 1]
    rest = [name for name in changed if name not in layers]
    if rest and not leave_rest:
        raise CheckpointError(
            f"{len(rest)} tensors changed that are no weights of layers, which a LoRA cannot change: {listing(rest)}; "
            "add --leave-rest to leave them as the base has them"
        )
    if not layers:
        raise CheckpointError("the two models have the same weights: there is nothing to extract")
    lost, whole, tensors = {}, {}, {}
    for name in layers:
        layer = name.removesuffix(".weight")
        change = tuned[name].double() - base[name].double()
        left, values, right = torch.linalg.svd(change.flatten(1), full_matrices=False)
        small, lost[layer], whole[layer] = _truncated(left, values, right, rank)
        tensors.update(_named(layer, small, base[name]))
    ranks = dict.fromkeys(lost, rank)
    made = Adapter(tensors, "lora", ranks, {layer: float(rank) for layer in ranks}, {"left": rest} if rest else {})
    return Resized(made, {layer: _share(lost[layer], whole[layer]) for layer in lost}, _share_in_all(lost, whole))


def _check_kind(adapter: Adapter) -> None:
    if adapter.kind in REASONS:
        raise CheckpointError(f"this adapter is a {adapter.kind}: {REASONS[adapter.kind]}")


def _check_bases(adapters: Iterable[Adapter], any_base: bool) -> None:
    made = [each for each in adapters if each.base]
    if len({each.about["base"].get("sha256") for each in made}) > 1 and not any_base:
        told = ", ".join(str(each.base) for each in made)
        raise CheckpointError(
            f"these adapters were made over different models ({told}): add --any-base to combine them all the same"
        )


def _common(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Targets and licences of all of them."""
    targets = dict.fromkeys(target for each in adapters for target in each.about.get("targets") or ())
    licences = dict.fromkeys(licence for each in adapters if (licence := each.about.get("licence")))
    return {"targets": list(targets), "licence": " and ".join(licences) or None}


def _check_stackable(layer: str, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> None:
    shapes = {(tuple(down.shape[1:]), up.shape[0]) for down, up in zip(downs, ups, strict=True)}
    if len(shapes) > 1:
        raise CheckpointError(f"these adapters are for layers of different shapes: {layer} {sorted(shapes)}")


def _check_same(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> None:
    differing = {(name, value.shape) for name, value in base.items()} ^ {(n, v.shape) for n, v in tuned.items()}
    if differing:
        names = listing(sorted({name for name, _ in differing}))
        raise CheckpointError(f"the two models are not of the same layers: {names}")


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the most precise of their types."""
    kinds = [tensor.dtype for tensor in tensors]
    best = kinds[0]
    for kind in kinds[1:]:
        best = torch.promote_types(best, kind)
    return [tensor.to(best) for tensor in tensors]


def _scaled_up(adapter: Adapter, layer: str, weight: float = 1.0) -> Tensor:
    """The second factor of a layer with the scale in it, calculated in float64."""
    up = adapter.tensors[f"{UNET}{layer}.{UP}"]
    scale = weight * plain_alpha(adapter, layer) / adapter.rank[layer]
    return up if scale == 1 else (up.double() * scale).to(up.dtype)


def _factors(adapter: Adapter, layer: str) -> tuple[Tensor, Tensor]:
    """A layer's factors as matrices (rank, in), (out, rank) in float64, whose product is its change."""
    down, up = adapter.tensors[f"{UNET}{layer}.{DOWN}"], adapter.tensors[f"{UNET}{layer}.{UP}"]
    scale = plain_alpha(adapter, layer) / adapter.rank[layer]
    return down.flatten(1).double(), up.flatten(1).double() * scale


def _singular(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of up @ down, whose side is the rank and not the layer's."""
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    rotation, values, other = torch.linalg.svd(upper @ lower.mT)
    return left @ rotation, values, other @ right.mT


def _truncated(left: Tensor, values: Tensor, right: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float, float]:
    """The factors (rank, in), (out, rank) of the largest singular values, and squared lengths: left out, whole."""
    roots = values[:rank].sqrt()
    down, up = roots[:, None] * right[:rank], left[:, :rank] * roots
    short = rank - len(roots)
    if short > 0:
        down = torch.cat([down, down.new_zeros(short, down.shape[1])])
        up = torch.cat([up, up.new_zeros(len(up), short)], 1)
    return (down, up), float(values[rank:].square().sum()), float(values.square().sum())


def _named(layer: str, factors: tuple[Tensor, Tensor], like: Tensor) -> dict[str, Tensor]:
    """A layer's factors under PEFT's names, in the type and over the kernel of `like` (any, in, ...)."""
    down, up = (factor.to(like.dtype) for factor in factors)
    kernel = like.shape[1:]
    return {
        f"{UNET}{layer}.{DOWN}": down.reshape(-1, *kernel),
        f"{UNET}{layer}.{UP}": up.reshape(*up.shape, *[1] * (len(kernel) - 1)),
    }


def _share(lost: float, whole: float) -> float:
    return sqrt(lost / whole) if whole else 0.0


def _share_in_all(lost: Mapping[str, float], whole: Mapping[str, float]) -> float:
    return _share(sum(lost.values()), sum(whole.values()))


def _calculated(adapter: Adapter) -> Adapter:
    """An adapter without what is known of the run that it came from."""
    about: dict[str, Any] = {name: value for name, value in adapter.about.items() if name not in OF_RUN}
    return replace(adapter, about=about)


def _made(like: Adapter, tensors: dict[str, Tensor], rank: dict[str, int]) -> Adapter:
    """A LoRA of these tensors, not scaled, known to be for what `like` is for."""
    alpha = {layer: float(each) for layer, each in rank.items()}
    return replace(_calculated(like), tensors=tensors, kind="lora", rank=rank, alpha=alpha)
