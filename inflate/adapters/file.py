"""The file of an adapter: one .safetensors, in PEFT's names below `unet.`, that says all about itself in its header.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.temporal.attn1.to_q.lora_A.weight    (rank, in)
    unet.down_blocks.0.attentions.0.transformer_blocks.0.temporal.attn1.to_q.lora_B.weight    (out, rank)

The header's entry `inflate` is JSON: kind, rank and alpha per module, and what the adapter was made of. Beside it
stands `lora_adapter_metadata`, by which diffusers' `load_lora_adapter` learns of ranks and alphas if it is told the
file's `weight_name`; else it takes each alpha for the rank, without a word.

Files come from anywhere: a header is read only up to a size, and every name, shape and place in it is checked before a
tensor is. Nothing in a file is executed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, TypeGuard

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from inflate.adapters.settings import FILE_NAME, KINDS, LORA_KINDS, Kind
from inflate.errors import CheckpointError
from inflate.files import new_file
from inflate.models.exchange import listing

NAME = FILE_NAME
FORMAT = 1
OWN_KEY, DIFFUSERS_KEY = "inflate", "lora_adapter_metadata"
LARGEST_HEADER = 16 * 2**20
"""Bytes; a LoRA of every layer of Stable Video Diffusion has a fiftieth of it."""
LARGEST_FILE = 16 * 2**30
"""Bytes; the whole UNet of Stable Video Diffusion in float32 has 6 GiB."""
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that weights may have."""

TENSOR_NAME = re.compile(r"unet(\.[A-Za-z0-9_]+)+\.(lora|hada|lokr)_[A-Za-z0-9_]+(\.weight)?")
RANK_SIDES = {
    "lora_A.weight": 0, "lora_B.weight": 1, "hada_w1_a": 1, "hada_w1_b": 0, "hada_w2_a": 1, "hada_w2_b": 0,
    "lokr_w1_a": 1, "lokr_w1_b": 0, "lokr_w2_a": 1, "lokr_w2_b": 0,
}  # fmt: skip
"""Which side of a factor is the rank."""


RUN = ("steps", "processes", "threads", "seconds", "peak_memory")
"""What is told of the run that made an adapter; seconds, and bytes of its main process."""
ABOUT: dict[str, Callable[[Any], bool]] = {
    "targets": lambda value: _are(str, value),
    "family": lambda value: isinstance(value, str),
    "base": lambda value: (
        isinstance(value, dict)
        and _are(str, [value.get("name"), value.get("sha256"), value.get("image_model", ""), value.get("stored", "")])
    ),
    "config": lambda value: isinstance(value, str),
    "data": lambda value: isinstance(value, str),
    "held_out": lambda value: _are(dict, value) and all(_are((float, int, NoneType), [*row.values()]) for row in value),
    "licence": lambda value: isinstance(value, str),
    "hardware": lambda value: isinstance(value, str),
    "trigger": lambda value: isinstance(value, str),
    "run": lambda value: isinstance(value, dict) and all(_number(value.get(name)) for name in RUN),
    "reference": lambda value: isinstance(value, dict),
    "verified": lambda value: (
        isinstance(value, dict)
        and all(_number(value.get(name)) for name in ("max_abs_diff", "effect"))
        and isinstance(value.get("versions"), dict)
    ),
}
"""What the entries beside kind, rank and alpha must look like, where they are told."""


@dataclass(frozen=True)
class Adapter:
    """What a file holds."""

    tensors: dict[str, Tensor]
    """by PEFT's names, with the leading `unet.`"""
    kind: Kind
    rank: dict[str, int]
    """by module name, without `unet.`"""
    alpha: dict[str, float]
    """by module name, before it is divided by the rank or, of rslora, its root"""
    about: dict[str, Any] = field(default_factory=dict)
    """the rest: targets, family, base, config, data, held_out, licence, trigger, hardware, run, verified"""

    @property
    def parameters(self) -> int:
        """Numbers in all."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def base(self) -> str | None:
        """The model that it was made on, by name, and the image model that this went over in place of its own."""
        told = self.about.get("base") or {}
        return " over ".join(told[name] for name in ("name", "image_model") if name in told) or None


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: str | Path, alpha: float | None = None) -> Adapter:
    """The adapter in a file; `alpha` is for one that does not tell its own.

    CheckpointError, each with its reason: no such file, not safetensors, cut short, too large, tensors that lie outside
    it or have strange names, types or values, no alpha, ranks that the tensors do not have.
    """
    path = Path(path).expanduser()
    return described(path, *read_tensors(path), alpha)


def read_tensors(path: Path, names: re.Pattern[str] = TENSOR_NAME) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, whose names are to be like these, and what its header tells; CheckpointError as `read`."""
    header = read_header(path)
    told = header.pop("__metadata__", {})
    check_places(path, header, names)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; get the file again") from error
    unusable = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if unusable:
        raise CheckpointError(f"{path}: {_some(unusable)} is not finite: the adapter was saved from a run that failed")
    return tensors, told


