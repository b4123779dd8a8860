"""Which clips to train on and how to cut windows out of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from inflate.data.buckets import Bucket, parse_buckets
from inflate.errors import ConfigError

WINDOWED = ("random", "chunk", "slide")
"""Ways of sampling that take more than one window of a clip, in an epoch or over epochs."""


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
    buckets: list[str] = field(default_factory=list)
    """Sizes to train in, as FxHxW (14x576x1024) or WxH@F (1024x576@14); they replace frames, height and width. A clip
    goes to the nearest aspect, then to the most frames that it fills; images go to buckets of one frame. A bucket may
    have a rate of its own in place of data.fps (14x576x1024@8fps), and all may have a share of the optimiser steps
    (32x256x448@16fps:5): a clip then serves in every bucket that it fills, single frames of videos as images."""
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
    stride_to: int | None = None
    """Each sample's stride is drawn anew, from data.stride to this, as far as its clip is long enough: the model learns
    rates of its own clips; for data.window=random. Null: all have data.stride."""
    window: Literal["head", "centre", "chunk", "slide", "uniform", "full", "random"] = "random"
    """Windows of a clip. head: the first; centre: the middle one; random: one drawn anew in each epoch; chunk: all, end
    to end; slide: all, overlapping by data.hop; uniform: one whose frames are spread over the clip, so that the model
    is told a lower rate; full: the whole clip, as far as a bucket is long."""
    hop: int | None = None
    """Frames from one window of slide to the next; null for half a window."""
    tokens: int | None = None
    """Budget of latent positions (frames * height * width / 64) per process and forward pass: the clips of a batch are
    as many as fit, at least one, instead of training.batch; null for training.batch in every bucket."""
    max_dropped: float = 0.1
    """Largest share of clips, 0 to 1, that may be unusable (unreadable, too short or slow, an image without a bucket)
    before a run is refused."""
    seconds_per_clip: float | None = 120.0
    """Longest time to check one clip, in a helper process that it may crash; null checks in the training process."""
    memory_megabytes: int = 1024
    """Memory for decoded clips at their final size, filled while they are checked; 0, or a cache, decodes anew for each
    sample."""
    cache: str | None = None
    """Folder of encoded clips that `inflate data cache` has filled, which training then reads; null encodes the clips
    in every step."""
    cache_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of what is cached; float32 trains as without a cache."""
    cache_draws: int = 0
    """Noised condition frames that are cached of each window's first frame, of which every sample takes one; 0 noises
    and encodes that frame anew in each step, as without a cache."""

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "stride", "stride_to", "hop", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}: must be 1 or more, not {value}")
        if self.seconds_per_clip is not None and not self.seconds_per_clip > 0:
            raise ConfigError(f"data.seconds_per_clip: must be positive, or null, not {self.seconds_per_clip}")
        if self.cache is None and (self.cache_draws or self.cache_dtype != "float32"):
            raise ConfigError(
                "data.cache_draws and data.cache_dtype are for data.cache, which is null: name its folder"
            )
        parse_buckets(self.buckets)
        self._check_window()
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ConfigError(f"data.fps: must be a positive number or null, not {self.fps}")
        if not 0 <= self.max_dropped <= 1:
            raise ConfigError(f"data.max_dropped: a share from 0 to 1, not {self.max_dropped}")
        for name in ("memory_megabytes", "cache_draws"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.{name}: must be 0 or more, not {getattr(self, name)}")

    def _check_window(self) -> None:
        """Raise ConfigError for a setting that the way of sampling would ignore."""
        if self.hop is not None and self.window != "slide":
            raise ConfigError(f"data.hop: is for data.window=slide, not {self.window}; set it to null")
        if self.stride_to is not None and (self.window != "random" or self.stride_to < self.stride):
            raise ConfigError(
                f"data.stride_to: strides are drawn from data.stride ({self.stride}) up to it, for data.window=random, "
                f"not {self.window}; set it to null"
            )
        if self.window == "uniform" and (self.fps is not None or self.stride != 1):
            raise ConfigError(
                "data.window=uniform spreads the frames over each clip: data.fps must be null and data.stride 1"
            )
        if self.window == "uniform" and any(bucket.fps for bucket in self.sizes):
            raise ConfigError(
                "data.window=uniform spreads the frames over each clip: leave the rates out of data.buckets"
            )

    @property
    def sizes(self) -> tuple[Bucket, ...]:
        """The buckets; without `buckets` the one of frames, height and width."""
        return parse_buckets(self.buckets) or (Bucket(self.frames, self.height, self.width),)

    def rate(self, bucket: Bucket) -> float | None:
        """Frames per second that clips are resampled to in a bucket; None for each clip's own."""
        return None if bucket.is_still else bucket.fps or self.fps

    @property
    def main(self) -> Bucket:
        """The size that an export remembers: the first bucket of two or more frames, else the first; in a mixture the
        first of those with the largest share."""
        longer = [bucket for bucket in self.sizes if bucket.frames > 1]
        return max(longer or self.sizes, key=lambda bucket: bucket.share or 0)

    def batch(self, bucket: Bucket, asked: int) -> int:
        """Clips of a bucket in one forward pass: as `asked`, where `tokens` does not say."""
        return asked if self.tokens is None else bucket.batch(self.tokens)

    def smallest_batch(self, asked: int) -> int:
        """Clips in the smallest forward pass of any bucket."""
        return min(self.batch(bucket, asked) for bucket in self.sizes)

    def evaluation(self) -> Data:
        """The same settings for the held-out clips, with one fixed window each: the centre's, where there are several.

        Buckets have no shares there: each clip is in one, that of most frames. They are not cached: previews compare
        pixels.

        Raises ConfigError without any held-out clips.
        """
        if self.held_out is None:
            raise ConfigError("data.held_out: names no clips to evaluate on; give a sub-folder or split")
        window = "centre" if self.window in WINDOWED else self.window
        buckets = [str(replace(bucket, share=None)) for bucket in parse_buckets(self.buckets)]
        return replace(
            self, split=self.held_out, window=window, hop=None, stride_to=None, cache=None, cache_draws=0,
            cache_dtype="float32", buckets=buckets,
        )  # fmt: skip
