"""What all recipes that train on clips do alike, before, during and after what is their own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from inflate import config as configuration
from inflate.adapters.settings import AdapterSettings
from inflate.data.clips import ClipDataset, collate
from inflate.data.settings import Data
from inflate.training import adapting
from inflate.training.adapting import Adapting
from inflate.training.card import write_card
from inflate.training.checkpoint import writing
from inflate.training.denoising import Denoising, Given
from inflate.training.held_out import first_clips
from inflate.training.inputs import check_inputs
from inflate.training.loop import Result, fit
from inflate.training.player import Task
from inflate.training.previews import compare_previews
from inflate.training.settings import Training

log = logging.getLogger(__name__)


class Config(Protocol):
    """The settings that all such recipes have."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    stage: Any
    model: Any
    data: Data
    training: Training
    adapter: AdapterSettings


def open_clips(config: Config, *models: str | None, adapter: str | None = None) -> tuple[ClipDataset, ClipDataset]:
    """The clips to train on and the held-out ones, checked, once `check_inputs` has no objection."""
    check_inputs(config.training, config.data, *models, adapter=adapter)
    log.info("checking the clips of %s", config.data.path)
    return ClipDataset(config.data, seed=config.training.seed), ClipDataset(config.data.evaluation(), shuffle=False)


def given_by(
    config: Config, settings: Denoising, dataset: ClipDataset, held_out: ClipDataset, adapter: Adapting | None
) -> Given:
    """What a run gives its task, whose own settings are `settings`."""
    lr, seed, batch = config.training.lr, config.training.seed, config.training.batch
    shown, known = first_clips(held_out, settings.held_out_clips), first_clips(dataset, settings.train_clips)
    return Given(shown, lr, seed, known, dataset.cache is not None, adapter, config.data.smallest_batch(batch))


def fit_clips(
    config: Config, task: Task, dataset: ClipDataset, held_out: ClipDataset, foreseen: Mapping[str, int] | None
) -> Result:
    """Train the task, as `fit` does; what became of each clip is kept, and `foreseen` peaks of memory are compared."""
    table = f"{dataset.preflight.table()}\n\nheld out\n{held_out.preflight.table()}\n"
    return fit(task, dataset, config.training, collate, configuration.dump(config), table, foreseen)


def conclude(config: Config, result: Result, title: str, use: str, facts: Mapping[str, str]) -> None:
    """Leave the before/after video and the card, under a title, with how to `use` the export and facts of the recipe's.

    An adapter is finished before, and the card tells of it and of its use instead.
    """
    output, settings = config.training.output, configuration.dump(config)
    with writing(output, output):
        last = output / "samples" / f"step-{result.step:06}"
        compare_previews(output / "samples" / "step-000000", last, output / "before_after")
        told = {
            "stage": config.stage, "starts from": config.model.path, "clips": config.data.path,
            "steps": f"{result.step} ({result.stopped})",
        }  # fmt: skip
        if config.adapter.kind != "none":
            exported, use = adapting.told(output, result, config.model, settings)
            told |= exported
        file = last / "scores.json"
        scores = json.loads(file.read_text()) if file.is_file() else {}
        write_card(output, title, {**told, **facts}, result.held_out, scores, settings, use)
