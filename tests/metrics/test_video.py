import itertools
import math

import pytest
import torch

from inflate.errors import DataError
from inflate.metrics.video import (
    flicker,
    flicker_error,
    luminance,
    power_spectrum,
    psnr,
    sharpness,
    spectrum_distance,
    ssim,
)


def clips(batch: int = 2, frames: int = 4, side: int = 32) -> torch.Tensor:
    return torch.rand(batch, frames, 3, side, side, generator=torch.Generator().manual_seed(0))


def blurred(clip: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(clip, (1, 3, 3), stride=1, padding=(0, 1, 1), count_include_pad=False)


def test_psnr_is_the_logarithm_of_the_squared_error_of_each_clip():
    truth = clips() * 0.5
    output = truth + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1)
    assert psnr(output, truth).tolist() == pytest.approx([20, 40], abs=1e-3)


def test_psnr_of_the_truth_itself_is_finite():
    assert psnr(clips(), clips()).isfinite().all()


def test_ssim_is_1_for_the_truth_and_falls_with_damage():
    truth = clips()
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))
    values = [ssim(truth, truth), ssim(truth + 0.1 * noise, truth), ssim(truth + 0.5 * noise, truth)]
    assert torch.allclose(values[0], torch.ones(2), atol=1e-5)
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()


def test_ssim_is_the_mean_of_its_formula_over_windows():
    truth = clips(batch=1, frames=2, side=13).double()
    output = (truth + 0.2 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    offsets = torch.arange(11).double() - 5
    weights = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    weights = weights / weights.sum()
    found = []
    for x, y in zip(luminance(output)[0], luminance(truth)[0], strict=True):
        for row, column in itertools.product(range(3), range(3)):
            a, b = (image[row : row + 11, column : column + 11] for image in (x, y))
            mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
            variance_a, variance_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
            covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
            light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            found.append(light * (2 * covariance + 9e-4) / (variance_a + variance_b + 9e-4))
    assert ssim(output, truth).item() == pytest.approx(torch.stack(found).mean().item(), rel=1e-9)


def test_ssim_of_constant_frames_is_the_comparison_of_their_means():
    a, b = torch.full((1, 2, 3, 16, 16), 0.4), torch.full((1, 2, 3, 16, 16), 0.6)
    assert ssim(a, b).item() == pytest.approx((2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4), abs=1e-4)


def test_flicker_error_ignores_a_fixed_error_and_sees_one_that_changes():
    truth = clips(frames=4)
    fixed = truth + 0.2
    alternating = truth + 0.1 * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1, 1)
    assert flicker_error(fixed, truth).max().item() == pytest.approx(0, abs=1e-6)
    assert flicker_error(alternating, truth).tolist() == pytest.approx([0.2, 0.2], abs=1e-6)


def test_flicker_is_0_for_a_still_clip_and_the_mean_step_otherwise():
    still = clips(frames=1).repeat(1, 3, 1, 1, 1)
    rising = still + torch.tensor([0.0, 0.1, 0.3]).view(1, 3, 1, 1, 1)
    assert flicker(still).tolist() == [0, 0]
    assert flicker(rising).tolist() == pytest.approx([0.15, 0.15], abs=1e-6)


def test_the_spectrum_of_a_wave_peaks_at_its_own_ring():
    x = torch.arange(64) / 64
    wave = 0.5 + 0.4 * torch.sin(2 * math.pi * 10 * x).expand(1, 2, 3, 64, 64)
    spectrum = power_spectrum(wave)
    assert spectrum.shape == (1, 33)
    assert spectrum.argmax().item() == 10


def test_the_spectrum_of_oblong_frames_counts_cycles_per_shorter_side():
    x = torch.arange(96) / 48
    wave = 0.5 + 0.4 * torch.sin(2 * math.pi * 8 * x).expand(1, 2, 3, 48, 96)
    assert power_spectrum(wave).argmax().item() == 8


def test_blur_lowers_sharpness_and_noise_raises_it():
    truth = blurred(clips(side=64))
    spectrum = power_spectrum(truth)
    soft, grainy = power_spectrum(blurred(truth)), power_spectrum(truth + 0.2 * clips(side=64))
    assert sharpness(spectrum, spectrum).tolist() == pytest.approx([1, 1])
    assert (sharpness(soft, spectrum) < 0.5).all()
    assert (sharpness(grainy, spectrum) > 1.1).all()


def test_spectrum_distance_is_in_decades_and_knows_no_compensation():
    true_spectrum = torch.ones(1, 33)
    tenth = true_spectrum.clone()
    tenth[:, 17:] = 0.1
    uneven = true_spectrum.clone()
    uneven[:, 17::2], uneven[:, 18::2] = 10, 0.1
    assert spectrum_distance(true_spectrum, true_spectrum).item() == 0
    assert spectrum_distance(tenth, true_spectrum).item() == pytest.approx(1)
    assert spectrum_distance(uneven, true_spectrum).item() == pytest.approx(1)


def test_only_the_upper_half_of_the_frequencies_counts():
    spectrum, true_spectrum = torch.ones(1, 33), torch.ones(1, 33)
    spectrum[:, :17] = 100
    assert sharpness(spectrum, true_spectrum).item() == 1
    assert spectrum_distance(spectrum, true_spectrum).item() == 0


def test_luminance_of_grey_is_grey():
    assert torch.allclose(luminance(torch.full((1, 1, 3, 2, 2), 0.25)), torch.full((1, 1, 2, 2), 0.25))


def test_float64_clips_are_measured_in_float64():
    assert flicker_error(clips().double(), clips().double()).dtype == torch.float64
    assert power_spectrum(clips().double()).dtype == torch.float64


def test_clips_of_other_shapes_are_refused():
    with pytest.raises(DataError, match="must both be"):
        psnr(clips(), clips(frames=3))
    with pytest.raises(DataError, match="frames >= 2"):
        flicker(clips(frames=1))
    with pytest.raises(DataError, match="11x11"):
        ssim(clips(side=8), clips(side=8))
