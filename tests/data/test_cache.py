"""What is encoded once: that samples of a cache are those of the files, and what makes an entry another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_files import busy, numbered
from PIL import Image
from torch import Tensor

from inflate.data import cache as module
from inflate.data import preflight
from inflate.data.cache import ClipCache, Filled, fill
from inflate.data.clips import ClipDataset, collate
from inflate.data.settings import Data
from inflate.data.sources import find_clips
from inflate.errors import ConfigError, DataError


class Means:
    """An encoder whose latents are the frames' channel means, and which counts what it is given."""

    reads_captions = False

    def __init__(self, weights: str = "1", captions: bool = False) -> None:
        self.identity, self.reads_captions = {"weights": weights}, captions
        self.frames, self.first = 0, 0

    def latents(self, pixels: Tensor) -> Tensor:
        self.frames += len(pixels)
        return pixels.mean(dim=(2, 3))  # (N, 3)

    def of_frames(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"frame_brightest": pixels.amax(dim=(2, 3))}

    def starts(self, pixels: Tensor, seeds: Sequence[str]) -> dict[str, Tensor]:
        self.first += len(pixels)
        draws = [int(hashlib.md5(seed.encode()).hexdigest()[:6], 16) for seed in seeds]
        return {"context": 2 * pixels.mean(dim=(2, 3)), "drawn": torch.tensor(draws)}

    def captions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        return {"caption_states": torch.tensor([[len(text)] for text in texts])}


@pytest.fixture
def folder(make_clip: Any, tmp_path: Path) -> Path:
    """Four clips of 9 to 12 frames, and an image."""
    for number in range(4):
        make_clip(f"clips/{number}.mp4", numbered(9 + number, 32, 32))
        (tmp_path / "clips" / f"{number}.txt").write_text(f"clip {number}" * number)
    Image.fromarray(numbered(3, 32, 32)[2]).save(tmp_path / "clips" / "still.png")
    return tmp_path / "clips"


def small(folder: Path, **changes: Any) -> Data:
    size = {"buckets": ["4x32x32", "1x32x32"]}
    quiet = {"captions": "optional", "seconds_per_clip": None, "cache": str(folder.parent / "cache")}
    return Data(**({"path": str(folder)} | size | quiet | changes))


def cached(settings: Data, encoder: Means) -> Filled:
    assert settings.cache is not None
    found = ClipCache(settings.cache)
    checked, _ = preflight.preflight(find_clips(settings), settings, None, found.probe, found.note)
    return fill(found, checked.used, settings, encoder)


WINDOWS: list[dict[str, Any]] = [
    {"window": "random"}, {"window": "chunk"}, {"window": "slide", "hop": 1}, {"window": "uniform"}, {"window": "full"},
    {"window": "random", "stride": 2}, {"window": "slide", "fps": 5.0}, {"window": "random", "fps": 5.0},
    {"window": "random", "stride_to": 3},
]  # fmt: skip


@pytest.mark.parametrize("changes", WINDOWS, ids=str)
def test_samples_of_a_cache_are_those_of_the_files(changes: dict[str, Any], folder: Path) -> None:
    settings, encoder = small(folder, **changes), Means()
    cached(settings, encoder)
    plain, encoded = ClipDataset(small(folder, **changes, cache=None), seed=3), ClipDataset(settings, seed=3)
    encoded.read_encoded(encoder, "first")
    assert len(plain) == len(encoded)
    for number in range(3 * len(plain)):
        ours, theirs = dict(encoded[number]), dict(plain[number])
        assert (ours["name"], ours["caption"], ours["fps"]) == (theirs["name"], theirs["caption"], theirs["fps"])
        assert torch.equal(ours["motion"], theirs["motion"])
        assert torch.equal(ours["latents"], theirs["pixels"].mean(dim=(2, 3)))
        assert torch.equal(ours["frame_brightest"], theirs["pixels"].amax(dim=(2, 3)))
        assert torch.equal(ours["stride"], theirs["stride"])
        assert torch.equal(ours["first"], theirs["pixels"][0])
        assert torch.equal(ours["context"], 2 * theirs["pixels"][0].mean(dim=(1, 2)))
    assert np.array_equal(encoded.motion_scores(), plain.motion_scores())
    assert [encoded.numbers(step, 2, 1) for step in range(9)] == [plain.numbers(step, 2, 1) for step in range(9)]


