"""The before/after video and the card of a run."""

import inspect
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from inflate import refine_cli, sample_cli
from inflate.data import video
from inflate.sampling.dpm_solver import levels_of
from inflate.sampling.i2vgen_xl import Sampling
from inflate.sampling.refinement import PUBLISHED, Refinement
from inflate.training.card import (
    ANIMATION_USE,
    REFINEMENT_USE,
    UNPROMPTED_USE,
    drawn_as,
    image_use,
    refined_as,
    write_card,
)
from inflate.training.i2vgen_xl import Preview
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


def options_of(use: str) -> dict[str, str]:
    """The options of a card's command by their names; of a switch, the other half of it."""
    words = shlex.split(use.splitlines()[1])
    return {word: after for word, after in zip(words, [*words[1:], ""], strict=True) if word.startswith("-")}


def test_a_cards_command_draws_as_previews_were_drawn() -> None:
    assert drawn_as(ANIMATION_USE, Preview(), Preview()) == ANIMATION_USE
    assert UNPROMPTED_USE == "```bash\ninflate sample export image.png -o out.mp4\n```"
    told = drawn_as(ANIMATION_USE, Preview(steps=15, guidance=3.0, spacing="trailing"), Preview())
    assert 'image.png --prompt "a prompt" --steps 15 --guidance 3 -o out.mp4' in told
    usual = asdict(Sampling())
    assert {name: usual[name] for name in asdict(Preview())} == asdict(Preview())  # what the command has of its own


def test_a_refiners_card_draws_anew_as_previews_were() -> None:
    assert refined_as(Refinement(), 600) == REFINEMENT_USE
    assert "--model export" in refined_as(Refinement(), 600)
    drawn = Refinement("inversion", strength=0.25, steps=15, guidance=1.0, keep_colours=2)
    told = options_of(refined_as(drawn, 600))
    assert levels_of(float(told.pop("--strength")), PUBLISHED["inversion"].levels or 0) == 150  # a quarter of 600
    del told["--model"], told["--prompt"], told["-o"]
    assert told == {
        "--start": "inversion", "--steps": "15", "--guidance": "1", "--suffix": "", "--no-freeu": "--keep-colours",
        "--keep-colours": "2",
    }  # fmt: skip
    guided = refined_as(replace(drawn, guidance=9.0, freeu=True), 600)
    assert "--rescale 0.2" in guided
    assert "freeu" not in guided


@pytest.mark.parametrize(
    ("use", "command"),
    [
        (drawn_as(ANIMATION_USE, Preview(1, 2.0, 0.3, 0.4), Preview()), sample_cli.sample),
        (refined_as(Refinement("inversion", 0.1, eta=0.5, keep_colours=1), 600), refine_cli.refine),
    ],
)
def test_a_cards_options_are_the_commands(use: str, command: Callable[..., None]) -> None:
    names = {name.lstrip("-").removeprefix("no-").replace("-", "_") for name in options_of(use)}
    assert len(names) >= 6
    assert names - {"o"} <= inspect.signature(command).parameters.keys()
