"""The noise schedule that is saved beside weights: recomputed, recognised, and warned of where it is another."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from inflate.errors import CheckpointError
from inflate.models import schedule_buffers
from inflate.objectives import DDPM

V = DDPM("v_prediction", True, 0.7)
NOISE = DDPM("epsilon")


@pytest.mark.parametrize(
    "objective", [V, NOISE, replace(V, base_scale=0.3), replace(V, base_scale=1.0), DDPM("v_prediction")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_objective_is_told_by_its_buffers(
    objective: DDPM, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    saved = {name: table.to(dtype) for name, table in schedule_buffers.buffers(objective).items()}
    assert saved.keys() == schedule_buffers.NAMES
    assert all(table.isfinite().all() for table in saved.values())
    assert schedule_buffers.told(saved, "the file") == objective
    assert not caplog.records


def test_the_schedule_is_stable_diffusions() -> None:
    found = schedule_buffers.buffers(NOISE)
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for zero, objective in ((False, NOISE), (True, V)):
        theirs = DDIMScheduler(**settings, rescale_betas_zero_snr=zero)
        found = schedule_buffers.buffers(objective)
        torch.testing.assert_close(found["betas"], theirs.betas, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found["alphas_cumprod"], theirs.alphas_cumprod, atol=1e-5, rtol=1e-4)
    variance = found["betas"] * (1 - found["alphas_cumprod_prev"]) / (1 - found["alphas_cumprod"])
    torch.testing.assert_close(found["posterior_variance"], variance, atol=1e-6, rtol=1e-5)


def test_betas_alone_tell_the_schedule() -> None:
    for objective in (V, NOISE):
        betas = {"betas": schedule_buffers.buffers(objective)["betas"]}
        assert schedule_buffers.told(betas, "the file") == replace(objective, base_scale=1.0)
    assert schedule_buffers.told({"weight": torch.zeros(1)}, "the file") is None


def test_another_table_is_warned_of_by_name(caplog: pytest.LogCaptureFixture) -> None:
    odd = schedule_buffers.buffers(V)
    odd["scale_arr"][100] += 0.25
    assert schedule_buffers.told(odd, "the file") == V
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("the file: its scale_arr is up to 2.5e-01 from that of DDPM(")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alphas_cumprod": torch.zeros(7)}, r"its alphas_cumprod is \(7,\), no table of 1000 timesteps"),
        ({"betas": torch.zeros(())}, r"its betas is \(\), no table"),
        ({"scale_arr": torch.zeros(1400)}, "its scale_arr ends in 0.0, which is no share"),
        ({"scale_arr": torch.full((1400,), float("nan"))}, "its scale_arr ends in nan"),
    ],
)
def test_what_is_no_table_is_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"the file: {message}"):
        schedule_buffers.told({**schedule_buffers.buffers(V), **change}, "the file")
