"""Adapters in the files of other programs, read as ours and written from them: tensor for tensor, or refused.

What a file means by its numbers, as the programs that load it have it:

- kohya's scripts, LyCORIS and ComfyUI scale a layer by alpha / rank, alpha being a tensor of its own, or else by 1.
  They leave a LoKr of two whole factors as it is, whatever its alpha.
- `dora_scale` is the length of each row of the adapted weight in kohya's files, as PEFT's magnitude is. ComfyUI divides
  it by the lengths of the rows of the base's weight: it computes another model of a DoRA.
- What diffusers loaded before it used PEFT was not scaled.
- PEFT's files hold no alpha: the header tells it, or nobody does.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from inflate.adapters import file
from inflate.adapters.file import Adapter
from inflate.adapters.names import Network, named, recognise
from inflate.adapters.settings import Kind
from inflate.errors import CheckpointError
from inflate.models.exchange import Names, fit, listing

UNET = "unet."
DOWN, UP, MAGNITUDE, SCALE, ALPHA = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "dora_scale", "alpha"
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
ENDINGS: dict[str, str] = {
    **{name: name for name in (DOWN, UP, MAGNITUDE, *LOKR, *LOHA)},
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "lora_magnitude_vector.default.weight": MAGNITUDE,
}
"""How the names of tensors end in PEFT's files, and the name of today's PEFT."""
OTHER_ENDINGS: dict[str, str] = {
    "lora_down.weight": DOWN,
    "lora_up.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "dora_scale": SCALE,
    "alpha": ALPHA,
}
"""Likewise in other programs' files."""
PREFIXES = (UNET, "base_model.model.")
"""What PEFT's names may begin with."""
OTHER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "lora_unet_", "lycoris_", "module.")
"""Likewise other programs'."""
TEXT = ("lora_te", "text_encoder", "te_", "te1_", "te2_")
"""What the names of text encoders' tensors begin with."""
ANY_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_MARK = re.compile(r"[._](lora|hada|lokr)[._]")
_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")

Parts = dict[str, dict[str, Tensor]]
"""The tensors of each layer, by PEFT's names of what they are, alpha and dora_scale beside them."""


@dataclass(frozen=True)
class Spelling:
    """How a program other than PEFT names an adapter's tensors."""

    prefix: str
    endings: Mapping[str, str]
    """of PEFT's names, where they differ"""
    scaled: bool
    """whether there is a tensor alpha"""
    lacks: Mapping[Kind, str] = field(default_factory=dict)
    """kinds that it has no place for, and why"""


_NO_FACTORS = "it knows pairs of factors alone"
SPELLINGS = {
    "comfyui": Spelling(
        "diffusion_model.",
        {},
        True,
        {"dora": "ComfyUI divides by the lengths of the base's rows, not the adapted ones': it would draw otherwise"},
    ),
    "kohya": Spelling("lora_unet_", {DOWN: "lora_down.weight", UP: "lora_up.weight", MAGNITUDE: SCALE}, True),
    "attention-processors": Spelling(
        UNET,
        {DOWN: "lora.down.weight", UP: "lora.up.weight"},
        False,
        {"dora": _NO_FACTORS, "lokr": _NO_FACTORS, "loha": _NO_FACTORS},
    ),
}


class Read(NamedTuple):
    """An adapter under our names, and the format of the file that it was read from."""

    adapter: Adapter
    format: str


