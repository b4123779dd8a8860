"""Overlapping windows: where they lie, what they count, and what does not depend on them."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from inflate.errors import ConfigError
from inflate.sampling.windows import Windows

TIMESTEP = torch.tensor([5])


def clip(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, frames, 4, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def over_time(noisy: Tensor, timestep: Tensor) -> Tensor:
    """A prediction in which every frame sees the others."""
    return noisy.cumsum(1).sin() + noisy.mean(1, keepdim=True)


def by_frame(noisy: Tensor, timestep: Tensor) -> Tensor:
    return noisy.tanh() * timestep


@pytest.mark.parametrize("total", [1, 3, 8, 9, 12, 15, 16, 50, 123])
@pytest.mark.parametrize(("frames", "overlap"), [(8, 2), (8, 4), (8, 7), (3, 0), (1, 0)])
def test_windows_cover_every_frame_and_overlap_as_asked(total: int, frames: int, overlap: int) -> None:
    places = Windows(frames, overlap).places(total)
    assert sorted({number for place in places for number in range(place.start, place.stop)}) == list(range(total))
    assert {place.stop - place.start for place in places} == {min(frames, total)}
    shared = [before.stop - after.start for before, after in zip(places, places[1:], strict=False)]
    assert all(count >= overlap for count in shared)
    assert max(shared, default=0) - min(shared, default=0) <= 1
    fewest = 1 if total <= frames else 1 + -(-(total - frames) // (frames - overlap))
    assert len(places) == fewest


@pytest.mark.parametrize("frames", [6, 7, 100])
def test_one_window_is_the_plain_call(frames: int) -> None:
    noisy = clip(6)
    assert torch.equal(Windows(frames, 2).over(over_time)(noisy, TIMESTEP), over_time(noisy, TIMESTEP))


def test_frames_that_do_not_see_each_other_are_predicted_as_without_windows() -> None:
    noisy = clip(17)
    torch.testing.assert_close(
        Windows(5, 3).over(by_frame)(noisy, TIMESTEP), by_frame(noisy, TIMESTEP), rtol=1e-12, atol=1e-12
    )


def test_overlaps_are_means_that_favour_the_window_whose_middle_is_near() -> None:
    noisy = clip(6)
    first, second = over_time(noisy[:, :4], TIMESTEP), over_time(noisy[:, 2:], TIMESTEP)
    found = Windows(4, 2).over(over_time)(noisy, TIMESTEP)
    assert torch.equal(found[:, :2], first[:, :2])
    assert torch.equal(found[:, 4:], second[:, 2:])
    torch.testing.assert_close(found[:, 2], (2 * first[:, 2] + second[:, 0]) / 3, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[:, 3], (first[:, 3] + 2 * second[:, 1]) / 3, rtol=1e-12, atol=1e-12)


def test_the_order_of_windows_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy, windows = clip(40), Windows(8, 5)
    expected, places = windows.over(over_time)(noisy, TIMESTEP), windows.places(40)
    assert len(places) == 12
    for seed in range(3):
        shuffled = random.Random(seed).sample(places, len(places))
        monkeypatch.setattr(Windows, "places", lambda self, total, shuffled=shuffled: shuffled)
        torch.testing.assert_close(windows.over(over_time)(noisy, TIMESTEP), expected, rtol=1e-12, atol=1e-12)


def test_no_call_is_longer_than_a_window() -> None:
    lengths = list[int]()

    def counted(noisy: Tensor, timestep: Tensor) -> Tensor:
        lengths.append(noisy.shape[1])
        return noisy

    torch.testing.assert_close(Windows(8, 2).over(counted)(clip(50), TIMESTEP), clip(50), rtol=1e-12, atol=1e-12)
    assert lengths == [8] * 8


def test_a_cut_does_not_show_where_windows_overlap() -> None:
    """What changes a frame's prediction at a window's edge counts less the nearer the edge is."""

    def marked(noisy: Tensor, timestep: Tensor) -> Tensor:
        at_edges = torch.zeros_like(noisy)
        at_edges[:, [0, -1]] = 1.0
        return at_edges

    blended, cut = (Windows(8, overlap).over(marked)(clip(36), TIMESTEP)[:, 8:-8].max() for overlap in (4, 0))
    assert float(cut) == 1.0
    assert float(blended) == pytest.approx(0.2)


@pytest.mark.parametrize(("frames", "overlap"), [(0, 0), (4, 4), (4, -1)])
def test_windows_that_cannot_be_are_refused(frames: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"windows of 0 frames|overlap is .*: it must be 0 to 3"):
        Windows(frames, overlap)
