"""Distances of sets against values known analytically, and the protocol that goes with them."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import permutations

import pytest
import torch

from inflate.errors import DataError
from inflate.metrics.frechet import frechet_distance, kernel_distance
from inflate.metrics.fvd import Protocol, refuse_another_protocol, video_distance


def normal(count: int, dimensions: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean: torch.Tensor, covariance: torch.Tensor, count: int = 40, seed: int = 0) -> torch.Tensor:
    """Vectors whose sample mean and covariance are these, to rounding."""
    drawn = normal(count, len(mean), seed)
    white = torch.linalg.qr(drawn - drawn.mean(0)).Q * (count - 1) ** 0.5
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_identical_sets_have_the_distance_0() -> None:
    for count, dimensions in ((60, 12), (12, 60), (30, 30)):
        features = 100 * normal(count, dimensions) @ torch.diag(torch.logspace(-6, 3, dimensions, dtype=torch.float64))
        scale = features.var(0).sum().item()
        assert abs(frechet_distance(features, features)) < 1e-6 * scale
        assert abs(frechet_distance(features, features.flip(0))) < 1e-6 * scale


def test_gaussians_that_commute_have_their_closed_form() -> None:
    means = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    deviations = torch.tensor([1.0, 2.0, 0.1], dtype=torch.float64), torch.tensor([3.0, 0.5, 0.1], dtype=torch.float64)
    sets = [exactly(m, torch.diag(d**2), seed=n) for n, (m, d) in enumerate(zip(means, deviations, strict=True))]
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(*sets) == pytest.approx(expected.item(), rel=1e-9)


def test_gaussians_in_the_plane_that_do_not_commute() -> None:
    a, b = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    assert not torch.allclose(a @ b, b @ a)
    zero = torch.zeros(2, dtype=torch.float64)
    root = ((a @ b).trace() + 2 * torch.linalg.det(a @ b).sqrt()).sqrt()  # the trace of a 2 x 2 matrix's root
    expected = (a.trace() + b.trace() - 2 * root).item()
    assert frechet_distance(exactly(zero, a), exactly(zero, b, seed=1)) == pytest.approx(expected, rel=1e-9)


def test_the_root_agrees_with_the_symmetric_form_by_eigenvalues() -> None:
    x, y = normal(200, 24), normal(150, 24, seed=1) @ normal(24, 24, seed=2) + 0.3
    s, t = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(s)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    root = torch.linalg.eigvalsh(half @ t @ half).clamp(min=0).sqrt().sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + s.trace() + t.trace() - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected.item(), rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected.item(), rel=1e-10)


def test_float32_features_are_computed_in_float64() -> None:
    x, y = normal(50, 8).float(), normal(50, 8, seed=1).float()
    assert frechet_distance(x, y) == frechet_distance(x.double(), y.double())


def test_the_kernel_distance_is_the_mean_over_pairs_of_different_vectors() -> None:
    x, y = normal(5, 3), normal(4, 3, seed=1) + 1

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    inside = [sum(kernel(a, b) for a, b in permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(sum(inside) - 2 * across, rel=1e-12)


def test_the_kernel_distance_of_one_distribution_is_0_in_the_mean() -> None:
    drawn = [kernel_distance(normal(40, 4, seed=n), normal(40, 4, seed=100 + n)) for n in range(60)]
    mean, error = torch.tensor(drawn).mean().item(), torch.tensor(drawn).std().item() / 60**0.5
    assert abs(mean) < 3 * error
    assert kernel_distance(normal(40, 4), normal(40, 4, seed=1) + 1) > 10 * max(drawn)


@pytest.mark.parametrize(
    ("real", "generated", "reason"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), "of one length"),
        (torch.zeros(1, 4), torch.zeros(3, 4), "two or more"),
        (torch.full((3, 4), torch.nan), torch.zeros(3, 4), "not finite"),
    ],
)
def test_what_has_no_distance_is_refused(real: torch.Tensor, generated: torch.Tensor, reason: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(DataError, match=reason):
            distance(real, generated)


PROTOCOL = Protocol(
    real=30, generated=20, frames=16, window="head", stride=1, fps="8", size="64x64", resize="none", crop="none",
    real_codec="h264/yuv420p", generated_codec="h264/yuv420p", real_sha256="a" * 64, network_sha256="b" * 64,
    dimensions=6, seed=0,
)  # fmt: skip


def test_a_value_carries_its_protocol() -> None:
    found = video_distance(normal(30, 6), normal(20, 6, seed=1), PROTOCOL)
    assert found.fvd == frechet_distance(normal(30, 6), normal(20, 6, seed=1))
    assert all(f"{name}={value}" in str(found.protocol) for name, value in asdict(PROTOCOL).items())
    assert "WARNING" not in str(found.protocol)


def test_fewer_clips_than_dimensions_are_warned_of_in_the_protocol() -> None:
    assert "WARNING: 20 clips for 20 dimensions" in str(replace(PROTOCOL, dimensions=20))
    assert "WARNING" not in str(replace(PROTOCOL, dimensions=19))


def test_a_protocol_of_other_sets_is_refused() -> None:
    with pytest.raises(DataError, match="other sets"):
        video_distance(normal(29, 6), normal(20, 6), PROTOCOL)


def test_another_protocol_is_refused_with_what_differs() -> None:
    mine, theirs = asdict(PROTOCOL), asdict(replace(PROTOCOL, frames=14, network_sha256="c"))
    refuse_another_protocol(mine, dict(mine), "old.json")
    with pytest.raises(
        DataError, match=r"old.json: .*\(frames 16 here and 14 there, network_sha256 b+ here and c there\)"
    ):
        refuse_another_protocol(mine, theirs, "old.json")
    with pytest.raises(DataError, match="seed 0 here and None there"):
        refuse_another_protocol(mine, {key: value for key, value in mine.items() if key != "seed"}, "old.json")
