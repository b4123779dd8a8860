"""What a recipe checks before anything slow begins."""

from __future__ import annotations

from inflate.adapters import file
from inflate.adapters.settings import Weighted
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.errors import ConfigError
from inflate.models.folders import check_place
from inflate.training.attention import check_attention
from inflate.training.loop import check_output
from inflate.training.processes import join_processes, together
from inflate.training.settings import Training


def check_inputs(training: Training, data: Data, *models: str | None, adapter: str | None = None) -> None:
    """Raise the error of an output, a model's place, an adapter's or a list of clips that cannot be used.

    No clip is decoded, and no tensor is read. Every process calls it.
    """
    with together():
        if join_processes().is_main_process:
            check_output(training)
            check_attention(training, join_processes().device)
        for place in filter(None, models):
            check_place(place)
        if adapter is not None:
            file.read_header(Weighted.parse(adapter).path)
        find_clips(data)
        find_clips(data.evaluation())


def refuse_draws(data: Data, stage: str) -> None:
    """Raise ConfigError where noised condition frames are to be cached for a stage that has none."""
    if data.cache_draws:
        raise ConfigError(f"data.cache_draws: stage={stage} has no noised condition frame; set it to 0")