MIXTURES: list[dict[str, Any]] = [
    {"buckets": ["8x32x32@8fps:5", "4x32x32@4fps:1", "2x16x16@8fps:1", "1x32x32:1"]},
    {"buckets": ["4x32x32:1", "4x16x16:2", "1x16x16:1"], "window": "slide", "hop": 1},
    {"buckets": ["3x32x32@4fps:1", "3x32x32@8fps:1", "1x32x32:1"], "stride_to": 2},
]


@pytest.mark.parametrize("changes", MIXTURES, ids=str)
def test_samples_of_a_mixture_are_those_of_the_files(changes: dict[str, Any], folder: Path) -> None:
    settings, encoder = small(folder, **changes), Means()
    done = cached(settings, encoder)
    plain, encoded = ClipDataset(small(folder, **changes, cache=None), seed=3), ClipDataset(settings, seed=3)
    encoded.read_encoded(encoder, "first")
    lengths = set()
    for number in range(3 * len(plain)):
        ours, theirs = dict(encoded[number]), dict(plain[number])
        lengths.add(ours["latents"].shape[0])
        assert (ours["name"], ours["fps"]) == (theirs["name"], theirs["fps"])
        assert torch.equal(ours["motion"], theirs["motion"])
        assert torch.equal(ours["latents"], theirs["pixels"].mean(dim=(2, 3)))
        assert torch.equal(ours["first"], theirs["pixels"][0])
        assert torch.equal(ours["context"], 2 * theirs["pixels"][0].mean(dim=(1, 2)))
    assert lengths == {bucket.frames for bucket in settings.sizes}
    assert np.array_equal(encoded.motion_scores(), plain.motion_scores())
    assert [encoded.numbers(step, 2, 1) for step in range(9)] == [plain.numbers(step, 2, 1) for step in range(9)]
    assert cached(settings, Means()).found == done.made == sum(len(module.by_size(row)) for row in encoded.rows)


def test_buckets_of_one_size_share_what_is_encoded(folder: Path) -> None:
    encoder = Means()
    done = cached(small(folder, buckets=["8x32x32@8fps:5", "4x32x32@4fps:1", "1x32x32:1"]), encoder)
    assert (done.made, encoder.frames) == (5, 9 + 10 + 11 + 12 + 1)


def test_a_bucket_that_is_added_to_a_mixture_is_missed_in_its_cache(folder: Path) -> None:
    cached(small(folder, buckets=["8x32x32@8fps:5", "1x32x32:1"]), Means())
    dataset = ClipDataset(small(folder, buckets=["8x32x32@8fps:5", "1x32x32:1", "4x16x16:1"]))
    with pytest.raises(DataError, match=r"4 of 5 clips are not in it\n.*: encoded for other windows, sizes"):
        dataset.read_encoded(Means(), "none")


def test_windows_that_begin_with_one_held_frame_each_have_their_own_motion(make_clip: Any, tmp_path: Path) -> None:
    """Frame 3 stays for 0.8 s, and several windows of even time begin while it does."""
    stamps = [0, 100, 200, 300, *range(1100, 2100, 100)]
    frames = np.stack([np.roll(busy(1, 32, 32)[0], 3 * number**2, axis=1) for number in range(len(stamps))])
    make_clip("clips/held.mkv", frames, fps=10, stamps=stamps)
    changes: dict[str, Any] = {"window": "slide", "hop": 2, "fps": 10.0, "buckets": ["8x32x32"]}
    settings, plain = (small(tmp_path / "clips", **changes, **cache) for cache in ({}, {"cache": None}))
    cached(settings, Means())
    forwards, backwards, encoded = (ClipDataset(one, shuffle=False) for one in (plain, plain, settings))
    encoded.read_encoded(Means(), "none")
    assert [window.starts[0] for _, window in forwards.windows].count(3) == 4
    motion = [float(encoded[number]["motion"]) for number in range(len(encoded))]
    assert len(set(motion)) == len(motion)
    assert [float(forwards[number]["motion"]) for number in range(len(forwards))] == motion
    assert [float(backwards[number]["motion"]) for number in reversed(range(len(backwards)))] == motion[::-1]


