import pytest
import torch

from inflate.errors import DataError
from inflate.models.moments import LatentMoments


def test_moments_are_those_of_all_places_of_all_clips() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [torch.randn(shape, generator=generator) + 3 for shape in ((1, 5, 4, 8, 8), (2, 4, 4, 6))]
    values = torch.cat([clip.movedim(-3, 0).flatten(1) for clip in clips], dim=1).double()
    moments = LatentMoments.of(clips)
    assert moments.mean == pytest.approx(values.mean(dim=1).tolist(), rel=1e-12)
    assert moments.variance == pytest.approx(values.var(dim=1, correction=0).tolist(), rel=1e-9)


@pytest.mark.parametrize(("signal", "sigma"), [(1.0, 0.5), (0.3, 0.95)])
def test_a_start_has_the_moments_of_noised_clips(signal: float, sigma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = torch.randn(8, 4, 2, 32, 32, generator=generator) * torch.tensor([0.5, 2.0])[:, None, None]
    clips += torch.tensor([1.0, -3.0])[:, None, None]
    noised = signal * clips + sigma * torch.randn(clips.shape, generator=generator)
    started = LatentMoments.of(clips).start(torch.randn(clips.shape, generator=generator), sigma, signal)
    expected, found = LatentMoments.of(noised), LatentMoments.of(started)
    assert found.mean == pytest.approx(expected.mean, abs=0.02)
    assert found.variance == pytest.approx(expected.variance, rel=0.03)


def test_no_clips_are_refused() -> None:
    with pytest.raises(DataError, match="there are none"):
        LatentMoments.of([])
