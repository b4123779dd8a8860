"""A decoder in a small working set against the same decoder on whole clips: output, gradients and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import randomise, tiny_vae
from inflate.errors import ConfigError
from inflate.families import svd_outline
from inflate.models.streaming import moments, units
from inflate.models.vae import VideoVAE
from inflate.training.memory import Ledger, fused_attention, simulate

ROWS = (1, 3, 100)  # of 10 in the last level and 5 in the first: strips of one row, unequal ones, a single one


def trained_vae(dtype: torch.dtype = torch.float64) -> VideoVAE:
    vae = VideoVAE.from_2d(tiny_vae(layers_per_block=2))
    randomise(vae)
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    return vae


def latents(dtype: torch.dtype = torch.float64) -> Tensor:
    """Two clips of three frames."""
    return torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def decoded(vae: VideoVAE, rows: int | None, z: Tensor, **settings: bool) -> Tensor:
    vae.stream(rows)
    return vae.decode(z, **settings).sample


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_clips_are_those_that_are_decoded_whole(dtype: torch.dtype, tolerance: float) -> None:
    vae, z = trained_vae(dtype), latents(dtype)
    expected = decoded(vae, None, z)
    for rows in ROWS:
        found = decoded(vae, rows, z)
        assert found.dtype == dtype
        assert relative(found, expected) < tolerance


def test_half_precision_rounds_no_more_than_whole_clips_do() -> None:
    exact = decoded(trained_vae(), None, latents(torch.bfloat16).double())
    vae, z = trained_vae(torch.bfloat16), latents(torch.bfloat16)
    whole = relative(decoded(vae, None, z).double(), exact)
    assert relative(decoded(vae, 3, z).double(), exact) < 1.2 * whole


def test_images_and_clips_without_temporal_layers_are_decoded_one_by_one() -> None:
    vae, z = trained_vae(), latents()
    for given, settings in ((z, {"image_only": True}), (z[0], {})):
        assert relative(decoded(vae, 2, given, **settings), decoded(vae, None, given, **settings)) < 1e-14


def test_the_variance_beside_a_large_mean_is_not_lost_in_float32() -> None:
    clip = torch.randn(6, 1, 4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
    parts = [part.float() for part in clip.split(1)]
    mean, variance = moments([*parts, parts[0][..., :2]], groups=2)
    whole = torch.cat([part.reshape(2, -1) for part in [*parts, parts[0][..., :2]]], dim=1).double()  # (2, n)
    torch.testing.assert_close(mean.double(), whole.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), whole.var(1, correction=0), rtol=1e-2, atol=0)


def gradients(vae: VideoVAE, rows: int | None, z: Tensor, passes: int = 1) -> dict[str, Tensor]:
    """Of the latents and of every parameter that learns, for another weight on each pixel."""
    vae.stream(rows)
    vae.zero_grad()
    z = z.clone().requires_grad_()
    pixels = vae.decode(z).sample
    loss = (pixels * torch.linspace(-1, 1, pixels.numel(), dtype=pixels.dtype).view_as(pixels)).sum()
    for _ in range(passes):
        loss.backward(retain_graph=True)
    found = {name: value.grad / passes for name, value in vae.named_parameters() if value.grad is not None}
    return {**found, "latents": z.grad / passes}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, beside the norm of its own gradient or, where that vanishes, a millionth of them all."""
    assert found.keys() == expected.keys()
    least = 1e-6 * torch.stack([value.norm() for value in expected.values()]).max()
    return max(((found[n] - v).norm() / v.norm().clamp(min=least)).item() for n, v in expected.items())


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The difference of all gradients as one vector."""
    assert found.keys() == expected.keys()
    return relative(*(torch.cat([one[name].flatten() for name in expected]) for one in (found, expected)))


@pytest.mark.parametrize("temporal_alone", [False, True])
def test_gradients_of_inputs_and_weights_are_those_of_whole_clips(temporal_alone: bool) -> None:
    vae, z = trained_vae(), latents()
    vae.requires_grad_(not temporal_alone)
    for parameter in vae.temporal_parameters().values():
        parameter.requires_grad_(True)
    expected = gradients(vae, None, z)
    assert all(".temporal." in name or name == "latents" for name in expected) is temporal_alone
    for rows in ROWS:
        assert worst(gradients(vae, rows, z), expected) < 1e-10


def test_a_graph_that_is_kept_can_be_gone_through_again() -> None:
    vae, z = trained_vae(), latents()
    assert worst(gradients(vae, 3, z, passes=2), gradients(vae, None, z)) < 1e-10


def test_gradients_in_float32_and_beside_other_recomputation() -> None:
    vae, z = trained_vae(torch.float32).train(), latents(torch.float32)
    expected = gradients(vae, None, z)
    vae.enable_gradient_checkpointing()
    assert apart(gradients(vae, 3, z), expected) < 1e-5


def test_weights_learn_under_autocast_as_they_do_on_whole_clips() -> None:
    vae, z = trained_vae(torch.float32), latents(torch.float32)
    exact = gradients(vae, None, z)
    with torch.autocast("cpu", torch.bfloat16):
        whole, found = gradients(vae, None, z), gradients(vae, 3, z)
    assert apart(found, exact) < 1.2 * apart(whole, exact)


def test_every_layer_below_the_head_belongs_to_a_unit() -> None:
    decoder = trained_vae().decoder
    found = [parameter for unit in units(decoder) for parameter in unit.parameters()]
    found += decoder.conv_out.temporal.parameters()
    assert sorted(map(id, found)) == sorted(map(id, decoder.parameters()))


def test_training_keeps_the_inputs_of_units_alone() -> None:
    vae = trained_vae(torch.float32).to("meta")
    vae.requires_grad_(False)
    for parameter in vae.temporal_parameters().values():
        parameter.requires_grad_(True)
    held = {}
    for rows in (None, 2):
        vae.stream(rows)
        clip = lambda: torch.empty(1, 8, 4, 8, 8, device="meta")  # noqa: E731
        held[rows] = simulate(vae, clip, lambda network, z: network.decode(z).sample.sum()).held
    assert held[2] < held[None] / 6


def test_the_published_decoder_decodes_25_frames_in_6_gb_beside_its_weights() -> None:
    vae = svd_outline.outline("stabilityai/stable-video-diffusion-img2vid", None, 25).vae
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    vae.stream(32)
    ledger = Ledger()
    ledger.record(vae.parameters())
    weights = ledger.current
    with torch.no_grad(), fused_attention(), ledger:
        vae.decode(torch.empty(1, 25, 4, 72, 128, dtype=torch.bfloat16, device="meta"))
    assert 3.8e9 < ledger.peak - weights < 6e9  # the last level's map alone is 3.77 GB


def test_a_number_of_rows_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="1 or more"):
        trained_vae().stream(0)
