"""Tensors in 8 bits: which values there are, that the nearest is taken, and that rows do not depend on one another."""

import pytest
import torch

from inflate.training import eight_bits
from inflate.training.eight_bits import BLOCK, Coded, decode, encode, values

FINEST = 2.0**-11
"""Relative width of the numbers that are told apart."""


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)) * torch.logspace(-4, 0, shape[-1])


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_has_256_values_of_seven_decades(signed: bool) -> None:
    known = torch.tensor(values(signed))
    assert len(known) == 256
    assert bool((known.diff() > 0).all())
    assert known[-1] == 1.0
    assert known.abs().min() == 0.0
    top, least = (64, 5.5e-7) if signed else (128, 3.25e-7)
    assert int((known > 0.1).sum()) == top + 1
    assert known[known > 0].min() == pytest.approx(least)
    assert bool((known[:127] == -known[128:255].flip(0)).all()) is signed


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(3, 700), (5, 4, 3, 3), (2, BLOCK)])
def test_the_nearest_value_is_taken(signed: bool, shape: tuple[int, ...]) -> None:
    full = tensor(*shape) if signed else tensor(*shape).abs()
    coded = encode(full, signed)
    assert (coded.codes.shape, coded.codes.dtype) == (full.shape, torch.uint8)
    found, known = decode(coded, signed), torch.tensor(values(signed))
    scale = coded.scales.repeat_interleave(-(-full[0].numel() // coded.scales.shape[1]), 1)[:, : full[0].numel()]
    relative = full.flatten(1) / scale
    nearest = (relative[..., None] - known).abs().amin(-1)
    error = (found.flatten(1) / scale - relative).abs()
    assert bool((error <= nearest + FINEST * relative.abs() + 1e-9).all())


def test_rows_are_coded_by_themselves_and_zeros_stay_zeros() -> None:
    full = tensor(6, 300)
    whole, parts = encode(full, True), [encode(part, True) for part in full.split(2)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert torch.equal(whole.scales, torch.cat([part.scales for part in parts]))
    assert whole.scales.shape == eight_bits.empty(full).scales.shape == (6, 2)
    assert not decode(eight_bits.empty(full), True).any()
    assert not decode(encode(torch.zeros(2, 3), False), False).any()
    assert encode(full[:0], True).codes.shape == (0, 300)


def test_the_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="pip install bitsandbytes to compare with it")
    full = tensor(40, BLOCK)
    for signed in (True, False):
        code, given = functional.create_dynamic_map(signed=signed), full if signed else full.abs()
        torch.testing.assert_close(torch.tensor(values(signed)), code, rtol=1e-6, atol=1e-7)
        theirs, state = functional.quantize_blockwise(given, code=code, blocksize=BLOCK)
        ours, theirs = encode(given, signed), theirs.view_as(given)
        assert torch.equal(ours.scales.flatten(), state.absmax)
        ordinary = given.abs() > 0.01 * ours.scales  # on a CPU it rounds what is less to coarser values
        apart = (ours.codes.int() - theirs.int())[ordinary]
        assert int(apart.abs().max()) <= 1
        assert float((apart != 0).float().mean()) < 0.02  # beside the middle between two values
        restored = functional.dequantize_blockwise(theirs, state)
        assert ((decode(ours, signed) - given).abs() <= (restored - given).abs() + FINEST * given.abs()).all()
        torch.testing.assert_close(decode(Coded(theirs, ours.scales), signed), restored)