def test_each_frame_is_encoded_once_however_many_windows_show_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 5)
    encoder = Means()
    done = cached(small(folder, window="slide", hop=1), encoder)
    assert (done.made, done.found, done.frames) == (5, 0, 9 + 10 + 11 + 12 + 1)
    assert encoder.frames == done.frames
    assert encoder.first == 6 + 7 + 8 + 9 + 1


def test_nothing_is_encoded_or_decoded_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(folder)
    cached(settings, Means())
    monkeypatch.setattr(preflight, "scan", lambda *_: pytest.fail("a known file is decoded"))
    again = Means()
    done = cached(settings, again)
    assert (done.made, done.found, again.frames) == (0, 5, 0)
    dataset = ClipDataset(settings)
    dataset.read_encoded(again, "none")
    assert "pixels" not in dataset[0]
    assert "first" not in dataset[0]


def test_a_changed_file_invalidates_its_entry_alone(folder: Path, make_clip: Any) -> None:
    settings = small(folder)
    cached(settings, Means())
    make_clip("clips/2.mp4", numbered(11, 32, 32)[::-1])
    dataset = ClipDataset(settings)
    with pytest.raises(DataError, match=r"1 of 5 clips are not in it\n2.mp4: its file is new, or has changed\nrun `i"):
        dataset.read_encoded(Means(), "none")
    done = cached(settings, Means())
    assert (done.made, done.found) == (1, 4)


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"buckets": ["5x32x32", "1x32x32"]}, 4), ({"buckets": ["4x16x16", "1x32x32"]}, 4),
        ({"buckets": ["4x32x32", "1x16x16"]}, 1), ({"window": "chunk"}, 4), ({"stride": 2}, 4), ({"fps": 5.0}, 4),
        ({"max_dropped": 0.5, "memory_megabytes": 0}, 0),
    ],
)  # fmt: skip
def test_another_window_or_size_invalidates_exactly_what_it_changes(
    changes: dict[str, Any], made: int, folder: Path
) -> None:
    cached(small(folder), Means())
    dataset = ClipDataset(small(folder, **changes))
    if made:
        with pytest.raises(DataError, match=rf"{made} of 5 clips are not in it\n.*: encoded for other windows, sizes"):
            dataset.read_encoded(Means(), "none")
    done = cached(small(folder, **changes), Means())
    assert (done.made, done.found) == (made, 5 - made)
    assert cached(small(folder), Means()).made == 0, "the former entries are still there"


def test_other_weights_invalidate_all_and_other_captions_only_where_they_are_read(folder: Path) -> None:
    settings = small(folder)
    cached(settings, Means())
    assert cached(settings, Means("2")).made == 5
    assert cached(settings, Means(captions=True)).made == 5
    (folder / "1.txt").write_text("another")
    assert cached(settings, Means()).made == 0
    assert cached(settings, Means(captions=True)).made == 1
    dataset = ClipDataset(settings, shuffle=False)
    dataset.read_encoded(Means(captions=True), "none")
    assert [int(dict(dataset[number])["caption_states"]) for number in (0, 1)] == [0, 7]


def test_what_is_random_follows_from_the_clip_and_its_frame(folder: Path, tmp_path: Path) -> None:
    kept = []
    for place in ("cache", "elsewhere"):
        settings = small(folder, cache=str(tmp_path / place))
        cached(settings, Means())
        dataset = ClipDataset(settings, shuffle=False)
        dataset.read_encoded(Means(), "none")
        kept.append([int(dict(dataset[number])["drawn"]) for number in range(len(dataset))])
    assert kept[0] == kept[1]
    assert len(set(kept[0])) == len(kept[0])


def test_an_interrupted_filling_keeps_what_was_done(folder: Path) -> None:
    class Interrupted(Means):
        def latents(self, pixels: Tensor) -> Tensor:
            if self.frames > 20:
                raise KeyboardInterrupt
            return super().latents(pixels)

    with pytest.raises(KeyboardInterrupt):
        cached(small(folder), Interrupted())
    done = cached(small(folder), Means())
    assert done.found == 3
    assert done.made == 2


