"""Windows of a clip, by every way of sampling."""

from __future__ import annotations

import numpy as np
import pytest

from inflate.data.buckets import Bucket
from inflate.data.settings import Data
from inflate.data.video import Probe
from inflate.data.windows import frames_of, left_over, missed, windows
from inflate.errors import ConfigError, DataError


def clip(frames: int, fps: float = 8.0, width: int = 64, height: int = 32, times: list[float] | None = None) -> Probe:
    shown = tuple(times or [n / fps for n in range(frames)])
    rate = (frames - 1) / shown[-1] if frames > 1 else 1.0
    steps = np.diff(shown)
    return Probe(frames, rate, width, height, 0, shown, None, bool(len(steps) and np.ptp(steps) > 0.5 * steps.min()))


def shown(found: Probe, **settings: object) -> list[list[int]]:
    """The frame numbers of each window, at its first start."""
    data = Data(**({"frames": 4, "height": 32, "width": 64} | settings))  # type: ignore[arg-type]
    return [frames_of(window, window.starts[0], found, data) for window in windows(found, data)]


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ("head", [[0, 1, 2, 3]]),
        ("centre", [[3, 4, 5, 6]]),
        ("chunk", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("slide", [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]),
        ("uniform", [[0, 3, 7, 10]]),
        ("full", [[0, 1, 2, 3]]),
        ("random", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_of_sampling(window, expected):
    assert shown(clip(11), window=window) == expected


def test_random_windows_may_start_wherever_they_fit_and_others_at_one_place():
    assert [window.starts for window in windows(clip(11), Data(frames=4))] == [range(8)]
    assert [len(window.starts) for window in windows(clip(11), Data(frames=4, window="slide"))] == [1] * 4


def test_the_hop_of_slide_is_counted_in_frames_of_the_window():
    assert [one[0] for one in shown(clip(11), window="slide", hop=3)] == [0, 3, 6]
    assert shown(clip(20), window="slide", hop=3, stride=2) == [[0, 2, 4, 6], [6, 8, 10, 12], [12, 14, 16, 18]]
    assert [one[0] for one in shown(clip(6), window="slide", frames=1)] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("fps", "asked"), [(24, 8.0), (10, 8.0), (30, 7.0)])
def test_chunks_of_resampled_clips_neither_overlap_nor_leave_gaps(fps, asked):
    found = clip(60, fps)
    chunks = shown(found, window="chunk", fps=asked)
    assert len(chunks) == int((60 / fps) * asked + 0.1) // 4
    for before, after in zip(chunks, chunks[1:], strict=False):
        gap = (after[0] - before[-1]) / fps
        assert 0 < gap <= 1 / asked + 1 / fps


def test_chunks_of_a_variable_clip_go_by_time():
    times = [0.0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0, 1.1]
    chunks = shown(clip(9, times=times), window="chunk", fps=10.0)
    assert chunks == [[0, 1, 2, 3], [3, 3, 3, 4], [5, 6, 7, 8]]


def test_uniform_frames_are_told_at_their_own_rate():
    found = clip(15, fps=8)  # 14 intervals, 1.75 s
    [window] = windows(found, Data(frames=8, window="uniform"))
    assert frames_of(window, 0, found, Data(frames=8, window="uniform")) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert window.fps == pytest.approx(4)
    assert shown(clip(9, times=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 4.0]), window="uniform", frames=3) == [
        [0, 7, 8]
    ]


def test_full_clips_go_to_their_own_length_or_the_longest_below_with_the_rest_stated():
    data = Data(buckets=["4x32x64", "9x32x64", "12x32x64"], window="full")
    for frames, bucket, rest in ((12, 12, 0), (11, 9, 2), (9, 9, 0), (8, 4, 4)):
        taken = windows(clip(frames), data)
        assert [window.bucket.frames for window in taken] == [bucket]
        assert left_over(taken, clip(frames), data) == rest


def test_a_clip_goes_to_the_nearest_aspect_then_to_the_most_frames():
    data = Data(buckets=["16x32x64", "8x32x64", "4x32x32", "12x64x32"])
    assert [windows(clip(n), data)[0].bucket.frames for n in (15, 16, 40)] == [8, 16, 16]
    assert windows(clip(40, width=40, height=38), data)[0].bucket == Bucket(4, 32, 32)
    assert windows(clip(40, width=32, height=90), data)[0].bucket == Bucket(12, 64, 32)
    with pytest.raises(DataError, match=r"too short: 0.625 s, a window of 8 frames \(8x32x64, the shortest bucket of"):
        windows(clip(5), data)


