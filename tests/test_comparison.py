"""Adapters side by side: the base first, the same inputs, what the files show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_adapter_cli import Made, made, moved, told
from test_cli import inflate, refused

from helpers import randomise
from inflate import comparison
from inflate.adapters import attach, bases, file, targets
from inflate.adapters.settings import AdapterSettings, Weighted
from inflate.data import video
from inflate.errors import ConfigError, DataError
from inflate.families.video_ldm import VideoLDM

__all__ = ["made"]


def test_a_column_is_named_by_its_file_or_folder_and_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("pan/export/pytorch_lora_weights.safetensors")
    run.parent.mkdir(parents=True)
    for each in (run, Path("zoom.safetensors")):
        each.touch()
    assert comparison.columns(["pan", "pan:0.8+zoom:-1"]) == {
        "pan 1": [Weighted(run)], "pan 0.8 + zoom -1": [Weighted(run, 0.8), Weighted(Path("zoom.safetensors"), -1)],
    }  # fmt: skip
    with pytest.raises(ConfigError, match="pan 1 is in the comparison already"):
        comparison.columns(["pan", "pan:1.0"])


def test_the_files_show_every_clip_under_its_label(tmp_path: Path) -> None:
    shades = {"base": (40, 80), "<b> 1": (120, 160)}
    drawn = {name: [np.full((3, 16, 24, 3), each, np.uint8) for each in pair] for name, pair in shades.items()}
    comparison.write(tmp_path / "out", drawn, ["a, seed 0", "a, seed 1"], 8, "model")
    grid = video.read(tmp_path / "out" / comparison.GRID)
    assert grid.shape == (3, 22 + 2 * 16 * 5, 2 * 24 * 5, 3)
    seen = [[round(float(grid[0, 60 + 80 * row, 60 + 120 * column].mean())) for column in (0, 1)] for row in (0, 1)]
    assert np.abs(np.array(seen) - [[40, 120], [80, 160]]).max() <= 4
    page = (tmp_path / "out" / comparison.PAGE).read_text()
    assert "&lt;b&gt; 1" in page
    assert "<b>" not in page
    for row in (0, 1):
        for column in (0, 1):
            name = f"clips/{row:02d}-{column:02d}.mp4"
            assert f'src="{name}"' in page
            assert abs(float(video.read(tmp_path / "out" / name).mean()) - [[40, 120], [80, 160]][row][column]) <= 4
    assert video.read_image(tmp_path / "out" / comparison.SHEET).shape[0] == 4 * (16 * 5 + 2)
    with pytest.raises(DataError, match="clips of one size"):
        comparison.write(tmp_path / "no", drawn | {"c": [np.zeros((3, 8, 8, 3), np.uint8)] * 2}, ["a", "b"], 8, "m")
    assert not (tmp_path / "no").exists()


def test_the_command_draws_the_base_and_each_adapter(made: Made, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(photo)
    common = ("--steps", 2, "--frames", 2)
    columns = [f"{made.adapter}{weight}" for weight in (":0", "", f":0.5+{made.adapter}:0.5", ":0.25")]
    options = [option for column in columns for option in ("--adapter", column)]
    out = tmp_path / "out"
    assert told(inflate("compare", made.base, photo, *options, *common, "-o", out)).count("wrote") == 3
    clips = [(out / "clips" / f"00-{column:02d}.mp4").read_bytes() for column in range(5)]
    base, zero, whole, halves, quarter = clips
    assert base == zero
    assert whole == halves  # two adapters act as the sum of them
    assert len({base, whole, quarter}) == 3
    told(inflate("sample", made.base, photo, *common, "-o", tmp_path / "alone.mp4", "--adapter", made.adapter))
    assert (tmp_path / "alone.mp4").read_bytes() == whole
    assert "exists already" in refused("compare", made.base, photo, *options, "-o", out)
    assert "is an image and others are prompts" in refused(
        "compare", made.base, photo, "a prompt", *options, "-o", tmp_path / "no"
    )
    stranger = moved(made, tmp_path / "b.safetensors", {"name": "other", "sha256": "0" * 64})
    assert "was made on other" in refused(
        "compare", made.base, photo, *common, "--adapter", stranger, "-o", tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()


def test_prompts_are_drawn_with_each_seed(tmp_path: Path) -> None:
    unet, wanted = VideoLDM.load("pocket").unet, AdapterSettings("lora", rank=1, targets=["attn1.to_v"])
    about = {"family": "video_ldm", "base": {"name": "pocket", "sha256": bases.sha256(unet)}}
    attach.create(unet, wanted, targets.resolve(unet, wanted))
    randomise(unet)
    file.write(tmp_path / "look.safetensors", attach.carried(unet, wanted, about))
    out = tmp_path / "out"
    common = ("--adapter", f"{tmp_path / 'look'}:0.5", "--steps", 1, "--frames", 2, "-o", out)
    told(inflate("compare", "pocket", "a red disc", "a blue box", "--seeds", 2, *common))
    clips = {path.name: path.read_bytes() for path in (out / "clips").iterdir()}
    assert len(clips) == len({*clips.values()}) == 8
    page = (out / comparison.PAGE).read_text()
    assert all(each in page for each in ("<th>base</th><th>look 0.5</th>", "<th>a blue box, seed 1</th>"))
