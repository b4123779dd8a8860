"""The before/after video and the card of a run."""

from pathlib import Path

import numpy as np

from inflate.data import video
from inflate.training.card import image_use, write_card
from inflate.training.previews import LEAST_HEIGHT, compare_previews


def write_clips(folder: Path, value: int, count: int = 2, frames: int = 3) -> Path:
    for number in range(count):
        video.write(folder / f"{number:02d}.mp4", np.full((frames, 32, 48, 3), value, np.uint8), 8)
    return folder


def test_before_stands_above_after(tmp_path: Path) -> None:
    before, after = write_clips(tmp_path / "before", 40), write_clips(tmp_path / "after", 200)
    compare_previews(before, after, tmp_path / "before_after")
    frames = video.read(tmp_path / "before_after.mp4", range(3))
    height, width = frames.shape[1:3]
    assert height == 2 * LEAST_HEIGHT
    assert width == 2 * 48 * LEAST_HEIGHT // 32
    assert abs(int(frames[0, height // 4, 5, 0]) - 40) < 8
    assert abs(int(frames[0, 3 * height // 4, 5, 0]) - 200) < 8
    assert (tmp_path / "before_after.png").is_file()


def test_nothing_is_written_without_a_common_video(tmp_path: Path) -> None:
    before, after = write_clips(tmp_path / "before", 40, count=0), write_clips(tmp_path / "after", 200)
    compare_previews(before, after, tmp_path / "before_after")
    assert not (tmp_path / "before_after.mp4").exists()


def test_the_card_states_what_was_measured(tmp_path: Path) -> None:
    held_out = [{"step": 0, "loss": 0.5}, {"step": 8, "loss": 0.25, "new": 1.0}]
    path = write_card(
        tmp_path, "A title", {"clips": "mine"}, held_out, {"frame 0": 31.5}, "stage: decoder\n", image_use(8)
    )
    text = path.read_text()
    assert "| loss | 0.5 | 0.25 |" in text
    assert "| frame 0 | 31.5 |" in text
    assert "- clips: mine" in text
    assert "new" not in text
    assert "decode_chunk_size=8" in text
    assert "stage: decoder" in text