def test_an_image_goes_to_one_frame_or_nowhere():
    image = clip(1)
    [window] = windows(image, Data(buckets=["4x32x64", "1x64x64", "1x32x64"], fps=7.0, stride=3))
    assert (window.bucket, window.starts, window.fps) == (Bucket(1, 32, 64), range(1), 1.0)
    assert frames_of(window, 0, image, Data(fps=7.0)) == [0]
    with pytest.raises(DataError, match="an image, and no bucket has one frame: add one such as 1x32x64"):
        windows(image, Data(buckets=["4x32x64"]))
    assert windows(clip(9), Data(buckets=["4x32x64", "1x32x64"]))[0].bucket.frames == 4
    assert windows(clip(9), Data(buckets=["1x32x64"]))[0].bucket.frames == 1
    with pytest.raises(DataError, match="too short"):
        windows(clip(3), Data(buckets=["4x32x64", "1x32x64"]))


def test_settings_that_a_way_of_sampling_would_ignore_are_refused():
    with pytest.raises(ConfigError, match=r"data\.hop: is for data\.window=slide"):
        Data(hop=2)
    for wrong in ({"fps": 7.0}, {"stride": 2}):
        with pytest.raises(ConfigError, match=r"data\.window=uniform"):
            Data(window="uniform", **wrong)


@pytest.mark.parametrize(
    ("window", "fixed"),
    [("random", "centre"), ("chunk", "centre"), ("slide", "centre"), ("uniform", "uniform"), ("head", "head")],
)
def test_held_out_clips_have_one_fixed_window(window, fixed):
    hop = 2 if window == "slide" else None
    assert Data(window=window, hop=hop, held_out="test").evaluation().window == fixed


def test_a_sample_may_draw_a_wider_stride_as_far_as_its_clip_is_long():
    data = Data(frames=4, height=32, width=64, stride_to=6)
    (window,) = windows(clip(11), data)
    assert [(one.stride, len(one.starts), one.fps) for one in window.variants] == [(1, 8, 8), (2, 5, 4), (3, 2, 8 / 3)]
    assert frames_of(window.variants[2], 1, clip(11), data) == [1, 4, 7, 10]
    assert windows(clip(4), data)[0].wider == ()
    with pytest.raises(DataError, match="too short"):
        windows(clip(3), data)
    with pytest.raises(ConfigError, match=r"data\.stride_to: strides are drawn.*not head"):
        Data(stride_to=6, window="head")
    assert Data(stride_to=6, held_out="held_out").evaluation().stride_to is None


# ---------------------------------------------------------------------------------------------------- rates, mixtures

MIXTURE = ["16x32x64@16fps:5", "8x32x64@8fps:1", "4x32x64@4fps:1", "1x32x64:1"]


def taken(found: Probe, **settings: object) -> dict[int, list[tuple[float, list[int]]]]:
    """By the bucket's frames: the rate told and the frames shown, of each window at its first start."""
    data = Data(**({"buckets": MIXTURE, "window": "head"} | settings))  # type: ignore[arg-type]
    every: dict[int, list[tuple[float, list[int]]]] = {}
    for one in windows(found, data):
        every.setdefault(one.bucket.frames, []).append((one.fps, frames_of(one, one.starts[0], found, data)))
    return every


def test_a_clip_serves_in_every_bucket_of_a_mixture_with_its_length_and_rate():
    assert taken(clip(32, fps=32)) == {
        16: [(16, list(range(0, 32, 2)))], 8: [(8, list(range(0, 32, 4)))], 4: [(4, list(range(0, 32, 8)))],
        1: [(1, [0])],
    }  # fmt: skip


def test_windows_of_a_mixture_are_even_in_time():
    for times in ([n / 30 for n in range(60)], [0.0, *(0.1 + n / 30 for n in range(60))]):
        found = clip(len(times), times=times)
        for frames, [(fps, numbers)] in taken(found).items():
            offsets = np.array(times)[numbers] - times[numbers[0]]
            assert np.abs(offsets - np.arange(frames) / fps).max() <= 0.1 + 1e-9, "no older than what is on screen"
            assert len(numbers) == frames


