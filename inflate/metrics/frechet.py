"""Distances between two sets of feature vectors: Fréchet's, and the kernel one, both in float64.

FVD (Unterthiner et al. 2018) is the first on features of videos; KVD is the second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inflate.errors import DataError


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to features (N, D) and (M, D), N and M at least 2.

    |m - n|^2 + tr S + tr T - 2 tr sqrt(S T), where the covariances have N - 1 and M - 1 in the denominator. With
    S = A'A and T = B'B the last trace is the sum of the singular values of A B': no root of a matrix is taken, no small
    eigenvalue turns negative, and fewer vectors than dimensions do no harm to the arithmetic. Raises DataError.
    """
    _check(real, generated)
    (m, a), (n, b) = _fitted(real), _fitted(generated)
    shift = (m - n).square().sum()
    return float(shift + a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum())


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (N, D) and (M, D), N and M at least 2.

    The kernel is (x'y / D + 1)^3 (Bińkowski et al. 2018). Where both come from one distribution it is 0 in the mean, so
    it may be negative. Raises DataError.
    """
    _check(real, generated)
    x, y = real.double(), generated.double()
    return _mean_of_pairs(x) + _mean_of_pairs(y) - 2 * float(_kernel(x, y).mean())


def _fitted(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean (D,), and A (K, D) with A'A the covariance: triangular where there are more vectors than dimensions."""
    mean = features.double().mean(0)
    centred = (features.double() - mean) / (len(features) - 1) ** 0.5  # (N, D)
    return mean, centred if len(centred) <= centred.shape[1] else torch.linalg.qr(centred, mode="r").R


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3  # (N, M)


def _mean_of_pairs(x: Tensor) -> float:
    """Mean of the kernel over all pairs of different vectors."""
    kernel = _kernel(x, x)
    return float((kernel.sum() - kernel.diagonal().sum()) / (len(x) * (len(x) - 1)))


def _check(real: Tensor, generated: Tensor) -> None:
    shapes = f"got {tuple(real.shape)} and {tuple(generated.shape)}"
    if (
        real.ndim != 2
        or generated.ndim != 2
        or real.shape[1] != generated.shape[1]
        or min(len(real), len(generated)) < 2
    ):
        raise DataError(f"a distance of sets needs two or more feature vectors of one length in each, {shapes}")
    if not (real.isfinite().all() and generated.isfinite().all()):
        raise DataError("a feature vector holds values that are not finite; is the network the right one?")
