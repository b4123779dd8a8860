"""Camera clips by rule: what is seen moves as asked, and nothing outside the picture is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import inflate
from helpers import load_recipe
from inflate.data import camera, video
from inflate.data.camera import MOVES, Move, Shot, Still
from inflate.errors import DataError
from inflate.metrics.evaluate import Settings, evaluate
from inflate.metrics.flow import motions

Pixels = np.ndarray
SCRIPT = Path(__file__).parents[2] / "datasets" / "build_camera.py"


def picture(height: int = 150, width: int = 220) -> Pixels:
    """A smooth random pattern."""
    waves, phases = np.random.default_rng(4).normal(0, 0.22, (2, 30)), np.random.default_rng(5).uniform(0, 6, 30)
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    light = np.sin(x[..., None] * waves[0] + y[..., None] * waves[1] + phases).sum(-1) / 12
    return np.clip(127.5 + 127.5 * light, 0, 255).round().astype(np.uint8)[..., None].repeat(3, -1)


def filmed(move: Move, speed: float = 0.15, pixels: Pixels | None = None, **shape: Any) -> tuple[Pixels, camera.Motion]:
    still = Still(picture() if pixels is None else pixels, "", "picture")
    shot, motion = Shot(move, **{"frames": 8, "height": 32, "width": 48, **shape}), camera.motion_of(move, speed)
    view = camera.begin(still, shot, motion, np.random.default_rng(1))
    return camera.film(still, view, shot, motion), motion


@pytest.mark.parametrize(
    ("move", "name"),
    list(zip(MOVES, ["right", "left", "down", "up", "in", "out", "anticlockwise", "clockwise"], strict=True)),
)
def test_the_flow_of_a_clip_is_the_movement_asked(move: Move, name: str) -> None:
    frames, truth = filmed(move, height=64, width=64)
    found = motions(frames, 8).scene
    assert found is not None
    assert (truth.name, found.name) == (name, name)
    asked, measured = ([m.right, m.down, m.zoom, m.turn] for m in (truth, found))
    assert measured == pytest.approx(asked, abs=0.025)


@pytest.mark.parametrize("move", ["zoom_out", "roll_clockwise", "pan_left", "tilt_down"])
def test_nothing_outside_the_picture_is_seen(move: Move) -> None:
    frames, _ = filmed(move, 0.24, np.full((61, 93, 3), 255, np.uint8), frames=16)
    assert frames.min() == 255  # what lies outside would be black


def test_a_pan_by_whole_pixels_moves_the_pixels() -> None:
    still, shot = Still(picture(), "", "picture"), Shot("pan_right", 4, 32, 32, fps=8)
    motion = camera.motion_of("pan_right", 8 / 32)  # a pixel per frame
    frames = camera.film(still, camera.View(60, 50, 32), shot, motion)
    for number, frame in enumerate(frames):
        expected = still.picture[34:66, 44 + number : 76 + number]
        assert np.abs(frame.astype(int) - expected).max() <= 1


def test_detail_too_fine_for_the_clip_is_averaged() -> None:
    """Columns of single pixels, seen at a third of their size, are grey and not a pattern of their own."""
    fine = np.zeros((200, 200, 3), np.uint8)
    fine[:, ::2] = 255
    frames, _ = filmed("pan_left", 0.12, fine, height=32, width=32)
    assert np.abs(frames.astype(int) - 127).max() < 45


def test_a_picture_too_small_is_refused_with_the_size_it_needs() -> None:
    with pytest.raises(DataError, match=r"picture is 40x40, too small for 48x32 clips of zoom_in: it needs \d+x\d+"):
        filmed("zoom_in", pixels=picture(40, 40))
    needed = (92, 63)
    frames, _ = filmed("zoom_in", 0.24, picture(needed[1], needed[0]))
    assert frames.shape == (8, 32, 48, 3)


@pytest.mark.parametrize("wrong", [{"frames": 1}, {"height": 8}, {"fps": 0}, {"slowest": 0.5}, {"slowest": 0.0}])
def test_impossible_shots_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="camera"):
        Shot("pan_left", **wrong)


def test_a_view_of_the_demo_world_begins_as_its_clips_do() -> None:
    shot = Shot("zoom_out", 16, 64, 64, slowest=0.2, fastest=1.0)
    [take] = camera.from_demo(1, shot, seed=3)
    still = take(np.random.default_rng(0))
    assert still.view is not None
    frames = camera.film(still, still.view, shot, camera.motion_of(shot.move, shot.fastest))
    scene = next(scene for scene in camera._scenes(3) if scene.texture != "plain")
    whole = camera.demo.render(scene, [0.0], 64)[0]
    assert np.abs(frames[0].astype(float) - whole).mean() < 2
    assert still.caption == scene.view
    assert frames.min() > 0


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]


def test_a_built_dataset_moves_as_its_metadata_tell(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Image.fromarray(picture()).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("waves")
    shot = Shot("tilt_up", 8, 32, 32)
    folder = camera.build(tmp_path / "out", camera.from_files(tmp_path), shot, clips=3, held_out=1)
    every = {split: rows(folder, split) for split in ("train", "held_out")}
    assert {split: len(found) for split, found in every.items()} == {"train": 3, "held_out": 1}
    sources = {split: {row["source"] for row in found} for split, found in every.items()}
    assert not sources["train"] & sources["held_out"]
    captions = {row["source"]: row["caption"] for found in every.values() for row in found}
    assert captions == {
        "a.png": "waves, the camera tilts up", "b.png": "the camera tilts up", "c.png": "the camera tilts up",
    }  # fmt: skip
    found = evaluate(Settings(folder / "train"), lambda name: lambda done, whole: None, torch.device("cpu"))
    assert found.means["direction as asked"]["mean"] == 1
    for row in every["train"]:
        scene = found.clips[row["file_name"].removesuffix(".mp4")]["scene"]
        assert scene["down"] == pytest.approx(row["down"], abs=0.02)
        assert shot.slowest <= row["down"] <= shot.fastest
    small = Shot("tilt_up", 2, 16, 16)
    again = camera.build(tmp_path / "again", camera.from_files(tmp_path / "out" / "train"), small, clips=1)
    assert rows(again, "train")[0]["caption"].endswith("the camera tilts up, the camera tilts up")


def test_clips_give_any_of_their_frames(tmp_path: Path) -> None:
    shades = np.stack([np.full((128, 128, 3), 40 * n, np.uint8) for n in range(5)])
    video.write(tmp_path / "clips" / "a.mp4", shades, 8)
    shot = Shot("pan_left", 2, 16, 16)
    folder = camera.build(tmp_path / "out", camera.from_files(tmp_path / "clips"), shot, clips=6)
    files = sorted((folder / "train").glob("*.mp4"))
    assert len({round(float(video.read(file).mean()) / 40) for file in files}) > 2
    again = camera.build(tmp_path / "again", camera.from_files(tmp_path / "clips"), shot, clips=6)
    assert [file.read_bytes() for file in files] == [(again / "train" / file.name).read_bytes() for file in files]


def test_what_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.png")
    shot, takes = Shot("pan_left", 4, 32, 32), camera.from_files(tmp_path)
    with pytest.raises(DataError, match="a source of their own"):
        camera.build(tmp_path / "out", takes, shot, clips=1, held_out=1)
    with pytest.raises(DataError, match="too small"):
        camera.build(tmp_path / "out", takes, Shot("pan_left", 4, 320, 320), clips=1)
    with pytest.raises(DataError, match="cannot be built"):
        camera.build(tmp_path / "out", takes, shot, clips=0)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="exists already"):
        camera.build(tmp_path, takes, shot, clips=1)


def test_the_script_films_the_demo_world_or_pictures(tmp_path: Path) -> None:
    found = {**os.environ, "PYTHONPATH": str(Path(inflate.__file__).parents[1])}
    command = [sys.executable, str(SCRIPT), "--move", "pan_left", "--clips", "1", "--held-out", "1", "--frames", "4"]
    command += ["--demo", str(tmp_path / "out"), "--size", "32x32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=found)
    assert done.stdout == f"wrote {tmp_path / 'out'}\n"
    assert "over" in rows(tmp_path / "out", "train")[0]["caption"]
    with pytest.raises(DataError, match="name a folder of pictures or clips, or --demo, and one of them only"):
        load_recipe(SCRIPT).build(Namespace(demo=False, pictures=None))
