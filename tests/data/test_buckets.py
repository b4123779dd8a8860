"""Buckets: how they are written, which one a picture goes to, and which one each step takes."""

from __future__ import annotations

from collections import Counter

import pytest

from inflate.data.buckets import Bucket, Mixture, Schedule, candidates, largest, nearest, of_its_shape, parse_buckets
from inflate.data.settings import Data
from inflate.errors import ConfigError

WIDE, TALL, SQUARE, STILL = Bucket(14, 576, 1024), Bucket(8, 1024, 576), Bucket(4, 512, 512), Bucket(1, 576, 1024)


def test_both_spellings_name_the_same_bucket():
    assert parse_buckets(["14x576x1024", "576x1024@8", " 1x576x1024 "]) == (WIDE, TALL, STILL)
    assert Bucket.parse("1024x576@14") == Bucket.parse(str(WIDE)) == WIDE


def test_a_rate_and_a_share_stand_behind_either_spelling():
    texts = ["32x256x448@16fps:5", "448x256@16@8fps:12", "8x256x448@7.5fps:1", "1x256x448:1"]
    found = parse_buckets(texts)
    assert [(one.frames, one.fps, one.share) for one in found] == [(32, 16, 5), (16, 8, 12), (8, 7.5, 1), (1, None, 1)]
    assert {one.size for one in found} == {(256, 448)}
    assert [str(one) for one in found] == [texts[0], "16x256x448@8fps:12", *texts[2:]]
    assert parse_buckets(["14x8x16@8fps", "14x8x16@4fps", "14x8x16"])[1] == Bucket(14, 8, 16, 4.0)


@pytest.mark.parametrize(
    "text",
    [
        "14x576",
        "x",
        "1024x576@",
        "1024x576x14@2",
        "-1x2x3",
        "14 576 1024",
        "fourteen",
        "4x8x8@8",
        "4x8x8:-1",
        "4x8x8:0.5",
    ],
)
def test_a_wrong_spelling_is_named_with_its_place_and_both_forms(text):
    with pytest.raises(ConfigError) as caught:
        Data(buckets=["1x8x8", text])
    assert f"data.buckets: entry 2 of 2, {text!r}: " in str(caught.value)
    assert "14x576x1024" in str(caught.value)
    assert "1024x576@14" in str(caught.value)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["0x8x8"], "1 of 1, '0x8x8': frames, height and width are 1 or more"),
        (["4x8x16", "16x8@4"], "is entry 1 again"),
        (["4x8x16@8fps:1", "4x8x16@4fps:1", "16x8@4@8fps:5"], "3 of 3, '16x8@4@8fps:5': is entry 1 again"),
        (["4x8x16:1", "1x8x16"], "2 of 2, '1x8x16': either every bucket has a share of the steps, such as 1x8x16:1"),
        (["4x8x16", "1x8x16:1"], "2 of 2, '1x8x16:1': either every bucket has a share"),
        (["4x8x16:0"], "a share is a whole number from 1 to 1000; leave out a bucket that is to have none"),
        (["4x8x16:1001"], "a share is a whole number from 1 to 1000"),
        (["4x8x16@0fps"], "a rate is more than 0"),
        (["1x8x16@1fps:1"], "a single frame has no rate: leave it out"),
    ],
)
def test_impossible_and_repeated_buckets_are_named(texts, reason):
    with pytest.raises(ConfigError, match=reason):
        Data(buckets=texts)


def test_without_buckets_the_size_settings_are_the_one_bucket():
    assert Data(frames=3, height=16, width=24).sizes == (Bucket(3, 16, 24),)
    assert Data(buckets=["1x8x8", "24x16@3"], frames=9).main == Bucket(3, 16, 24)


def test_an_export_remembers_the_bucket_that_most_steps_of_a_mixture_take():
    mixture = ["1x8x8:9", "2x8x8@4fps:1", "4x8x8@8fps:5", "8x8x8@8fps:5"]
    assert str(Data(buckets=mixture).main) == "4x8x8@8fps:5"
    assert Data(buckets=["1x8x8:1", "1x16x8:2"]).main.size == (16, 8)


def test_images_and_videos_have_buckets_of_their_own():
    assert candidates([WIDE, STILL], image=True) == [STILL]
    assert candidates([WIDE, STILL], image=False) == [WIDE]
    assert candidates([STILL], image=False) == [STILL]
    assert candidates([WIDE], image=True) == []


def test_in_a_mixture_videos_may_go_to_buckets_of_one_frame_too():
    mixture = parse_buckets(["8x8x16:1", "1x8x16:1"])
    assert candidates(mixture, image=False) == [*mixture]
    assert candidates(mixture, image=True) == [mixture[1]]
    assert [one.is_still for one in (*mixture, STILL)] == [False, True, False]


def test_the_shape_decides_among_buckets_of_one_length_and_rate():
    texts = ["8x8x16@4fps:1", "8x16x8@4fps:1", "8x16x8@8fps:1", "1x8x8:1", "1x8x16:1", "4x16x32:1", "4x8x16:1"]
    mixture = parse_buckets(texts)
    wide = [str(bucket) for bucket in of_its_shape(mixture, 1920, 1080)]
    assert wide == [texts[0], texts[2], texts[4], texts[5], texts[6]]


