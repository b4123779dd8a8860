"""Which clips to train on and how to cut windows out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from inflate.errors import ConfigError


@dataclass
class Data:
    """Clips and the windows of frames taken from them."""

    path: str = "datasets/demo"
    """Folder of clips, metadata file (jsonl, csv, parquet), or name of a Hugging Face dataset."""
    source: Literal["folder", "huggingface"] = "folder"
    """Where `path` points."""
    split: str | None = None
    """Sub-folder, or split of a Hugging Face dataset, to train on; null for the folder itself."""
    held_out: str | None = None
    """Sub-folder or split kept for evaluation; null for none."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face dataset."""
    video_column: str | None = None
    """Metadata column with the video; null finds video, video_path, file_path, file_name, path or media_path."""
    caption_column: str | None = None
    """Metadata column with the caption; null finds caption, text, prompt or cap."""
    captions: Literal["required", "optional"] = "required"
    """Whether a clip without a caption is an error, or has the empty caption."""
    frames: int = 14
    """Frames per window."""
    height: int = 576
    """Pixels; clips are scaled to cover height and width with their aspect kept, then cropped about the centre."""
    width: int = 1024
    """Pixels."""
    fps: float | None = None
    """Frames per second that clips are resampled to, by time stamps; null keeps each clip's own rate."""
    stride: int = 1
    """Take every n-th frame (of the resampled clip): the model is told fps / stride."""
    window: Literal["random", "centre"] = "random"
    """Where in a clip the window lies; random is drawn anew for each sample."""
    max_dropped: float = 0.1
    """Largest share of clips, 0 to 1, that may be unusable (unreadable, too short or slow) before a run is refused."""
    cache_megabytes: int = 1024
    """Memory for decoded clips at their final size, filled while they are checked; 0 decodes anew for each sample."""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "stride"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}: must be 1 or more, not {getattr(self, name)}")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"data.fps: must be a positive number or null, not {self.fps}")
        if not 0 <= self.max_dropped <= 1:
            raise ConfigError(f"data.max_dropped: a share from 0 to 1, not {self.max_dropped}")
        if self.cache_megabytes < 0:
            raise ConfigError(f"data.cache_megabytes: must be 0 or more, not {self.cache_megabytes}")

    def evaluation(self) -> Data:
        """The same settings for the held-out clips: fixed windows from the centre. Raises ConfigError without any."""
        if self.held_out is None:
            raise ConfigError("data.held_out: names no clips to evaluate on; give a sub-folder or split")
        return replace(self, split=self.held_out, window="centre")