def read(path: str | Path, network: Network, alpha: float | None = None, without_text: bool = False) -> Read:
    """The adapter in a file of any format, for a UNet of these layers.

    `alpha` is for PEFT's files that do not tell theirs; `without_text` leaves out what is for text encoders.
    CheckpointError, listing the tensors, where a name, a layer or a shape is not known, and as `file.read`.
    """
    path = Path(path).expanduser()
    tensors, told = file.read_tensors(path, ANY_NAME)
    parts = _parts(_of_unet(tensors, path, without_text), path)
    format, ours = recognise(parts, network)
    if _is_pefts(tensors):
        spelt = {f"{UNET}{layer}.{name}": value for layer, own in parts.items() for name, value in own.items()}
        adapter = renamed(file.described(path, spelt, told, alpha), ours)
        return Read(replace(adapter, tensors=_flattened(_fitted(_by_layer(adapter), network, path))), format)
    fitted = _fitted(_renamed(parts, ours, path), network, path)
    return Read(_adapter(path, fitted, told), format if format in SPELLINGS else "attention-processors")


def is_adapter(path: Path) -> bool:
    """Whether a file's tensors are named as adapters' are, by any program; CheckpointError for a damaged header."""
    return path.suffix == ".safetensors" and path.is_file() and any(map(_MARK.search, file.read_header(path)))


def write(path: str | Path, adapter: Adapter, format: str, network: Network, overwrite: bool = False) -> None:
    """Writes an adapter of a UNet of these layers in a format.

    CheckpointError, listing the layers, where that has no place for them or for the adapter's kind or scale.
    """
    path = Path(path).expanduser()
    theirs = named(format, network, adapter.rank)
    if format not in SPELLINGS:
        file.write(path, renamed(adapter, theirs), overwrite)
        return
    tensors = _spelt(adapter, theirs, format)
    file.write_tensors(path, tensors, file.own_entry(adapter), overwrite)


def renamed(adapter: Adapter, names: Names) -> Adapter:
    """The same adapter under other names of its layers."""
    tensors = {names[layer]: own for layer, own in _by_layer(adapter).items()}
    rank = {names[layer]: rank for layer, rank in adapter.rank.items()}
    alpha = {names[layer]: alpha for layer, alpha in adapter.alpha.items()}
    return replace(adapter, tensors=_flattened(tensors), rank=rank, alpha=alpha)


def plain_alpha(adapter: Adapter, layer: str) -> float:
    """The alpha that, divided by the rank, scales a layer: an rsLoRA's is divided by the root of the rank."""
    root = math.sqrt(adapter.rank[layer]) if adapter.kind == "rslora" else 1.0
    return adapter.alpha[layer] * root


def _by_layer(adapter: Adapter) -> Parts:
    parts: Parts = {}
    for name, tensor in adapter.tensors.items():
        layer = file.module_of(name)
        parts.setdefault(layer, {})[name.removeprefix(f"{UNET}{layer}.")] = tensor
    return parts


def _flattened(parts: Parts) -> dict[str, Tensor]:
    return {f"{UNET}{layer}.{name}": tensor for layer, own in parts.items() for name, tensor in own.items()}


# --- reading ----------------------------------------------------------------------------------------------------------


def _of_unet(tensors: Mapping[str, Tensor], path: Path, without_text: bool) -> dict[str, Tensor]:
    text = [name for name in tensors if name.startswith(TEXT)]
    if text and not without_text:
        raise CheckpointError(
            f"{path} holds {len(text)} tensors for text encoders, such as {text[0]}, which an adapter of a UNet has no "
            "place for; add --without-text to leave them out"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in text}


def _is_pefts(names: Iterable[str]) -> bool:
    """Whether these are names of PEFT's, which has no tensor alpha, so that it must be told."""
    return all(not name.startswith(OTHER_PREFIXES) and _split(name, ENDINGS) for name in names)


def _parts(tensors: Mapping[str, Tensor], path: Path) -> Parts:
    """The tensors by their layers, as the file names those; CheckpointError, listing them, for unknown names."""
    split = {
        name: _split(_PROCESSOR.sub(r".\1.lora.\2.weight", name), {**ENDINGS, **OTHER_ENDINGS}) for name in tensors
    }
    unknown = [name for name, found in split.items() if found is None]
    if unknown:
        raise CheckpointError(f"{path} holds tensors that are of no known kind of adapter: {listing(unknown)}")
    parts: Parts = {}
    for name, (layer, kind) in ((name, found) for name, found in split.items() if found is not None):
        own = parts.setdefault(re.sub(r"\.to_out$", ".to_out.0", layer), {})
        if kind in own:
            raise CheckpointError(f"{path} holds {name} twice, under another name too")
        own[kind] = tensors[name]
    return parts


