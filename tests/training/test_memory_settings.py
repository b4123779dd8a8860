import pytest

from inflate.errors import ConfigError
from inflate.training.memory_settings import Memory


def test_wrong_settings_name_themselves_and_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"recompute_in: up_blocks.3: unit is none of nothing, .*, nested"):
        Memory(recompute_in={"up_blocks.3": "unit"})
    with pytest.raises(ConfigError, match=r"feed_forward_parts=0: at least 1"):
        Memory(feed_forward_parts=0)
    with pytest.raises(ConfigError, match=r"offload=true moves what recomputed units keep.*set memory.recompute=units"):
        Memory("feed_forward", offload=True)
    assert Memory(recompute_in={"up_blocks.3": "units"}, offload=True).offload