def test_what_a_clip_lacks_leaves_it_out_of_a_bucket_alone():
    data = Data(buckets=MIXTURE)
    slow, short = clip(8, fps=8), clip(12, fps=32)
    assert [one.bucket.frames for one in windows(slow, data)] == [8, 4, 1]
    assert missed(slow, data) == {
        data.sizes[0]: "8 frames per second, bucket 16x32x64@16fps:5 asks for 16: frames would repeat"
    }
    assert [one.bucket.frames for one in windows(short, data)] == [1]
    assert {str(bucket): reason for bucket, reason in missed(short, data).items()} == {
        text: f"too short: 0.375 s, a window of {text[: text.index('x')]} frames ({text}) takes 1 s"
        for text in MIXTURE[:3]
    }
    assert missed(clip(32, fps=32), data) == {}
    assert missed(slow, Data(buckets=["16x32x64", "8x32x64"])) == {}
    with pytest.raises(DataError, match=r"too short: 0.375 s, a window of 4 frames \(4x32x64@4fps:1\) takes 1 s"):
        windows(short, Data(buckets=MIXTURE[:3]))


def test_an_image_serves_in_the_still_buckets_of_a_mixture():
    assert taken(clip(1)) == {1: [(1, [0])]}
    assert missed(clip(1), Data(buckets=MIXTURE)) == {}
    with pytest.raises(DataError, match="an image, and no bucket has one frame: add one such as 1x32x64"):
        windows(clip(1), Data(buckets=MIXTURE[:3]))


def test_any_frame_of_a_video_may_be_an_image_whatever_its_rate():
    data = Data(buckets=MIXTURE, fps=60.0, stride=2)
    [still] = [one for one in windows(clip(5, fps=2), data) if one.bucket.is_still]
    assert (still.starts, still.fps, still.stride) == (range(5), 1.0, 1)
    assert [frames_of(still, start, clip(5, fps=2), data) for start in still.starts] == [[n] for n in range(5)]


@pytest.mark.parametrize("window", ["random", "head", "centre", "chunk", "slide", "full"])
def test_a_bucket_of_a_rate_is_cut_as_at_data_fps(window):
    found = clip(61, fps=30)
    own, general = (
        Data(buckets=["8x32x64@8fps"], window=window, fps=3.0), Data(buckets=["8x32x64"], window=window, fps=8.0)
    )  # fmt: skip
    ours, theirs = (windows(found, data) for data in (own, general))
    assert [(one.starts, one.offset, one.fps) for one in ours] == [(one.starts, one.offset, one.fps) for one in theirs]
    assert frames_of(ours[-1], ours[-1].starts[-1], found, own) == frames_of(
        theirs[-1], theirs[-1].starts[-1], found, general
    )


def test_without_shares_a_clip_goes_to_one_bucket_whose_rate_it_has():
    data = Data(buckets=["16x32x64@16fps", "16x32x64@8fps", "4x32x64@4fps"])
    assert [str(one.bucket) for one in windows(clip(60, fps=30), data)] == ["16x32x64@16fps"]
    assert [str(one.bucket) for one in windows(clip(60, fps=8), data)] == ["16x32x64@8fps"]
    assert [str(one.bucket) for one in windows(clip(8, fps=8), data)] == ["4x32x64@4fps"]


def test_held_out_clips_of_a_mixture_are_in_one_bucket_each():
    held_out = Data(buckets=MIXTURE, held_out="test").evaluation()
    assert held_out.buckets == ["16x32x64@16fps", "8x32x64@8fps", "4x32x64@4fps", "1x32x64"]
    assert [one.bucket.frames for one in windows(clip(40, fps=30), held_out)] == [16]
    assert [one.bucket.frames for one in windows(clip(40, fps=8), held_out)] == [8]
    assert [one.bucket.frames for one in windows(clip(1), held_out)] == [1]


def test_uniform_windows_take_no_rate():
    with pytest.raises(ConfigError, match=r"data\.window=uniform.*leave the rates out of data\.buckets"):
        Data(buckets=MIXTURE, window="uniform")
    spread = taken(clip(31, fps=30), window="uniform", buckets=["4x32x64:3", "1x32x64:1"])
    assert spread == {4: [(3, [0, 10, 20, 30])], 1: [(1, [15])]}


# ---------------------------------------------------------------------------------------------------- the last frame


@pytest.mark.parametrize("fps", [8.0, 24.0, 24_000 / 1001, 29.97])
@pytest.mark.parametrize("extra", range(6))
def test_a_window_at_the_clips_own_rate_has_its_frames_in_turn_and_no_other(fps, extra):
    """Whatever is asked for: no rate, the clip's own, or the one that it is called by."""
    found = clip(16 + extra, fps)
    for asked in (None, fps, float(round(fps))):
        data = Data(frames=16, height=32, width=64, fps=asked)
        [window] = windows(found, data)
        assert window.starts == range(extra + 1)
        for start in window.starts:
            assert frames_of(window, start, found, data) == list(range(start, start + 16))
