"""Training an adapter in place of the model: what a run adds before its first step and to its export."""

from __future__ import annotations

import math
import resource
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from inflate.adapters import attach, bases, card, file, targets, verify
from inflate.adapters.file import Adapter
from inflate.adapters.settings import AdapterSettings
from inflate.errors import ConfigError
from inflate.files import write_text
from inflate.layers import quantised
from inflate.models.exchange import listing
from inflate.models.unet import VideoUNet
from inflate.training import record
from inflate.training.economy import as_loaded
from inflate.training.loop import Result
from inflate.training.noise import seed_of
from inflate.training.paper import on_paper

SAMPLES = "before_after.png"
"""What a run leaves of its previews, which the card shows."""


@dataclass(frozen=True)
class Adapting:
    """The new adapter of a run, on its UNet."""

    settings: AdapterSettings
    about: dict[str, Any]
    """what its file says of itself from the start: targets, family, base"""

    @classmethod
    def on(
        cls,
        unet: VideoUNet,
        settings: AdapterSettings,
        family: str,
        path: str,
        seed: int,
        image_only: bool = False,
        image_model: str | None = None,
        text: bool = True,
    ) -> Adapting | None:
        """Put a new adapter on a UNet, which was loaded from `path`; it alone is trained from then on. None of none.

        `image_only` says that all frames are trained as images, `image_model` what the temporal layers of `path` went
        over, `text` whether the UNet is told any. Of a UNet on paper, whose values are unknown, only the names are
        checked. ConfigError, with the UNet as it was, for layers that the model does not have or that would learn
        nothing.
        """
        if settings.kind == "none":
            return None
        names = targets.resolve(unet, settings)
        known = not on_paper(next(unet.parameters()))
        if known:
            targets.refuse_zero_rows(unet, names, settings)
            targets.refuse_inert(unet, names, bases.TOKENS[family] if text else 0, image_only)
            _refuse_drawn(unet, names)
        digest = bases.sha256(unet) if known else None
        base = {"name": path, "sha256": digest, **({"image_model": image_model} if image_model else {})}
        torch.manual_seed(seed_of(seed, "adapter"))
        attach.create(unet, settings, names)
        own = {name: getattr(settings, name) for name in ("targets", "exclude", "trigger", "licence")}
        return cls(settings, {**own, "family": family, "base": base})

    def export(self, unet: VideoUNet, folder: Path) -> None:
        """Write the adapter's file, not yet verified, into an existing folder.

        What it is to be verified by is its output over the base's weights as they were loaded.
        """
        stored = quantised.kind_of(unet)
        base = {**self.about["base"], **({"stored": stored} if stored else {})}
        with as_loaded(unet):
            about = {**self.about, "base": base, "reference": verify.reference(unet), "verified": None}
            file.write(folder / file.NAME, attach.carried(unet, self.settings, about))


def _refuse_drawn(unet: VideoUNet, names: Sequence[str]) -> None:
    """ConfigError for layers that inflation has just drawn: another inflation draws others, on which the file fails."""
    created = unet.created_parameters() if bases.is_newborn(unet) else {}
    drawn = [name for name in names if any(parameter.startswith(f"{name}.") for parameter in created)]
    if drawn:
        raise ConfigError(
            f"adapter.targets: {len(drawn)} layers are drawn at random at each inflation of this image model, so that "
            f"their adapter would fit no other ({listing(drawn)}): train the model first and start from its export"
        )


def told(output: Path, result: Result, model: Any, config: str) -> tuple[dict[str, str], str]:
    """What a run's card says of its adapter, which is finished, and how to use it; arguments and errors of `finish`."""
    adapter = finish(output, result, model, config)
    return card.facts(adapter), card.use(adapter.about)


def finish(output: Path, result: Result, model: Any, config: str) -> Adapter:
    """Complete a run's exported adapter by what is known at its end, prove it in a new process, and write its card.

    `model` are the recipe's settings `model`. CheckpointError where what is loaded is not what was trained.
    """
    path = output / "export" / file.NAME
    adapter = file.read(path)
    starts = record.starts(output / record.NAME)
    known = {
        "config": config, "data": starts[-1]["data"]["digest"], "held_out": [_finite(row) for row in result.held_out],
        "hardware": ", ".join(starts[-1]["devices"]), "run": _cost(starts, result), "verified": None,
    }  # fmt: skip
    file.write(path, replace(adapter, about={**adapter.about, **known}), overwrite=True)
    verify.certify(path, adapter.about["family"], asdict(model))
    adapter, samples = file.read(path), output / SAMPLES
    if samples.is_file():
        shutil.copyfile(samples, path.with_name(card.SAMPLES))
    write_text(path.with_name(card.NAME), card.text(adapter, samples.is_file()))
    return adapter


def _cost(starts: Sequence[Mapping[str, Any]], result: Result) -> dict[str, Any]:
    """What a run took, over all of its starts that came to an end, as `card` tells it."""
    spans = [(one["started"], one["ended"]["at"]) for one in starts if one["ended"]]
    seconds = sum((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() for start, end in spans)
    return {
        "steps": result.step, "stopped": result.stopped, "processes": starts[-1]["processes"],
        "threads": torch.get_num_threads(), "seconds": seconds, "peak_memory": _peak_memory(result.peaks),
    }  # fmt: skip


def _peak_memory(peaks: Mapping[str, int]) -> int:
    """Bytes that this process had at most: of the GPU where there is one, else of the machine.

    A GPU's are the highest of its phases' `peaks`: its allocator has forgotten them, for it starts anew at each phase.
    """
    if torch.cuda.is_available():
        return max(peaks.values())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def refuse_beside(settings: AdapterSettings, setting: str, value: str) -> None:
    """ConfigError where a run has an adapter and another setting that says what learns."""
    if settings.kind != "none":
        raise ConfigError(
            f"{setting}={value} says what of the model learns, but beside an adapter it stays as it is: leave the "
            "setting at its default, or the adapter (adapter.kind=none)"
        )


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """Measurements as JSON can hold them."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
