"""Measures of clips in pixels.

Clips are `(batch, frames, 3, height, width)` with values in [0, 1]; each measure gives one number per clip, `(batch,)`,
computed in float32 unless the clip is float64. Average them over clips as they are, except spectra: sum those over
clips before taking a ratio, or clips that are nearly plain decide the result.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from inflate.errors import DataError

LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def psnr(output: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in decibels, from its mean squared error over all frames."""
    _check(output, truth)
    error = (_precise(output) - _precise(truth)).square().flatten(1).mean(1)  # (B,)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(output: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each clip, mean over frames (Wang et al. 2004: Gaussian window of 11, sigma 1.5).

    On luminance, without padding, so frames need at least 11 pixels a side.
    """
    _check(output, truth)
    if min(truth.shape[-2:]) < 11:
        raise DataError(f"ssim needs frames of at least 11x11 pixels, got {tuple(truth.shape[-2:])}")
    x, y = luminance(output).flatten(0, 1)[:, None], luminance(truth).flatten(0, 1)[:, None]  # (B*F, 1, H, W)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    lights = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (lights * structure).flatten(1).mean(1).unflatten(0, truth.shape[:2]).mean(1)  # (B,)


def flicker(clip: Tensor) -> Tensor:
    """Mean |x[t+1] - x[t]| of each clip: all change over time, motion included."""
    return _change(clip).abs().flatten(1).mean(1)  # (B,)


def flicker_error(output: Tensor, truth: Tensor) -> Tensor:
    """Mean |d_t output - d_t truth| of each clip: change over time that is not in the truth (0 is best)."""
    _check(output, truth)
    return (_change(output) - _change(truth)).abs().flatten(1).mean(1)  # (B,)


def power_spectrum(clip: Tensor) -> Tensor:
    """Radially averaged power of the frames' luminance, mean over frames: `(batch, rings)`.

    Ring k holds the frequencies of k cycles per shorter frame side, up to Nyquist. Each frame loses its mean and is
    tapered by a Hann window, so that its borders do not pose as detail.
    """
    light = luminance(clip)  # (B, F, H, W)
    height, width = light.shape[-2:]
    window = torch.outer(*(torch.hann_window(n, dtype=light.dtype, device=light.device) for n in (height, width)))
    light = (light - light.mean((-2, -1), keepdim=True)) * window
    power = torch.fft.fft2(light).abs().square().mean(1) / (height * width)  # (B, H, W)
    side = min(height, width)
    rows, columns = (torch.fft.fftfreq(n, 1 / side, device=light.device) for n in (height, width))
    ring = torch.hypot(rows[:, None], columns[None, :]).round().long().flatten()  # (H*W,)
    inside = (ring <= side // 2).nonzero().flatten()
    total = light.new_zeros(len(power), side // 2 + 1).index_add_(1, ring[inside], power.flatten(1)[:, inside])
    return total / torch.bincount(ring[inside], minlength=side // 2 + 1)  # (B, rings)


def sharpness(spectrum: Tensor, true_spectrum: Tensor) -> Tensor:
    """Power in the upper half of the frequencies over the true power there: 1 = as sharp as real, below 1 = blurred.

    Spectra `(..., rings)`; noise also raises it, so values above 1 mean grain, not sharpness.
    """
    high = _high(spectrum)
    return spectrum[..., high].sum(-1) / true_spectrum[..., high].sum(-1).clamp(min=1e-12)


def spectrum_distance(spectrum: Tensor, true_spectrum: Tensor) -> Tensor:
    """Mean |log10 power - log10 true power| over the rings of the upper half of the frequencies, in decades (0 = real).

    Unlike `sharpness`, a lack at one frequency is not made up for by a surplus at another.
    """
    high = _high(spectrum)
    ratio = spectrum[..., high].clamp(min=1e-12) / true_spectrum[..., high].clamp(min=1e-12)
    return torch.log10(ratio).abs().mean(-1)


def luminance(clip: Tensor) -> Tensor:
    """Luminance of RGB frames: (B, F, 3, H, W) to (B, F, H, W)."""
    pixels = _precise(clip)
    return torch.einsum("bfchw,c->bfhw", pixels, pixels.new_tensor(LUMINANCE))  # (B, F, H, W)


def _high(spectrum: Tensor) -> slice:
    rings = spectrum.shape[-1]
    return slice(math.ceil(rings / 2), rings)


def _blur(image: Tensor) -> Tensor:
    x = torch.arange(11, dtype=image.dtype, device=image.device) - 5
    window = torch.exp(-(x**2) / (2 * 1.5**2))
    window = window / window.sum()
    image = F.conv2d(image, window.view(1, 1, 11, 1))  # (N, 1, H-10, W)
    return F.conv2d(image, window.view(1, 1, 1, 11))  # (N, 1, H-10, W-10)


def _change(clip: Tensor) -> Tensor:
    if clip.ndim != 5 or clip.shape[1] < 2:
        raise DataError(f"flicker needs clips (batch, frames >= 2, 3, height, width), got {tuple(clip.shape)}")
    return _precise(clip).diff(dim=1)  # (B, F-1, 3, H, W)


def _precise(clip: Tensor) -> Tensor:
    return clip if clip.dtype == torch.float64 else clip.float()


def _check(output: Tensor, truth: Tensor) -> None:
    if output.shape != truth.shape or truth.ndim != 5:
        raise DataError(
            "the clips to compare must both be (batch, frames, 3, height, width), "
            f"got {tuple(output.shape)} and {tuple(truth.shape)}"
        )
