"""What `inflate adapter convert` and `inflate adapter extract` do with files and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inflate.adapters import algebra, bases, file, foreign, outlines
from inflate.adapters.algebra import Resized
from inflate.adapters.names import Network
from inflate.errors import CheckpointError, ConfigError
from inflate.formats import ADAPTERS
from inflate.models.exchange import detached
from inflate.models.unet import VideoUNet


def convert(
    source: Path,
    target: Path,
    to: str | None = None,
    model: str | None = None,
    alpha: float | None = None,
    without_text: bool = False,
    overwrite: bool = False,
) -> str:
    """Writes an adapter's file in another format, tensor for tensor; returns what to know of it.

    `model` is what the adapter is for, where the file does not tell. ConfigError for a format that is not known or not
    told; CheckpointError where the file is not whole, or the format has no place for the adapter.
    """
    if to is not None and to not in ADAPTERS:
        raise ConfigError(f"--to {to}: is no format of adapters; known are {', '.join(ADAPTERS)}")
    network = _network(source, model)
    adapter, format = foreign.read(source, network, alpha, without_text)
    wanted = to or ("inflate" if format != "inflate" else None)
    if wanted is None:
        raise ConfigError(f"{source} is {format}: say with --to which format it is to be")
    foreign.write(target, adapter, wanted, network, overwrite)
    ranks = sorted(set(adapter.rank.values()))
    caution = "; ComfyUI computes another model of a DoRA" if (adapter.kind, wanted) == ("dora", "kohya") else ""
    kind = f"a {adapter.kind} of {len(adapter.rank)} layers, rank {', '.join(map(str, ranks))}"
    return f"{source} is {format}, {kind}{caution}"


def extract(base: str, tuned: str, rank: int, leave_rest: bool = False) -> Resized:
    """The nearest LoRA to what a fine-tuned model's UNet has beyond its base's, and how near it is; CheckpointError."""
    before = outlines.load_unet(base)
    found = algebra.extracted(detached(before), detached(outlines.load_unet(tuned)), rank, leave_rest)
    about: dict[str, Any] = dict(found.adapter.about)
    if isinstance(before, VideoUNet):  # image models' adapters are for every inflation of them
        about["base"] = {"name": base, "sha256": bases.sha256(before)}
    adapter = file.Adapter(found.adapter.tensors, "lora", found.adapter.rank, found.adapter.alpha, about)
    made = algebra.remembered(adapter, by="extract", base=base, tuned=tuned, rank=rank, lost=found.lost_in_all)
    return Resized(made, found.lost, found.lost_in_all)


def _network(source: Path, model: str | None) -> Network:
    """The layers of the model that an adapter is for, as named or as its file tells; ConfigError for neither."""
    told = _told(source)
    base, family = told.get("base"), told.get("family")
    name = model or (base.get("name") if isinstance(base, dict) else None)
    if not isinstance(name, str):
        raise ConfigError(f"{source} does not tell which model it is for: name it as --model")
    if model is None and not bases.is_here(name):  # what a stranger's file names is not downloaded
        raise ConfigError(f"{source} is for {name}, which is not on this disk: name it, or one like it, as --model")
    return Network.of(outlines.outline(name, family if isinstance(family, str) else None))


def _told(source: Path) -> dict[str, Any]:
    """What a file tells of itself in our words; empty where it does not."""
    entries = file.read_header(source.expanduser()).get("__metadata__", {})
    try:
        told = json.loads(entries.get(file.OWN_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: the header's entry {file.OWN_KEY} is damaged: {error}") from error
    return told if isinstance(told, dict) else {}