def read_header(path: Path) -> dict[str, Any]:
    """The header's entries, without a look at the tensors; CheckpointError for what is no whole header."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: adapters are .safetensors files; other formats can execute code and are not read"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            _check_sizes(path, size, length)
            header = _json(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no .safetensors file: its header is damaged; get the file again")
    told = header.get("__metadata__", {})
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise CheckpointError(f"{path}: the header's __metadata__ is not text by name; get the file again")
    return header


def _check_sizes(path: Path, size: int, header: int) -> None:
    if size > LARGEST_FILE:
        raise CheckpointError(f"{path} has {size:,} bytes, an adapter at most {LARGEST_FILE:,}: this is something else")
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes and is no .safetensors file; get the file again")
    if header > LARGEST_HEADER:
        raise CheckpointError(f"{path}: its header claims {header:,} bytes, more than {LARGEST_HEADER:,}: not read")
    if header > size - 8:
        raise CheckpointError(f"{path} is cut short within its header; get the file again")


def check_places(path: Path, header: Mapping[str, Any], names: re.Pattern[str] = TENSOR_NAME) -> None:
    """CheckpointError unless the header's tensors have plain names, known types, and fill the file without overlap."""
    if not header:
        raise CheckpointError(f"{path} holds no tensors: it is no adapter")
    end, spans = path.stat().st_size, []
    for name, entry in header.items():
        if len(name) > 256 or not names.fullmatch(name):
            raise CheckpointError(
                f"{path}: {name[:80]!r} is no name of a UNet's adapter in PEFT's spelling; `inflate adapter convert` "
                "knows the spellings of other programs"
            )
        spans.append(_span(path, name, entry))
    data = end - 8 - int.from_bytes(_first_bytes(path), "little")
    place = 0
    for start, stop, name in sorted(spans):
        if stop > data:
            raise CheckpointError(f"{path}: {name} lies beyond the end of the file, which is cut short; get it again")
        if start != place:
            raise CheckpointError(f"{path}: {name} overlaps another tensor or leaves a gap: not read")
        place = stop
    if place != data:
        raise CheckpointError(f"{path}: {data - place:,} bytes after the last tensor belong to none: not read")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _span(path: Path, name: str, entry: Any) -> tuple[int, int, str]:
    """Where a tensor begins and ends; CheckpointError where that is not its type's size times its shape."""
    if not isinstance(entry, dict) or entry.get("dtype") not in BYTES:
        kind = entry.get("dtype") if isinstance(entry, dict) else entry
        raise CheckpointError(f"{path}: {name} is of type {kind}; weights are {', '.join(BYTES)}")
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape) or not _counts(place) or len(place) != 2:
        raise CheckpointError(f"{path}: {name} has no proper shape and place; get the file again")
    if math.prod(shape) * BYTES[entry["dtype"]] != place[1] - place[0]:
        raise CheckpointError(f"{path}: {name} of shape {tuple(shape)} does not fill its place: not read")
    return place[0], place[1], name


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def described(path: Path, tensors: dict[str, Tensor], told: Mapping[str, str], alpha: float | None = None) -> Adapter:
    """The adapter of these tensors by what its header tells: in our words, or in diffusers', or with the given alpha.

    CheckpointError as `read`.
    """
    own = OWN_KEY in told
    adapter = _own(path, tensors, _json(told[OWN_KEY])) if own else _foreign(path, tensors, told, alpha)
    check_ranks(path, adapter)
    return adapter


def _foreign(path: Path, tensors: dict[str, Tensor], told: Mapping[str, str], alpha: float | None) -> Adapter:
    rank = ranks(tensors)
    config = _json(told[DIFFUSERS_KEY]) if DIFFUSERS_KEY in told else None
    config = config if isinstance(config, dict) else {}
    config = {name.removeprefix("unet."): value for name, value in config.items()}
    every = config.get("lora_alpha") if alpha is None else alpha
    if not _number(every):
        raise CheckpointError(
            f"{path} does not say its alpha, without which its strength is a guess: ask its maker, or give it (--alpha)"
        )
    kind = _kind(tensors, bool(config.get("use_rslora")))
    pattern = config.get("alpha_pattern") if alpha is None else None
    return Adapter(tensors, kind, rank, {name: _alpha(name, pattern or {}, float(every)) for name in rank})


def _alpha(module: str, pattern: Mapping[str, Any], every: float) -> float:
    """A module's alpha by PEFT's patterns, read as plain names or ends of names: a stranger's expression is not run."""
    for name, value in pattern.items():
        plain = name.removeprefix("^").replace("\\", "")
        if _number(value) and f".{module}".endswith(f".{plain}"):
            return float(value)
    return every


