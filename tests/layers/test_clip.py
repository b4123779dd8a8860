import copy

import pytest
from torch import nn

from inflate.errors import InflateError
from inflate.layers.clip import Clip, ClipState


class Owner(nn.Module):
    """Owns a clip state."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = Clip()


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


def test_the_holder_is_copied_with_its_model():
    pair = nn.ModuleList([Owner(), Owner()])
    pair[1].clip = pair[0].clip
    twin = copy.deepcopy(pair)
    assert twin[0].clip is twin[1].clip
    assert twin[0].clip is not pair[0].clip