def test_the_nearest_aspect_is_measured_by_its_logarithm():
    assert nearest([WIDE, TALL, SQUARE], 1920, 1080) == [WIDE]
    assert nearest([WIDE, SQUARE], 132, 100) == [SQUARE]  # sqrt(16 / 9) = 1.333 lies between the two
    assert nearest([WIDE, SQUARE], 134, 100) == [WIDE]
    wide, tall = Bucket(4, 32, 64), Bucket(4, 64, 32)
    assert nearest([wide, tall], 50, 50) == [wide, tall]


def test_most_frames_win_then_the_size_that_needs_no_enlarging():
    large, small, long = Bucket(8, 64, 128), Bucket(8, 32, 64), Bucket(9, 16, 32)
    assert largest([large, small, long], 40, 20) == long
    assert largest([large, small], 128, 64) == large
    assert largest([large, small], 127, 64) == small
    assert largest([large, small], 40, 20) == small


def test_a_batch_is_as_many_clips_as_the_tokens_allow():
    assert Bucket(8, 64, 64).batch(8 * 64) == 1
    assert Bucket(8, 64, 64).batch(3 * 8 * 64 + 1) == 3
    assert Bucket(1, 64, 64).batch(8 * 64) == 8
    assert Bucket(8, 64, 64).batch(1) == 1


# ---------------------------------------------------------------------------------------------------- steps


def streams(schedule, steps):
    """The places of each bucket's endless list of samples that so many steps take, in their order."""
    taken = [[] for _ in schedule.windows]
    for number in range(steps):
        bucket, turn = schedule.step(number)
        taken[bucket] += range(turn * schedule.samples[bucket], (turn + 1) * schedule.samples[bucket])
    return taken


@pytest.mark.parametrize(("windows", "samples"), [((12, 5, 3), (4, 2, 2)), ((7,), (3,)), ((10, 1), (2, 6))])
def test_every_bucket_takes_its_samples_in_turn_and_none_is_left_out(windows, samples):
    schedule = Schedule(3, windows, samples)
    for taken in streams(schedule, 200):
        assert taken == list(range(len(taken)))
    passes = [len(taken) / count for taken, count in zip(streams(schedule, 200), windows, strict=True)]
    assert max(passes) - min(passes) <= max(samples) / min(windows) + 1


def test_what_fills_no_step_opens_the_next_epoch():
    schedule = Schedule(0, (5, 4), (2, 2))  # epochs of 2 + 2, 3 + 2, 2 + 2, ... steps
    assert [Counter(schedule.step(n)[0] for n in epoch) for epoch in (range(4), range(4, 9), range(9, 13))] == [
        {0: 2, 1: 2}, {0: 3, 1: 2}, {0: 2, 1: 2},
    ]  # fmt: skip


def test_a_step_is_a_function_of_seed_and_number_alone():
    first, second = Schedule(1, (9, 6), (2, 3)), Schedule(1, (9, 6), (2, 3))
    forwards = [first.step(n) for n in range(60)]
    assert [second.step(n) for n in reversed(range(60))] == forwards[::-1]
    assert [Schedule(2, (9, 6), (2, 3)).step(n) for n in range(60)] != forwards


def test_the_buckets_of_an_epoch_are_mixed():
    order = [Schedule(0, (50, 50), (1, 1)).step(n)[0] for n in range(100)]
    assert 20 < sum(a != b for a, b in zip(order, order[1:], strict=False)) < 80


def test_a_far_step_is_found_at_once():
    assert Schedule(0, (1000, 3), (2, 64)).step(10**9)[0] in (0, 1)


# ---------------------------------------------------------------------------------------------------- shares


def test_every_bucket_of_a_mixture_has_its_share_of_the_steps():
    shares = (1, 1, 1, 5)
    drawn = [Mixture(3, shares).step(number)[0] for number in range(8000)]
    assert Counter(drawn) == {0: 1000, 1: 1000, 2: 1000, 3: 5000}
    assert all(Counter(drawn[first : first + 8]) == dict(enumerate(shares)) for first in range(0, 8000, 8))
    # Within a round each place is any bucket's: 1000 rounds, 5/8 of 1000 of them, standard deviation 15.
    assert all(abs(sum(drawn[place::8][n] == 3 for n in range(1000)) - 625) < 75 for place in range(8))


def test_the_steps_of_a_mixture_take_each_buckets_samples_in_turn():
    turns: dict[int, list[int]] = {}
    for number in range(500):
        bucket, turn = Mixture(1, (2, 3, 1)).step(number)
        turns.setdefault(bucket, []).append(turn)
    assert all(taken == list(range(len(taken))) for taken in turns.values())


def test_a_step_of_a_mixture_is_a_function_of_seed_and_number_alone():
    forwards = [Mixture(1, (1, 1, 1, 5)).step(number) for number in range(64)]
    assert [Mixture(1, (1, 1, 1, 5)).step(number) for number in reversed(range(64))] == forwards[::-1]
    assert [Mixture(2, (1, 1, 1, 5)).step(number) for number in range(64)] != forwards
    assert Mixture(1, (1, 1000)).step(10**12)[0] in (0, 1)
