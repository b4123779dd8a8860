from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from inflate.layers.offload import Offload, Parcel, is_resting, resting

keep = partial(checkpoint, use_reentrant=False)


def features(seed=0):
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(True)


def chain(around, given):
    """Four units on a value, of which each sees the first input, too, as a skip connection."""
    unit, value = around(keep), given
    for _ in range(4):
        value = unit(lambda value, skip, time: (value * skip).sin() * time, value, given, value.new_full((1,), 0.5))
    return value


def test_gradients_are_those_without_and_copies_keep_their_layout():
    plain, rested = features(), features()
    chain(lambda function: function, plain).sum().backward()
    chain(Offload().around, rested).sum().backward()
    assert torch.equal(rested.grad, plain.grad)
    last = features().detach().contiguous(memory_format=torch.channels_last)
    assert Offload().slot(last).take().stride() == last.stride()


def test_a_tensor_that_two_units_keep_rests_once_and_is_forgotten_with_the_graph():
    offload, given = Offload(), features()
    first = offload.slot(given)
    assert offload.slot(given) is first
    with torch.no_grad():
        given.add_(1)
    assert offload.slot(given) is not first
    output = chain(offload.around, features())
    assert len(offload._slots) == 4  # `given` in both its states, what the chain was given, and what left last
    offload.settle()
    del given, first, output
    assert offload._slots == {}


def test_what_is_needed_next_sets_out_a_unit_ahead(monkeypatch):
    offload, log = Offload(), []
    slots = [offload.slot(features(seed)) for seed in range(3)]
    for number, slot in enumerate(slots):
        fetch = slot.fetch
        monkeypatch.setattr(slot, "fetch", lambda number=number, fetch=fetch: log.append(number) or fetch())
    parcels: list[Parcel] = []
    for slot in slots:
        parcels.append(Parcel(offload, parcels[-1] if parcels else None))
        parcels[-1].slots.append(slot)
    for parcel in reversed(parcels):
        parcel.take(0)
        log.append("used")
    assert log == [2, 1, "used", 1, 0, "used", 0, "used"]
    assert all(slot.back is None for slot in slots)


def test_tensors_are_made_at_rest_only_where_it_is_said():
    with resting():
        assert is_resting()
        with resting():
            pass
        assert is_resting()
    assert not is_resting()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside the computation need a GPU")
def test_copies_beside_the_computation_are_read_when_they_are_done():
    plain, rested = (features().detach().repeat(1, 1, 64, 64).cuda().requires_grad_(True) for _ in range(2))
    offload = Offload()
    for _ in range(3):
        plain.grad = rested.grad = None
        chain(lambda function: function, plain).sum().backward()
        chain(offload.around, rested).sum().backward()
        assert torch.equal(rested.grad, plain.grad)