def _split(name: str, endings: Mapping[str, str]) -> tuple[str, str] | None:
    """The layer and PEFT's name of what a tensor is; None where the name ends in none of these."""
    prefix = next((each for each in (*PREFIXES, *OTHER_PREFIXES) if name.startswith(each)), "")
    found = [ending for ending in endings if name.endswith(f".{ending}")]
    longest = max(found, key=len, default=None)
    return None if longest is None else (name[len(prefix) : -len(longest) - 1], endings[longest])


def _renamed(parts: Parts, ours: Names, path: Path) -> Parts:
    """The same by our names of the layers; CheckpointError where two names mean one layer."""
    counts = Counter(ours[layer] for layer in parts)
    twice = [layer for layer, count in counts.items() if count > 1]
    if twice:
        raise CheckpointError(f"{path} has two adapters of one layer: {listing(twice)}")
    return {ours[layer]: own for layer, own in parts.items()}


def _fitted(parts: Parts, network: Network, path: Path) -> Parts:
    """The tensors in the shapes that PEFT gives them over these layers; CheckpointError, listing them, for others."""
    fitted: Parts = {layer: {} for layer in parts}
    wrong = []
    for layer, own in parts.items():
        for name, tensor in own.items():
            shaped = _shaped(name, tensor, network.shapes[layer])
            fitted[layer][MAGNITUDE if name == SCALE else name] = tensor if shaped is None else shaped
            if shaped is None:
                wrong.append(f"{layer}.{name} {tuple(tensor.shape)} over {tuple(network.shapes[layer])}")
    if wrong:
        raise CheckpointError(f"{path} is for layers of other shapes than this UNet's: {listing(wrong)}")
    return fitted


def _shaped(name: str, tensor: Tensor, weight: torch.Size) -> Tensor | None:
    """A tensor in PEFT's shape over a layer whose weight (out, in, ...) is this; None where it is for another."""
    ones = (1,) * (len(weight) - 2)
    if name == DOWN:
        return fit(tensor, torch.Size((tensor.shape[0], *weight[1:])))
    if name == UP and tensor.ndim > 1:
        return fit(tensor, torch.Size((weight[0], tensor.shape[1], *ones)))
    if name in (SCALE, MAGNITUDE):
        rows = tensor.shape[0] == weight[0] or (name == MAGNITUDE and tensor.shape[:2] == (1, weight[0]))
        shape = (1, weight[0], *ones) if ones else (weight[0],)
        return tensor.reshape(shape) if rows and tensor.numel() == weight[0] else None
    return None if name == UP else tensor


def _adapter(path: Path, parts: Parts, told: Mapping[str, str]) -> Adapter:
    """The adapter of tensors that came with alphas, with what our own entry tells where it is of these still."""
    alphas = {layer: float(own[ALPHA]) for layer, own in parts.items() if ALPHA in own}
    bare: Parts = {layer: {name: value for name, value in own.items() if name != ALPHA} for layer, own in parts.items()}
    kind = _kind(bare, path)
    rank = {layer: _rank(own, alphas.get(layer)) for layer, own in bare.items()}
    alpha = {layer: alphas.get(layer, float(rank[layer])) for layer in bare}
    found = Adapter(_flattened(bare), kind, rank, alpha)
    file.check_ranks(path, found)
    if file.OWN_KEY not in told:
        return found
    try:
        own = file.described(path, found.tensors, told)
    except CheckpointError:  # another program has taken layers out, and kept the header
        return found
    return own if _mean_the_same(own, found) else found


