"""Windows, preflight and samples."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from clip_files import busy, cut, damage, numbered
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from inflate.data import clips, isolation, preflight, video
from inflate.data.clips import ClipDataset, Data, collate
from inflate.data.preflight import Decoded
from inflate.data.sources import Clip, find_clips
from inflate.errors import ConfigError, DataError


@pytest.fixture
def folder(make_clip, tmp_path):
    """Six numbered clips of 8 to 13 frames at 8 per second."""
    for number in range(6):
        make_clip(f"clips/{number}.mp4", numbered(8 + number, 32, 32))
        (tmp_path / "clips" / f"{number}.txt").write_text(f"clip {number}")
    return tmp_path / "clips"


real = Decoded


def small(path, **changes):
    """Windows of 4 frames, checked in this process: a helper process takes seconds to start on a busy machine."""
    size = {"frames": 4, "height": 32, "width": 32}
    return Data(**({"path": str(path), "captions": "optional", "seconds_per_clip": None} | size | changes))


def shown(item):
    """The frame numbers that `numbered` painted."""
    levels = (item["pixels"].mean(dim=(1, 2, 3)) + 1) * 127.5
    return [round((float(level) - 16) / 8) for level in levels]


def rows_of(path, **changes):
    settings = small(path, **changes)
    return preflight.preflight(find_clips(settings), settings)[0]


# ---------------------------------------------------------------------------------------------------- samples


def test_an_item_is_what_the_loop_expects(folder):
    item = ClipDataset(small(folder), shuffle=False)[1]
    assert item["pixels"].shape == (4, 3, 32, 32)
    assert item["pixels"].dtype == torch.float32
    assert item["pixels"].is_contiguous()
    assert float(item["pixels"].min()) >= -1
    assert (item["caption"], item["name"], int(item["number"])) == ("clip 1", "1.mp4", 1)
    assert float(item["fps"]) == pytest.approx(8)
    assert float(item["motion"]) == 0  # flat frames show no motion


def test_pixels_run_from_minus_one_to_one(make_clip, tmp_path):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[2:] = 255
    make_clip("clips/a.mp4", frames)
    pixels = ClipDataset(small(tmp_path / "clips"))[0]["pixels"]
    assert float(pixels[0].mean()) == pytest.approx(-1, abs=0.01)
    assert float(pixels[3].mean()) == pytest.approx(1, abs=0.01)


def test_an_item_tells_where_its_pixels_come_from(make_clip, tmp_path):
    whole = video.read(make_clip("clips/0.mp4", busy(8, 48, 64)))
    item = ClipDataset(small(tmp_path / "clips", height=48, window="head"), shuffle=False)[0]
    height, width, top, left = item["origin"].tolist()
    assert (height, width) == whole.shape[1:3]
    cut_out = torch.from_numpy(whole[:4, top : top + 48, left : left + 32]).permute(0, 3, 1, 2)
    torch.testing.assert_close((item["pixels"] + 1) * 127.5, cut_out.float(), atol=1e-3, rtol=0)
    scaled = ClipDataset(small(tmp_path / "clips", height=24, width=24), shuffle=False)[0]
    assert scaled["origin"].tolist() == [48, 64, 0, 4]


def test_a_sample_depends_on_seed_and_number_alone(folder):
    first, second = ClipDataset(small(folder), seed=3), ClipDataset(small(folder), seed=3)
    order = [17, 2, 40, 3]
    alone = {n: first[n] for n in order}
    for n in sorted(order):
        other = second[n]
        assert other["name"] == alone[n]["name"]
        assert torch.equal(other["pixels"], alone[n]["pixels"])


def test_the_seed_changes_order_and_windows(folder):
    def drawn(seed):
        dataset = ClipDataset(small(folder), seed=seed)
        return [(dataset[n]["name"], shown(dataset[n])[0]) for n in range(18)]

    assert drawn(0) != drawn(1)


def test_each_epoch_visits_every_clip_once_in_a_new_order(folder):
    dataset = ClipDataset(small(folder), seed=1)
    epochs = [[dataset[6 * e + k]["name"] for k in range(6)] for e in range(3)]
    assert all(sorted(names) == [f"{n}.mp4" for n in range(6)] for names in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [item["name"] for item in dataset] == epochs[0]


def test_without_shuffling_the_order_is_the_folders(folder):
    dataset = ClipDataset(small(folder), shuffle=False)
    assert [dataset[n]["name"] for n in range(8)] == [f"{n % 6}.mp4" for n in range(8)]


def test_random_windows_reach_every_start_and_only_those(folder):
    dataset = ClipDataset(small(folder), shuffle=False)
    starts = {shown(dataset[6 * k])[0] for k in range(60)}  # clip 0: 8 frames, windows of 4
    assert starts == {0, 1, 2, 3, 4}


def test_the_centre_window_is_fixed(folder):
    dataset = ClipDataset(small(folder, window="centre"), shuffle=False)
    assert shown(dataset[0]) == [2, 3, 4, 5]
    assert shown(dataset[6]) == [2, 3, 4, 5]


def test_decoded_clips_in_memory_change_nothing(folder):
    cached, fresh = ClipDataset(small(folder)), ClipDataset(small(folder, memory_megabytes=0))
    assert len(cached._decoded.frames) == 6
    assert len(fresh._decoded.frames) == 0
    for n in range(6):
        assert torch.equal(cached[n]["pixels"], fresh[n]["pixels"])


def test_each_clip_is_decoded_once_and_then_read_from_memory(folder, monkeypatch):
    opened = []
    original = video._opened
    monkeypatch.setattr(video, "_opened", lambda media: (opened.append(media), original(media))[1])
    dataset = ClipDataset(small(folder))
    assert len(opened) == 6
    for n in range(20):
        dataset[n]
    assert len(opened) == 6


def test_decoded_clips_stop_at_their_limit(folder, monkeypatch):
    settings = small(folder)
    monkeypatch.setattr(preflight, "Decoded", lambda limit: real(min(limit, 70_000)))
    dataset = ClipDataset(settings)
    assert 0 < sum(frames.nbytes for frames in dataset._decoded.frames.values()) <= 70_000
    assert shown(dataset[0])  # the others are read from their files


def test_few_decoded_clips_wait_behind_a_slow_one(monkeypatch):
    begun, behind = [], []

    def check(clip, settings, room, helpers, known):
        begun.append(clip)
        if clip.name == "0":
            time.sleep(0.3)
            behind.extend(begun)
        return preflight.Checked(clip, None, (), "not decoded"), None

    monkeypatch.setattr(preflight, "_checked", check)
    monkeypatch.setattr(isolation.os, "cpu_count", lambda: 4)
    found = [Clip(Path("x.mp4"), "", str(number)) for number in range(40)]
    checked, _ = preflight.preflight(found, small("anywhere"))
    assert [row.clip.name for row in checked.rows] == [str(number) for number in range(40)]
    assert 1 < len(behind) <= 8


def test_scores_are_of_the_centre_windows(make_clip, tmp_path):
    make_clip("clips/still.mp4", numbered(6, 32, 32))
    make_clip("clips/wild.mp4", busy(6))
    scores = ClipDataset(small(tmp_path / "clips")).motion_scores()
    assert scores.shape == (2,)
    assert scores[0] == 0
    assert scores[1] > 0.01


def test_a_clip_that_vanishes_is_named(folder):
    dataset = ClipDataset(small(folder, memory_megabytes=0), shuffle=False)
    (folder / "2.mp4").unlink()
    with pytest.raises(DataError, match=r"2\.mp4: no such file"):
        dataset[2]


def test_negative_numbers_are_refused(folder):
    with pytest.raises(DataError, match="sample numbers start at 0"):
        ClipDataset(small(folder))[-1]


# ---------------------------------------------------------------------------------------------------- loader


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_where_it_stopped(folder, workers):
    dataset = ClipDataset(small(folder), seed=5)

    def load(start, stop, count):
        loader = DataLoader(dataset, batch_size=2, sampler=range(start, stop), collate_fn=collate, num_workers=count)
        return list(loader)

    whole, tail = load(0, 8, 0), load(4, 8, workers)
    assert [batch["number"].tolist() for batch in tail] == [[4, 5], [6, 7]]
    for one, two in zip(whole[2:], tail, strict=True):
        assert torch.equal(one["pixels"], two["pixels"])
        assert one["name"] == two["name"]
    assert whole[0]["pixels"].shape == (2, 4, 3, 32, 32)
    assert {key: tuple(whole[0][key].shape) for key in ("fps", "motion", "number")} == dict.fromkeys(
        ("fps", "motion", "number"), (2,)
    )
    assert whole[0]["number"].dtype == torch.int64
    assert len(whole[0]["caption"]) == 2


def test_a_pickled_dataset_gives_the_same_samples_without_decoded_clips(folder):
    dataset = ClipDataset(small(folder), seed=2)
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy._decoded.frames) == 0
    assert torch.equal(copy[9]["pixels"], dataset[9]["pixels"])


# ---------------------------------------------------------------------------------------------------- windows


def test_stride_skips_frames_and_halves_the_rate(folder):
    dataset = ClipDataset(small(folder, stride=2, window="centre"), shuffle=False)
    assert shown(dataset[1]) == [1, 3, 5, 7]
    assert float(dataset[1]["fps"]) == pytest.approx(4)


def test_a_stride_is_drawn_for_each_sample_and_told(folder):
    items = [ClipDataset(small(folder, stride_to=2))[number] for number in range(20)]
    assert {(float(item["stride"]), float(item["fps"])) for item in items} == {(1.0, 8.0), (2.0, 4.0)}
    assert all({*np.diff(shown(item))} == {float(item["stride"])} for item in items)
    again = ClipDataset(small(folder, stride_to=2))
    assert [again[number]["stride"] for number in range(20)] == [item["stride"] for item in items]


def test_clips_are_resampled_to_the_asked_rate(make_clip, tmp_path):
    make_clip("clips/a.mp4", numbered(20, 32, 32), fps=24)
    dataset = ClipDataset(small(tmp_path / "clips", fps=8, window="centre"))
    assert shown(dataset[0]) == [5, 8, 11, 14]
    assert float(dataset[0]["fps"]) == pytest.approx(8)


def test_rates_that_do_not_divide_go_by_time(make_clip, tmp_path):
    make_clip("clips/a.mp4", numbered(16, 32, 32), fps=10)
    dataset = ClipDataset(small(tmp_path / "clips", fps=8, frames=12, window="centre"))
    times = (np.array(shown(dataset[0])) - shown(dataset[0])[0]) / 10
    assert np.abs(times - np.arange(12) / 8).max() <= 0.1  # never more than a frame old


def test_variable_rate_windows_are_even_in_time(make_clip, tmp_path):
    stamps = [0, 100, 200, 300, 400, 800, 900, 1000, 1100, 1200]  # frame 4 stays on screen
    make_clip("clips/a.mkv", numbered(10, 32, 32), fps=10, stamps=stamps)
    dataset = ClipDataset(small(tmp_path / "clips", fps=10, frames=13))
    assert shown(dataset[0]) == [0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8, 9]


def test_a_clip_of_exactly_the_window_is_used(folder):
    table = rows_of(folder, frames=8)
    assert [len(row.windows[0].starts) for row in table.rows] == [1, 2, 3, 4, 5, 6]
    table = rows_of(folder, frames=8, fps=8.0)
    assert [len(row.windows[0].starts) for row in table.rows] == [1, 2, 3, 4, 5, 6]


def test_nearly_equal_rates_are_taken_as_equal(make_clip, tmp_path):
    make_clip("clips/a.mp4", numbered(12, 32, 32), fps=24_000 / 1001)
    table = rows_of(tmp_path / "clips", fps=24.0, frames=12)
    assert table.rows[0].reason == ""


# ---------------------------------------------------------------------------------------------------- buckets


@pytest.fixture
def several(make_clip, tmp_path):
    """Five wide clips, three tall ones, two images; in the order of their names the kinds alternate."""
    for number in range(5):
        make_clip(f"clips/{number}-wide.mp4", numbered(8 + number, 32, 64))
    for number in range(3):
        make_clip(f"clips/{number}-tall.mp4", numbered(8, 64, 32))
    for number in range(2):
        Image.fromarray(numbered(1, 32, 64)[0]).save(tmp_path / "clips" / f"{number}-still.png")
    return tmp_path / "clips"


BUCKETS = ["6x32x64", "4x64x32", "1x32x64"]


def in_buckets(path, seed=0, **changes):
    return ClipDataset(small(path, **({"buckets": BUCKETS} | changes)), seed=seed)


def test_every_clip_has_its_bucket_and_the_summary_counts_them(several):
    dataset = in_buckets(several, tokens=6 * 32)
    assert dataset.preflight.summary().splitlines() == [
        "10 clips: 10 used with 10 windows, 0 dropped",
        "bucket 6x32x64: 5 windows of 5 clips, 1 in a batch",
        "bucket 4x64x32: 3 windows of 3 clips, 1 in a batch",
        "bucket 1x32x64: 2 windows of 2 clips, 6 in a batch",
    ]
    sizes = {item["name"].split("-")[1]: tuple(item["pixels"].shape) for item in dataset}
    assert sizes == {"wide.mp4": (6, 3, 32, 64), "tall.mp4": (4, 3, 64, 32), "still.png": (1, 3, 32, 64)}


def test_a_step_takes_one_bucket_and_an_epoch_every_window(several):
    dataset = in_buckets(several, seed=4)
    seen = Counter()
    for step in range(10):  # 5 + 3 + 2 steps of one sample
        [number] = dataset.numbers(step, 1, 1)
        seen[dataset[number]["name"]] += 1
    assert sorted(seen.values()) == [1] * 10
    for step in range(40):
        batch = collate([dataset[number] for number in dataset.numbers(step, 2, 2)])
        assert batch["pixels"].shape[0] == 4
        assert len({name.split("-")[1] for name in batch["name"]}) == 1


def test_each_pass_over_a_bucket_is_in_an_order_of_its_own(several):
    dataset = in_buckets(several, seed=1)
    wide = [n for step in range(60) for n in dataset.numbers(step, 2, 1) if "wide" in dataset[n]["name"]]
    passes = [[dataset[n]["name"] for n in wide[first : first + 5]] for first in range(0, 50, 5)]
    assert all(len(set(names)) == 5 for names in passes)
    assert len({tuple(names) for names in passes}) > 5
    assert len(set(wide)) == len(wide)  # and so no noise is drawn twice


def test_lanes_and_batches_are_interchangeable(several):
    dataset = in_buckets(several)
    for step in range(30):
        assert dataset.numbers(step, 4, 1) == dataset.numbers(step, 2, 2) == dataset.numbers(step, 1, 4)


def test_tokens_decide_the_batch_of_each_bucket(several):
    dataset = in_buckets(several, tokens=2 * 6 * 32)
    sizes = {len(dataset.numbers(step, 3, 7)) for step in range(30)}
    assert sizes == {3 * 2, 3 * 3, 3 * 12}


def test_one_bucket_is_taken_in_turn(folder):
    dataset = ClipDataset(small(folder))
    assert [dataset.numbers(step, 2, 2) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_chunks_are_samples_of_their_own(folder):
    dataset = ClipDataset(small(folder, window="chunk"), shuffle=False)
    assert len(dataset) == 2 + 2 + 2 + 2 + 3 + 3
    assert [shown(dataset[n]) for n in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    table = dataset.preflight.table().splitlines()
    assert table[3].endswith("used: frames 0-3 at 8 fps")
    assert table[4].endswith("used: frames 4-7 at 8 fps; 1 left over")


def test_motion_scores_leave_images_out(several):
    dataset = in_buckets(several)
    assert dataset.motion_scores().shape == (8,)
    [still] = [item for item in dataset if item["name"] == "0-still.png"]
    assert (float(still["motion"]), float(still["fps"])) == (0.0, 1.0)


def test_an_image_without_a_bucket_is_dropped_with_the_reason(several):
    table = rows_of(several, buckets=BUCKETS[:2])
    assert [row.clip.name for row in table.dropped] == ["0-still.png", "1-still.png"]
    assert "no bucket has one frame: add one such as 1x32x64" in table.dropped[0].reason
    assert table.table().splitlines()[-1] == "bucket 4x64x32: 3 windows of 3 clips"
    with pytest.raises(DataError, match=r"2 of 10 clips are unusable.*\n0-still\.png: an image"):
        in_buckets(several, buckets=BUCKETS[:2])


def test_what_is_dropped_or_left_empty_is_logged(several, caplog):
    caplog.set_level("INFO")
    in_buckets(several, buckets=[*BUCKETS[:2], "40x32x32"], max_dropped=0.2)
    assert "bucket 40x32x32: no clip" in caplog.text
    assert "dropped: 1-still.png: an image" in caplog.text


def test_a_fingerprint_tells_other_buckets_and_budgets(several):
    first = in_buckets(several).fingerprint()
    assert first == in_buckets(several, seed=9).fingerprint()
    for change in ({"buckets": BUCKETS[::-1]}, {"tokens": 999}, {"window": "head"}):
        assert in_buckets(several, **change).fingerprint() != first


def test_a_decoded_clip_of_another_size_than_its_bucket_is_read_again(make_clip, tmp_path):
    make_clip("clips/a.mp4", numbered(8, 32, 64))
    dataset = in_buckets(tmp_path / "clips", buckets=["12x32x64", "4x16x32"])  # decoded for the longer, larger one
    assert dataset._decoded.frames == {}
    assert dataset[0]["pixels"].shape == (4, 3, 16, 32)


# ---------------------------------------------------------------------------------------------------- mixtures

MIXTURE = ["8x32x32@8fps:5", "4x32x32@4fps:1", "2x16x16@8fps:1", "1x32x32:1"]


@pytest.fixture
def rates(make_clip, tmp_path):
    """Clips of 16, 12 and 9 frames at 8 per second, one too slow for that, and an image."""
    for name, frames, fps in (("a", 16, 8), ("b", 12, 8), ("c", 9, 8), ("slow", 12, 6)):
        make_clip(f"clips/{name}.mp4", numbered(frames, 32, 32), fps=fps)
    Image.fromarray(numbered(21, 32, 32)[20]).save(tmp_path / "clips" / "still.png")
    return tmp_path / "clips"


def in_mixture(path, seed=0, **changes):
    return ClipDataset(small(path, **({"buckets": MIXTURE} | changes)), seed=seed)


def test_every_clip_serves_in_all_buckets_of_a_mixture_that_it_fills(rates):
    dataset = in_mixture(rates)
    served = {row.clip.name: [window.bucket.frames for window in row.windows] for row in dataset.rows}
    every = [8, 4, 2, 1]
    assert served == {"a.mp4": every, "b.mp4": every, "c.mp4": every, "slow.mp4": [4, 1], "still.png": [1]}
    assert dataset.preflight.summary().splitlines() == [
        "5 clips: 5 used with 15 windows, 0 dropped",
        "bucket 8x32x32@8fps:5: 3 windows of 3 clips, 1 left out",
        "bucket 4x32x32@4fps:1: 4 windows of 4 clips",
        "bucket 2x16x16@8fps:1: 3 windows of 3 clips, 1 left out",
        "bucket 1x32x32:1: 5 windows of 5 clips",
    ]


def test_the_table_says_which_buckets_of_a_mixture_a_clip_is_left_out_of(rates, caplog):
    lines = in_mixture(rates).preflight.table().splitlines()
    slow = [" ".join(line.split()) for line in lines if line.startswith("slow")]
    assert [line.removeprefix("slow.mp4 12 6 32x32 ") for line in slow[1:]] == [
        "1x32x32:1 used: one frame of 12",
        "8x32x32@8fps:5 left out: 6 frames per second, bucket 8x32x32@8fps:5 asks for 8: frames would repeat",
        "2x16x16@8fps:1 left out: 6 frames per second, bucket 2x16x16@8fps:1 asks for 8: frames would repeat",
    ]
    assert "used, but: slow.mp4: left out of 8x32x32@8fps:5: 6 frames per second" in caplog.text


def test_samples_of_a_mixture_have_the_length_rate_and_frames_of_their_bucket(rates):
    dataset = in_mixture(rates)
    seen: dict[tuple[str, int], set[tuple[int, ...]]] = {}
    for number in range(40 * len(dataset)):
        item = dataset[number]
        frames, numbers = len(item["pixels"]), shown(item)
        told = {8: 8.0, 4: 4.0, 2: 8.0, 1: 1.0}[frames]
        step = {8: 1.0, 4: 6 / 4 if item["name"] == "slow.mp4" else 2.0, 2: 1.0, 1: 0.0}[frames]
        assert float(item["fps"]) == told
        assert item["pixels"].shape[-1] == (16 if frames == 2 else 32)
        expected = numbers[0] + step * np.arange(frames)
        assert np.abs(np.array(numbers) - expected).max() <= (0.5 if item["name"] == "slow.mp4" else 0)
        seen.setdefault((item["name"], frames), set()).add(tuple(numbers))
    assert len(seen) == 3 * 4 + 2 + 1
    assert seen["c.mp4", 1] == {(n,) for n in range(9)}, "any frame of a video may be an image"
    assert seen["c.mp4", 8] == {tuple(range(start, start + 8)) for start in (0, 1)}
    assert seen["still.png", 1] == {(20,)}


def test_decoded_clips_serve_buckets_of_their_size_and_others_are_read_again(rates):
    memory, fresh = in_mixture(rates), in_mixture(rates, memory_megabytes=0)
    assert len(memory._decoded.frames) == 5
    for number in range(2 * len(memory)):
        assert torch.equal(memory[number]["pixels"], fresh[number]["pixels"])


def test_steps_of_a_mixture_have_their_shares_and_visit_every_window_of_a_bucket_in_turn(rates):
    dataset = in_mixture(rates, seed=2)
    visited: dict[int, list[str]] = {}
    lengths = Counter()
    for step in range(80):
        items = [dataset.windows[dataset._place(number)] for number in dataset.numbers(step, 2, 2)]
        [frames] = {window.bucket.frames for _, window in items}
        lengths[frames] += 1
        visited.setdefault(frames, []).extend(row.clip.name for row, _ in items)
    assert lengths == {8: 50, 4: 10, 2: 10, 1: 10}
    for frames, count in ((8, 3), (4, 4), (2, 3), (1, 5)):
        passes = [visited[frames][first : first + count] for first in range(0, 40 - count, count)]
        assert all(len(set(names)) == count for names in passes)
        assert len({tuple(names) for names in passes}) > 1


def test_tokens_decide_the_batch_of_each_bucket_of_a_mixture(rates):
    dataset = in_mixture(rates, tokens=8 * 16)
    sizes = {}
    for step in range(16):
        numbers = dataset.numbers(step, 3, 7)
        sizes[len(dataset[numbers[0]]["pixels"])] = len(numbers)
    assert sizes == {8: 3, 4: 3 * 2, 2: 3 * 16, 1: 3 * 8}


def test_a_bucket_of_a_mixture_that_no_clip_fills_is_refused_with_the_reasons(rates):
    with pytest.raises(DataError) as caught:
        in_mixture(rates, buckets=[*MIXTURE, "16x32x32@16fps:2"])
    message = str(caught.value)
    assert "data.buckets: no clip of" in message
    assert "fills 16x32x32@16fps:2, so that it cannot have its share of the steps: leave it out" in message
    assert "\na.mp4: 8 frames per second, bucket 16x32x32@16fps:2 asks for 16: frames would repeat" in message
    with pytest.raises(DataError, match=r"fills 4x64x32:1, .*\nnone has its shape"):
        in_mixture(rates, buckets=["4x32x32:1", "1x32x32:1", "4x64x32:1"])


def test_a_clip_that_fills_no_bucket_of_a_mixture_is_dropped(rates):
    table = rows_of(rates, buckets=["9x32x32@8fps:1", "12x32x32@8fps:3"], max_dropped=0.5)
    assert {row.clip.name: row.reason.split(":")[0] for row in table.dropped} == {
        "slow.mp4": "6 frames per second, bucket 9x32x32@8fps",
        "still.png": "an image, and no bucket has one frame",
    }
    assert [len(row.missed) for row in table.used] == [0, 0, 1]


def test_a_fingerprint_tells_other_shares_and_rates(rates):
    first = in_mixture(rates).fingerprint()
    for text in ("8x32x32@8fps:4", "8x32x32@7fps:5"):
        assert in_mixture(rates, buckets=[text, *MIXTURE[1:]]).fingerprint() != first


def test_motion_scores_of_a_mixture_are_of_each_video_in_each_bucket_of_videos(rates):
    assert in_mixture(rates).motion_scores().shape == (3 * 3 + 1,)


# ---------------------------------------------------------------------------------------------------- preflight


@pytest.fixture
def mixed(make_clip, make_sound, make_frameless, tmp_path):
    """One sound clip among every kind of bad one."""
    make_clip("clips/good.mp4", numbered(10, 48, 32))
    make_clip("clips/phone.mp4", numbered(10, 32, 48), rotation=90)
    make_clip("clips/short.mp4", numbered(3))
    make_clip("clips/still.mp4", numbered(1))
    make_clip("clips/slow.mp4", numbered(10), fps=3)
    cut(make_clip("clips/torn.mp4", busy(30)), 0.6)
    (tmp_path / "clips" / "empty.mp4").touch()
    (tmp_path / "clips" / "notes.mp4").write_text("no video " * 50)
    make_sound("clips/song.mp4")
    make_frameless("clips/void.mkv")
    return tmp_path / "clips"


def test_every_clip_is_listed_with_its_windows_or_the_reason(mixed):
    table = rows_of(mixed, fps=8, window="centre")
    reasons = {row.clip.name: row.reason for row in table.rows}
    assert reasons["good.mp4"] == ""
    assert reasons["phone.mp4"] == ""
    assert "too short: 0.375 s, a window of 4 frames takes 0.5 s" in reasons["short.mp4"]
    assert "only one frame" in reasons["still.mp4"]
    assert "3 frames per second, data.fps asks for 8" in reasons["slow.mp4"]
    assert "truncated: the file ends after" in reasons["torn.mp4"]
    assert "empty (0 bytes)" in reasons["empty.mp4"]
    assert "not a readable video" in reasons["notes.mp4"]
    assert "holds only audio" in reasons["song.mp4"]
    assert "no frame decodes" in reasons["void.mkv"]
    lines = table.table().splitlines()
    assert len(lines) == 1 + 10 + 2
    assert lines[2].split() == "good.mp4 10 8 32x48 4x32x32 used: frames 3-6 at 8 fps".split()
    assert any("phone.mp4" in line and "32x48 rotated 90" in line for line in lines)
    assert lines[-2:] == ["10 clips: 2 used with 2 windows, 8 dropped", "bucket 4x32x32: 2 windows of 2 clips"]


def test_random_windows_are_listed_as_a_range(folder):
    line = rows_of(folder).table().splitlines()[1]
    assert line.endswith("4x32x32  used: frames 0-3 to 4-7, one of 5 at 8 fps")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("seconds", [None, 60.0])
def test_no_clip_that_cannot_be_used_reaches_a_batch_not_even_as_a_grey_one(mixed, make_clip, workers, seconds, caplog):
    """Whole or torn, in this process or in a helper, what is no clip is named, and never stands in for one."""
    for name in ("good", "phone"):
        make_clip(f"clips/{name}.mp4", busy(10, 32, 32), rotation=90 if name == "phone" else 0)
    damage(make_clip("clips/scratched.mp4", busy(30)))
    changes = {"fps": 8.0, "max_dropped": 0.9, "memory_megabytes": 0, "seconds_per_clip": seconds}
    for buckets in ([], ["4x32x32@8fps:1", "1x32x32:1"]):
        dataset = ClipDataset(small(mixed, buckets=buckets, **changes))
        numbers = [dataset.numbers(step, 1, 2) for step in range(8)]
        for batch in DataLoader(dataset, batch_sampler=numbers, collate_fn=collate, num_workers=workers):
            assert set(batch["name"]) <= {"good.mp4", "phone.mp4", *(["short.mp4", "slow.mp4"] if buckets else [])}
            for name, pixels in zip(batch["name"], batch["pixels"], strict=True):  # (F, 3, H, W)
                if name in ("good.mp4", "phone.mp4"):
                    assert float(pixels.std(dim=(1, 2, 3)).min()) > 0.1, "every frame shows the clip's noise"
                else:
                    assert shown({"pixels": pixels})[0] in range(10), "a frame that was painted"
        unusable = {"still", "torn", "scratched", "empty", "notes", "song", "void"} | (
            set() if buckets else {"short", "slow"}
        )
        assert {row.clip.name.split(".")[0] for row in dataset.preflight.dropped} == unusable
        assert all(f"dropped: {row.clip.name}: {row.reason}" in caplog.text for row in dataset.preflight.dropped)


def test_a_clip_that_no_longer_decodes_ends_the_run_and_is_named(make_clip, tmp_path):
    torn = make_clip("clips/a.mp4", busy(30))
    dataset = ClipDataset(small(tmp_path / "clips", memory_megabytes=0, window="chunk"), shuffle=False)
    damage(torn)
    read = []
    with pytest.raises(DataError, match=r"a\.mp4: (corrupt|truncated|frame \d+ no longer decodes)"):
        read += [dataset[number] for number in range(len(dataset))]
    assert all(float(item["pixels"].std(dim=(1, 2, 3)).min()) > 0.1 for item in read)


@pytest.mark.parametrize("extra", range(5))
@pytest.mark.parametrize("rate", [None, 8.0])
@pytest.mark.parametrize("window", ["random", "head", "centre", "chunk"])
def test_the_last_frame_of_a_window_at_the_clips_own_rate_is_a_real_one(make_clip, tmp_path, extra, rate, window):
    make_clip("clips/a.mp4", numbered(16 + extra, 32, 32))
    dataset = ClipDataset(small(tmp_path / "clips", frames=16, fps=rate, window=window), shuffle=False)
    for number in range(4):
        frames = shown(dataset[number])
        assert frames == list(range(frames[0], frames[0] + 16))
        assert frames[-1] <= 15 + extra


def test_too_many_drops_are_refused_with_their_reasons(mixed):
    with pytest.raises(DataError) as caught:
        ClipDataset(small(mixed, fps=8, max_dropped=0.5))
    message = str(caught.value)
    assert "8 of 10 clips are unusable, data.max_dropped allows 50%" in message
    assert "torn.mp4" in message
    assert "truncated" in message
    assert "good.mp4" not in message


def test_allowed_drops_leave_the_sound_clips(mixed):
    dataset = ClipDataset(small(mixed, fps=8, max_dropped=0.8))
    assert {item["name"] for item in dataset} == {"good.mp4", "phone.mp4"}


def test_a_run_without_any_clip_is_refused_whatever_is_allowed(mixed):
    with pytest.raises(DataError, match="10 of 10 clips are unusable"):
        ClipDataset(small(mixed, frames=100, max_dropped=1.0))


def test_frame_counts_are_decoded_not_believed(make_clip, tmp_path):
    path = make_clip("clips/a.mp4", numbered(20, 32, 32))
    data = path.read_bytes()
    # the header's duration (mvhd, in thousandths) claims an hour
    at = data.index(b"mvhd") + 20
    path.write_bytes(data[:at] + (3_600_000).to_bytes(4, "big") + data[at + 4 :])
    row = rows_of(tmp_path / "clips").rows[0]
    assert row.probe is not None
    assert row.probe.frames == 20
    assert row.windows[0].starts == range(17)


def test_enlarged_clips_are_counted(folder):
    assert rows_of(folder, height=64, width=64).summary().endswith("6 windows of 6 clips, 6 enlarged to 64x64")


def test_progress_is_reported(folder):
    calls = []
    ClipDataset(small(folder), progress=lambda done, whole: calls.append((done, whole)))
    assert calls == [(n, 6) for n in range(1, 7)]


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("frames", 0),
        ("height", -8),
        ("width", 0),
        ("stride", 0),
        ("fps", 0.0),
        ("fps", float("inf")),
        ("max_dropped", 1.5),
        ("memory_megabytes", -1),
        ("hop", 0),
        ("tokens", 0),
        ("seconds_per_clip", 0.0),
    ],
)
def test_impossible_settings_are_named(name, value):
    with pytest.raises(ConfigError, match=rf"data\.{name}: "):
        Data(**{name: value})


def test_settings_are_a_structured_config():
    merged = OmegaConf.merge(OmegaConf.structured(Data), {"path": "x", "fps": 7.5, "window": "centre"})
    found = OmegaConf.to_object(merged)
    assert isinstance(found, Data)
    assert (found.path, found.fps, found.window, found.split) == ("x", 7.5, "centre", None)


@pytest.mark.parametrize("name", ["demo", "folder", "huggingface"])
def test_the_shelf_holds_valid_settings(name, pytestconfig):
    text = OmegaConf.load(pytestconfig.rootpath / "datasets" / f"{name}.yaml")
    assert list(text) == ["data"]
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Data), text.data)).frames >= 1


def test_evaluation_takes_the_held_out_clips():
    found = Data(split="train", held_out="test", frames=9).evaluation()
    assert (found.split, found.window, found.frames) == ("test", "centre", 9)
    with pytest.raises(ConfigError, match=r"data\.held_out"):
        Data().evaluation()


def test_settings_and_checks_do_not_import_torch():
    code = "import sys, inflate.data.clips, inflate.data.demo_clips; sys.exit('torch' in sys.modules)"
    root = Path(clips.__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60, cwd=root).returncode == 0