def _own(path: Path, tensors: dict[str, Tensor], told: Any) -> Adapter:
    remedy = "its maker must save it again, or inflate is older than the file: update it"
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its entry `{OWN_KEY}` is not of format {FORMAT}; {remedy}")
    kind, rank, alpha = told.get("kind"), told.get("rank"), told.get("alpha")
    if kind not in KINDS:
        raise CheckpointError(f"{path} is of kind {kind}, not one of {', '.join(KINDS)}; {remedy}")
    if not isinstance(rank, dict) or not all(type(each) is int and each > 0 for each in rank.values()):
        raise CheckpointError(f"{path} does not say its ranks; {remedy}")
    if not isinstance(alpha, dict) or alpha.keys() != rank.keys() or not all(map(_number, alpha.values())):
        raise CheckpointError(f"{path} does not say its alphas, without which its strength is a guess; {remedy}")
    about = {name: value for name, value in told.items() if name not in ("format", "kind", "rank", "alpha")}
    wrong = sorted(name for name, fits in ABOUT.items() if about.get(name) is not None and not fits(about[name]))
    if wrong:
        raise CheckpointError(f"{path}: what it says of its {', '.join(wrong)} is damaged; {remedy}")
    return Adapter(tensors, kind, rank, {name: float(value) for name, value in alpha.items()}, about)


def check_ranks(path: Path, adapter: Adapter) -> None:
    """CheckpointError where modules or ranks that are told are not those of the tensors."""
    held = {module_of(name) for name in adapter.tensors}
    differing = sorted(held ^ adapter.rank.keys())
    if differing:
        raise CheckpointError(f"{path} tells of other modules than it holds tensors of: {_some(differing)}")
    for name, tensor in adapter.tensors.items():
        side, told = _rank_side(name), adapter.rank[module_of(name)]
        if side is not None and (tensor.ndim < 2 or tensor.shape[side] != told):
            raise CheckpointError(f"{path}: {name} is {tuple(tensor.shape)}, not of the rank {told} that it tells")


def ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The rank of each module, by the shape of its factors; CheckpointError where none shows it."""
    found: dict[str, int] = {}
    for name, tensor in tensors.items():
        side = _rank_side(name)
        if side is not None and tensor.ndim > 1:
            found[module_of(name)] = tensor.shape[side]
    unknown = sorted({module_of(name) for name in tensors} - found.keys())
    if unknown:
        raise CheckpointError(f"the rank of {_some(unknown)} is not told and shows in none of its tensors")
    return found


def module_of(name: str) -> str:
    """The module that a tensor belongs to: `unet.mid_block.x.to_q.lora_A.weight` is of `mid_block.x.to_q`."""
    return re.split(r"\.(?=(?:lora|hada|lokr)_)", name)[0].removeprefix("unet.")


def _rank_side(name: str) -> int | None:
    return RANK_SIDES.get(name.removeprefix(f"unet.{module_of(name)}."))


def _kind(tensors: Mapping[str, Tensor], root: bool) -> Kind:
    names = " ".join(tensors)
    if ".lokr_" in names:
        return "lokr"
    if ".hada_" in names:
        return "loha"
    if "lora_magnitude_vector" in names:
        return "dora"
    return "rslora" if root else "lora"


def _json(text: str | bytes) -> Any:
    """The value in a text; None where it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _are(kind: type | tuple[type, ...], values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float) and math.isfinite(value)


def _some(names: Sequence[str]) -> str:
    return listing([*names], 1)


# --- writing ----------------------------------------------------------------------------------------------------------


def write(path: str | Path, adapter: Adapter, overwrite: bool = False) -> None:
    """Write an adapter's file in one step; CheckpointError where one stands there, or the disk does not take it."""
    path = Path(path).expanduser()
    check_ranks(path, adapter)
    told = own_entry(adapter)
    if adapter.kind in LORA_KINDS:
        told[DIFFUSERS_KEY] = json.dumps({f"unet.{name}": value for name, value in peft_settings(adapter).items()})
    write_tensors(path, adapter.tensors, told, overwrite)


def own_entry(adapter: Adapter) -> dict[str, str]:
    """What a header tells of an adapter in our words."""
    own = {"format": FORMAT, "kind": adapter.kind, "rank": adapter.rank, "alpha": adapter.alpha, **adapter.about}
    return {"format": "pt", OWN_KEY: json.dumps(own, allow_nan=False)}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str], overwrite: bool = False) -> None:
    """Write tensors and a header to a file in one step; CheckpointError as `write`."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: give an adapter a name that ends in .safetensors")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists already; choose another name, or add --overwrite")
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        with new_file(path) as aside:
            save_file(kept, aside, dict(told))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def peft_settings(adapter: Adapter) -> dict[str, Any]:
    """What PEFT's configuration of a LoRA must be told, as JSON; other than the first module's go by exact names."""
    first = next(iter(adapter.rank))
    rank, alpha = adapter.rank[first], adapter.alpha[first]
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": list(adapter.rank),
        "rank_pattern": {f"^{re.escape(name)}": each for name, each in adapter.rank.items() if each != rank},
        "alpha_pattern": {f"^{re.escape(name)}": each for name, each in adapter.alpha.items() if each != alpha},
        "use_rslora": adapter.kind == "rslora", "use_dora": adapter.kind == "dora",
    }  # fmt: skip
