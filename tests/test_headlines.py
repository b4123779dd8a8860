"""The memory that is promised: each row of README's table of cards, and what a step of the real models needs at most.

All is worked out on paper at the real sizes. Decoding, training a decoder and sampling are held by their own tests
(`tests/models/test_streaming.py`, `tests/test_planning.py`, `tests/training/test_sampling_cost.py`).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import recompute

from inflate.planning import Planner
from inflate.training.cards import Card
from inflate.training.cost import Cost
from inflate.training.memory_settings import Memory

ROOT = Path(__file__).resolve().parents[1]
SVD = "model.path=stabilityai/stable-video-diffusion-img2vid"
SIZES = {
    "25x576x1024": [f"{SVD}-xt", "data.frames=25", "data.height=576", "data.width=1024"],
    "14x320x512": [SVD, "data.frames=14", "data.height=320", "data.width=512"],
}
CARDS = {"LoRA": "attention_lora", "full": "full"}
ROW = re.compile(r"^\| (LoRA|full), (\d+) GB \| ([\d.]+) \|.*\| `(.+)` \|$", re.MULTILINE)
"""What learns, the card, the GB that are needed, and the settings to add."""
ROWS = ROW.findall((ROOT / "README.md").read_text())


def cost(learns: str, size: str, added: str) -> Cost:
    """What the command above README's table costs with these settings added."""
    files = [str(ROOT / name) for name in ("recipes/svd_image_to_video.yaml", f"adapters/{CARDS[learns]}.yaml")]
    given = ["data.path=clips", "data.cache=cache", "data.cache_draws=4", "training.accumulate=1", *SIZES[size]]
    return Planner(ROOT / "recipes/svd_finetune.py", [*files, *given, *added.split()]).cost({})


def added(learns: str, card: str) -> str:
    """The settings of a row."""
    return next(settings for what, memory, _, settings in ROWS if (what, memory) == (learns, card))


def told(learns: str, card: str) -> float:
    """The GB of a row."""
    return next(float(needed) for what, memory, needed, _ in ROWS if (what, memory) == (learns, card))


def test_every_card_has_a_row() -> None:
    assert [row[:2] for row in ROWS] == [
        *(("LoRA", size) for size in ("8", "12", "16", "24", "48", "80")),
        *(("full", size) for size in ("16", "24", "48", "80")),
    ]


CARDS_OF = {(learns, settings): [row[1] for row in ROWS if (row[0], row[3]) == (learns, settings)]
            for learns, _, _, settings in ROWS}  # fmt: skip
"""The cards that what learns is trained on by the same settings, which need to be planned once."""


@pytest.mark.slow
@pytest.mark.parametrize(("learns", "settings"), CARDS_OF, ids=[f"{k[0]}-{'-'.join(v)}" for k, v in CARDS_OF.items()])
def test_each_row_fits_its_card_as_told(learns: str, settings: str) -> None:
    found = cost(learns, "25x576x1024", settings)
    for card in CARDS_OF[learns, settings]:
        assert found.peak / 1e9 == pytest.approx(told(learns, card), abs=0.006)
        assert found.peak <= Card.parse(f"{card}GB").usable
        assert found.peak / 1e9 <= {("full", "16"): 14.5}.get((learns, card), 80)


@pytest.mark.slow
def test_an_exact_lora_and_one_over_int8_leave_room_on_8_gb() -> None:
    for more in ("memory.recompute=nested", "memory.base=int8"):
        assert cost("LoRA", "25x576x1024", f"{added('LoRA', '8')} {more}").peak / 1e9 <= 6.8


@pytest.mark.slow
def test_short_clips_are_learnt_in_half_of_that() -> None:
    assert cost("LoRA", "14x320x512", f"{added('LoRA', '8')} memory.base=int8").peak / 1e9 <= 3.5


@pytest.mark.slow
def test_a_lora_on_a_network_of_i2vgen_xls_shape_is_trained_in_10_gb() -> None:
    case = recompute.Case("i2vgen", "lora", (16, 704, 1280))
    assert recompute.cost(case, Memory("units", feed_forward_parts=8, offload=True)).peak / 1e9 <= 10
