"""What runs measure: directions, and overfitting on made-up rows."""

from __future__ import annotations

import pytest

from inflate.measures import Overfitting, better, overfitting, remark


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("held-out loss at sigma 0.3", "lower"), ("training-clip loss", "lower"), ("noisy/flicker", "lower"),
        ("flicker error, sample", "lower"), ("clean/spectrum_distance", "lower"), ("noisy/psnr", "higher"),
        ("clean/ssim", "higher"), ("frames 1-3, sample", "higher"), ("noisy/sharpness", "nearer 1"),
        ("fvd", "lower"), ("lpips", "lower"), ("flicker error", "lower"), ("prompt agreement", "higher"),
        ("direction as asked", "higher"), ("motion", "nearer real"), ("frame change", "nearer real"),
        ("real/motion", ""),
        ("held-out loss, temporal layers bypassed", ""), ("frame 0, autoencoder", ""), ("parent/noisy/psnr", ""),
    ],
)  # fmt: skip
def test_which_direction_is_better(name: str, direction: str) -> None:
    assert better(name) == direction
    assert remark(name) == (f"({direction} is better)" if direction else "")


def rows(
    held_out: list[float], training: list[float], names: tuple[str, str] = ("held-out loss", "training-clip loss")
):
    pairs = zip(held_out, training, strict=True)
    return [{"step": 10 * n, names[0]: one, names[1]: other} for n, (one, other) in enumerate(pairs)]


def test_a_held_out_loss_that_rises_while_the_training_clips_fall_is_overfitting() -> None:
    found = overfitting(rows([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.6, 0.5]))
    assert found == [Overfitting("held-out loss", 10, 0.8, 0.95, 0.7, 0.5)]
    assert str(found[0]) == (
        "overfitting: held-out loss was best at step 10 and went from 0.8 to 0.95, training-clip loss from 0.7 to 0.5; "
        "no checkpoint is kept"
    )


def test_psnr_is_better_when_higher() -> None:
    names = ("noisy/psnr", "training-clip noisy/psnr")
    found = overfitting(rows([20, 25, 24.8, 24.5], [20, 26, 27, 28], names))
    assert found == [Overfitting("noisy/psnr", 10, 25, 24.5, 26, 28)]
    assert overfitting(rows([20, 25, 24.95, 24.95], [20, 26, 27, 28], names)) == []  # 1 % of the squared error


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        ([1.0, 0.8, 0.9], [1.0, 0.7, 0.6]),  # once
        ([1.0, 0.8, 0.81, 0.81], [1.0, 0.7, 0.6, 0.5]),  # by 1 %
        ([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.6, 0.7]),  # the training clips get worse as well
        ([1.0, 0.8, 0.9, 0.95, 0.79], [1.0, 0.7, 0.6, 0.5, 0.4]),  # it has recovered
        ([1.0, 0.8, 0.9, 0.81], [1.0, 0.7, 0.6, 0.5]),
        ([1.0, 0.9, 0.8], [1.0, 0.9, 0.8]),
        ([], []),
    ],
)
def test_what_is_not_overfitting(held_out: list[float], training: list[float]) -> None:
    assert overfitting(rows(held_out, training)) == []


def test_rows_without_the_measure_of_training_clips_are_passed_over() -> None:
    full = rows([1.0, 0.8, 0.9, 0.95], [1.0, 0.7, 0.6, 0.5])
    assert overfitting([{"step": 0, "held-out loss": 0.1}, *full])
    assert overfitting([{"step": row["step"], "held-out loss": row["held-out loss"]} for row in full]) == []
