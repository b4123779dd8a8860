"""The settings of an adapter; importable without torch, so that the command line checks them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from inflate import shelves
from inflate.errors import ConfigError

FILE_NAME = "pytorch_lora_weights.safetensors"
"""What others look for in an adapter's folder."""
SHELF = Path("adapters")
"""Where adapters are looked for by their bare names, beside the working directory."""
Kind = Literal["lora", "dora", "rslora", "lokr", "loha"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LORA_KINDS: tuple[Kind, ...] = ("lora", "dora", "rslora")
"""The kinds made of two factors each, which other programs call LoRA."""


@dataclass
class AdapterSettings:
    """Small weights that learn beside the model's own, which stay as they are; the export is then these alone."""

    kind: Literal["none", "lora", "dora", "rslora", "lokr", "loha"] = "none"
    """none: the model itself learns. lora: two factors per layer; dora: also the length of each output's weights;
    rslora: lora scaled by alpha over the root of the rank; lokr, loha: Kronecker and Hadamard products"""
    rank: int = 16
    """inner width of the factors"""
    alpha: float | None = None
    """strength: what is learnt is multiplied by alpha / rank; null = the rank"""
    dropout: float = 0.0
    """share of a layer's inputs (lora, dora, rslora) or of the inner width (lokr, loha) that a step leaves out"""
    targets: list[str] = field(default_factory=list)
    """layers, by their names' ends: attn1.to_q, with * for anything; one of temporal layers says temporal, as in
    temporal.attn1.to_q, and others mean the image model's layers alone"""
    exclude: list[str] = field(default_factory=list)
    """layers to leave out, by their names' ends, temporal or not"""
    trigger: str | None = None
    """words of the captions by which a prompt asks for what was learnt, for the card; null = it acts on any"""
    licence: str | None = None
    """of the file, for its header and card, such as cc-by-4.0"""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"adapter.rank={self.rank}: must be at least 1")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"adapter.alpha={self.alpha}: must be positive, or null for the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout={self.dropout}: a share from 0 to below 1")
        if self.kind == "none" and self.targets:
            raise ConfigError(f"adapter.targets is set but adapter.kind is none: set one of {', '.join(KINDS)}")
        if self.kind != "none" and not self.targets:
            raise ConfigError(
                f"adapter.kind={self.kind} needs adapter.targets: name layers such as [temporal.attn1.to_q], or add a "
                "card such as adapters/temporal_lora.yaml"
            )

    @property
    def strength(self) -> float:
        """The alpha that counts."""
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class Weighted:
    """An adapter's file and how strongly it is to act: 1 as trained, 0 not at all, below 0 the other way round."""

    path: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Weighted:
        """Of FILE or FILE:WEIGHT; ConfigError for a weight that is no number, and as `find`."""
        path, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(find(text))
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{text}: {weight} is no weight of an adapter; write FILE or FILE:WEIGHT")
        return cls(find(path), number)

    @classmethod
    def parse_sum(cls, text: str) -> list[Weighted]:
        """Of several with + between them, which act together; errors as `parse`."""
        return [cls.parse(part) for part in ([text] if Path(text).exists() else text.split("+"))]

    @property
    def label(self) -> str:
        """The adapter's own name and its weight, for a grid: pan_left 0.8."""
        parts = [part for part in self.path.with_suffix("").parts if part not in (Path(FILE_NAME).stem, "export")]
        return f"{parts[-1] if parts else self.path.name} {self.weight:g}"


def find(name: str) -> Path:
    """The file that an adapter's name means: a file, that of a folder or of a run, or what is on a shelf by the name.

    The shelf is `adapters` beside the working directory, else the one that came with the package.
    ConfigError, listing where it was looked for, for a name that is no file's and is nowhere.
    """
    path = Path(name).expanduser()
    if name.endswith(".safetensors") or path.is_file():
        return path
    folders = [path, SHELF / name]
    places = [
        place
        for folder in folders
        for place in (Path(f"{folder}.safetensors"), folder / FILE_NAME, folder / "export" / FILE_NAME)
    ]
    came = shipped()
    found = next((place for place in places if place.is_file()), came.get(name))
    if found is None:
        raise ConfigError(
            f"no adapter {name}: there is none of {', '.join(map(str, places))}, nor is it one that came with the "
            f"package ({', '.join(came) or 'none did'}); name a .safetensors file"
        )
    return found


def shipped() -> dict[str, Path]:
    """The adapters that came with the package, by name; none where its shelves were not installed."""
    try:
        shelf = shelves.find() / SHELF
    except ConfigError:
        return {}
    return {file.stem: file for file in sorted(shelf.glob("*.safetensors"))}
