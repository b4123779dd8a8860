import copy

import pytest
import torch
from torch import nn

from inflate.errors import InflateError
from inflate.layers.clip import Clip, ClipState, recomputes, run, set_recompute


class Scaled(nn.Module):
    """Multiplies by the number of frames: a stand-in for a layer that depends on the clip state."""

    recompute = None

    def __init__(self) -> None:
        super().__init__()
        self.clip = Clip()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, value):
        return run(self, lambda value: self.weight * value * value * self.clip.state.frames, value)


def keep(function, *tensors):
    return torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False)


def test_a_state_outside_a_forward_pass_is_an_error():
    with pytest.raises(InflateError, match="call the whole model"):
        Clip().state  # noqa: B018 -- reading it is the test


def test_during_nests_and_puts_back_also_after_an_error():
    clip = Clip()
    with clip.during(ClipState(3)):
        with pytest.raises(KeyError), clip.during(ClipState(5)):
            raise KeyError
        assert clip.state.frames == 3
    with pytest.raises(InflateError):
        clip.state  # noqa: B018 -- reading it is the test


def test_recomputation_sees_the_state_of_its_own_forward_pass():
    layer = Scaled()
    set_recompute(layer, keep)
    value = torch.tensor(2.0, requires_grad=True)
    total = torch.zeros(())
    for frames in (3, 5):
        with layer.clip.during(ClipState(frames)):
            total = total + layer(value)
    total.backward()
    assert layer.weight.grad == 4 * (3 + 5)
    assert value.grad == 2 * 2 * (3 + 5)


def test_set_recompute_switches_on_and_off():
    layer = nn.Sequential(Scaled(), nn.Linear(2, 2))
    set_recompute(layer, keep)
    assert recomputes(layer)
    set_recompute(layer, None)
    assert not recomputes(layer)


def test_the_holder_is_copied_with_its_model():
    pair = nn.ModuleList([Scaled(), Scaled()])
    pair[1].clip = pair[0].clip
    twin = copy.deepcopy(pair)
    assert twin[0].clip is twin[1].clip
    assert twin[0].clip is not pair[0].clip