def _mean_the_same(told: Adapter, found: Adapter) -> bool:
    """Whether what a header tells is what its file's tensors say: other programs change those and keep headers."""
    return found.kind == (told.kind if told.kind != "rslora" else "lora") and all(
        plain_alpha(told, layer) == alpha for layer, alpha in found.alpha.items()
    )


def _kind(parts: Parts, path: Path) -> Kind:
    """The kind that all layers are of; CheckpointError where a tensor is missing, or kinds are mixed."""
    kinds = {layer: _kind_of(frozenset(own)) for layer, own in parts.items()}
    odd = [f"{layer} ({', '.join(parts[layer])})" for layer, kind in kinds.items() if kind is None]
    if odd:
        raise CheckpointError(f"{path} does not hold whole adapters, or of kinds that PEFT lacks: {listing(odd)}")
    several = {kind for kind in kinds.values() if kind is not None}
    if len(several) > 1:
        raise CheckpointError(f"{path} mixes {' and '.join(sorted(several))}: an adapter is of one kind")
    return several.pop()


def _kind_of(names: frozenset[str]) -> Kind | None:
    """The kind of a layer's adapter by what tensors it has; None where they are not whole."""
    if names in ({DOWN, UP}, {DOWN, UP, MAGNITUDE}):
        return "dora" if MAGNITUDE in names else "lora"
    if names in (frozenset(LOHA[:4]), frozenset(LOHA)):
        return "loha"
    halves = [names & {f"lokr_{w}", f"lokr_{w}_a", f"lokr_{w}_b"} for w in ("w1", "w2")]
    whole = all(
        half in ({f"lokr_{w}"}, {f"lokr_{w}_a", f"lokr_{w}_b"}) for half, w in zip(halves, ("w1", "w2"), strict=True)
    )
    return "lokr" if whole and names <= frozenset(LOKR) else None


def _rank(own: Mapping[str, Tensor], alpha: float | None) -> int:
    """The rank that a layer's factors show; of a LoKr of two whole ones, which is not scaled, its alpha."""
    sides = (own[name].shape[side] for name, side in file.RANK_SIDES.items() if name in own)
    return next(sides, max(1, int(alpha or 1)))


# --- writing ----------------------------------------------------------------------------------------------------------


def _spelt(adapter: Adapter, theirs: Names, format: str) -> dict[str, Tensor]:
    """The tensors under another program's names; CheckpointError where it computes something else of them."""
    spelling = SPELLINGS[format]
    if adapter.kind in spelling.lacks:
        raise CheckpointError(f"{format} has no place for a {adapter.kind}: {spelling.lacks[adapter.kind]}")
    _check_scales(adapter, format, spelling.scaled)
    spelt: dict[str, Tensor] = {}
    for layer, own in _by_layer(adapter).items():
        place = f"{spelling.prefix}{theirs[layer]}"
        for name, tensor in own.items():
            value = tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1)) if name == MAGNITUDE else tensor
            spelt[f"{place}.{spelling.endings.get(name, name)}"] = value
        if spelling.scaled:
            spelt[f"{place}.{ALPHA}"] = _exact(plain_alpha(adapter, layer))
    return spelt


def _check_scales(adapter: Adapter, format: str, scaled: bool) -> None:
    """CheckpointError, listing the layers, where a format would not scale them and they are scaled."""
    parts = _by_layer(adapter)
    bound = [layer for layer, own in parts.items() if not scaled or {"lokr_w1", "lokr_w2"} <= own.keys()]
    wrong = [layer for layer in bound if plain_alpha(adapter, layer) != adapter.rank[layer]]
    if wrong:
        raise CheckpointError(
            f"{format} has no place for an alpha other than the rank in {len(wrong)} layers: {listing(wrong)}; "
            "`inflate adapter combine` of the one file folds a LoRA's alpha into its factors"
        )


def _exact(alpha: float) -> Tensor:
    """A number as a tensor that holds all of it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