def test_batches_of_a_cache_stack_what_the_encoder_named(folder: Path) -> None:
    settings = small(folder, max_dropped=0.5)
    cached(settings, Means())
    dataset = ClipDataset(settings, shuffle=False)
    dataset.read_encoded(Means(), "all")
    batch = collate([dataset[0], dataset[1]])
    assert batch["latents"].shape == (2, 4, 3)
    assert batch["pixels"].shape == (2, 4, 3, 32, 32)
    assert batch["name"] == ["0.mp4", "1.mp4"]


def test_a_damaged_clip_is_dropped_as_without_a_cache(folder: Path, make_clip: Any) -> None:
    torn = make_clip("clips/torn.mp4", busy(12))
    torn.write_bytes(torn.read_bytes()[:4000])
    settings = small(folder, max_dropped=0.5)
    assert cached(settings, Means()).made == 5
    dataset = ClipDataset(settings)
    dataset.read_encoded(Means(), "none")
    assert [row.clip.name for row in dataset.preflight.dropped] == ["torn.mp4"]


def test_a_file_is_read_again_only_if_its_time_or_size_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = small(folder)
    cached(settings, Means())
    (folder / "1.mp4").touch()
    read: list[str] = []
    real = module._hash
    monkeypatch.setattr(module, "_hash", lambda media: read.append(Path(str(media)).name) or real(media))
    dataset = ClipDataset(settings)
    dataset.read_encoded(Means(), "none")
    assert read == ["1.mp4"]


@pytest.mark.parametrize("made", [True, False])
def test_a_cache_that_holds_nothing_is_told_before_any_clip_is_decoded(
    made: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "scan", lambda *_: pytest.fail("a clip is decoded"))
    if made:
        (folder.parent / "cache").mkdir()
    with pytest.raises(DataError, match="holds no encoded clips" if made else "is no folder"):
        ClipDataset(small(folder))


def test_reading_a_cache_needs_its_setting(folder: Path) -> None:
    with pytest.raises(DataError, match=r"data\.cache names no folder"):
        ClipDataset(small(folder, cache=None)).read_encoded(Means(), "none")


@pytest.mark.parametrize("wrong", [{"cache_draws": 2}, {"cache_dtype": "float16"}])
def test_settings_of_a_cache_need_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"are for data\.cache, which is null"):
        Data(**wrong)
    settings = Data(**wrong, cache="cache", held_out="held_out").evaluation()
    assert (settings.cache, settings.cache_draws, settings.cache_dtype) == (None, 0, "float32")


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(
    folder: Path, make_clip: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, real = small(folder), module._hash

    def slow(media: Any) -> str:
        found = real(media)
        if str(media).endswith("1.mp4"):
            make_clip("clips/1.mp4", numbered(10, 32, 32)[::-1])
        return found

    monkeypatch.setattr(module, "_hash", slow)
    with pytest.raises(DataError, match=r"1\.mp4: changed while the cache was filled; start again"):
        cached(settings, Means())
    monkeypatch.setattr(module, "_hash", real)
    encoder = Means()
    cached(settings, encoder)
    dataset = ClipDataset(settings, shuffle=False)
    dataset.read_encoded(encoder, "all")
    for number in range(len(dataset)):
        item = dict(dataset[number])
        assert torch.equal(item["latents"], item["pixels"].mean(dim=(2, 3))), item["name"]


def test_a_file_changed_at_equal_size_and_time_is_found_where_nothing_is_trusted(folder: Path) -> None:
    settings = small(folder)
    cached(settings, Means())
    still = folder / "still.png"
    found = still.stat()
    content = bytearray(still.read_bytes())
    content[-1] ^= 1
    still.write_bytes(bytes(content))
    os.utime(still, ns=(found.st_atime_ns, found.st_mtime_ns))
    clip = next(clip for clip in find_clips(settings) if clip.name == "still.png")
    assert ClipCache(settings.cache or "").holds_file(clip)
    doubting = ClipCache(settings.cache or "", trusting=False)
    assert not doubting.holds_file(clip)
