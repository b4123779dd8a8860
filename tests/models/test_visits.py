"""Networks that are on a device only while they work."""

from torch import nn

from inflate.models.visits import visiting
from inflate.training.paper import DEVICE, Paper, on_paper


def test_a_network_comes_and_goes_also_where_its_work_fails_and_one_that_is_there_stays() -> None:
    paper = Paper()
    away, there = nn.Linear(2, 3, device="meta"), nn.Linear(3, 2)
    paper.adopt(there)
    kept = there.weight
    with paper.active():
        for fails in (False, True):
            try:
                with visiting([away, there], DEVICE):
                    assert on_paper(away.weight)
                    assert there(away(paper.empty(4, 2))).shape == (4, 2)
                    if fails:
                        raise ZeroDivisionError
            except ZeroDivisionError:
                assert fails
            assert away.weight.is_meta
            assert not on_paper(away.weight)
        assert there.weight is kept
