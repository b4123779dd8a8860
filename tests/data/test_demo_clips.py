"""The demo builder: exact, repeatable, all or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import inflate
from inflate.data import demo, demo_clips, video
from inflate.errors import DataError


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_build_writes_clips_captions_and_motion(tmp_path):
    folder = demo_clips.build(tmp_path / "demo", clips=3, held_out=2)
    for split, count in (("train", 3), ("held_out", 2)):
        lines = [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]
        assert len(lines) == count
        for line in lines:
            found = video.probe(folder / split / line["file_name"])
            assert (found.frames, found.fps, found.height, found.width) == (16, pytest.approx(8), 64, 64)
            assert line["motion"] in {"left", "right", "up", "down", "in", "out"}
            assert line["speed"] in line["caption"]


def test_stored_truth_renders_the_stored_pixels(tmp_path):
    folder = demo_clips.build(tmp_path / "demo", clips=2, held_out=0)
    line = json.loads((folder / "train" / "metadata.jsonl").read_text().splitlines()[1])
    scene = demo.Scene.of(line)
    exact = demo.render(scene, np.arange(16) / demo.FPS)
    stored = video.read(folder / "train" / line["file_name"])
    difference = stored.mean(-1) - exact.mean(-1)  # brightness: colour has half the resolution
    assert np.abs(difference).mean() < 5
    assert scene.caption == line["caption"]


def test_of_told_scenes_the_first_frame_does_not_say_where_they_fly():
    rng = np.random.default_rng(0)
    scenes = [demo.draw_scene(rng, told=True) for _ in range(20)]
    assert {scene.shape for scene in scenes} == {"disc", "box"}
    for scene in scenes:
        assert scene.motion == scene.heading
        assert f"flying {scene.heading}" in scene.caption
        turned = [replace(scene, heading=heading) for heading in demo.HEADINGS]
        first = [demo.render(one, [0.0]) for one in turned]
        assert all(np.array_equal(frame, first[0]) for frame in first)
        later = [demo.render(one, [0.5]).tobytes() for one in turned]
        assert len(set(later)) == len(later)


def test_a_share_of_the_clips_is_told_and_the_others_are_written_as_before(tmp_path):
    folder = demo_clips.build(tmp_path / "told", clips=12, held_out=0, size=16, frames=2, told=0.5)
    rows = [json.loads(line) for line in (folder / "train" / "metadata.jsonl").read_text().splitlines()]
    told = [demo.Scene.of(row).told for row in rows]
    assert 0 < sum(told) < 12
    assert [row.get("told", False) for row in rows] == told
    assert all(row["shape"] != "dart" for row in rows if row.get("told"))


def test_build_is_repeatable_and_splits_differ(tmp_path):
    small = {"clips": 1, "held_out": 1, "size": 32, "frames": 3}
    first = contents(demo_clips.build(tmp_path / "a", **small))
    assert contents(demo_clips.build(tmp_path / "b", **small)) == first
    assert first["train/0000.mp4"] != first["held_out/0000.mp4"]
    other = contents(demo_clips.build(tmp_path / "c", **small, seed=1))
    assert other["train/0000.mp4"] != first["train/0000.mp4"]


def test_a_second_build_changes_nothing(tmp_path):
    folder = demo_clips.build(tmp_path / "demo", clips=1, held_out=1)
    stamp = (folder / "train" / "0000.mp4").stat().st_mtime_ns
    assert demo_clips.build(folder, clips=1, held_out=1) == folder
    assert (folder / "train" / "0000.mp4").stat().st_mtime_ns == stamp


def test_other_files_are_never_touched(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(DataError, match="holds other files; move it away or name another folder"):
        demo_clips.build(tmp_path, clips=1, held_out=1)
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_clips_of_other_settings_are_kept(tmp_path):
    folder = demo_clips.build(tmp_path / "demo", clips=1, held_out=0)
    before = contents(folder)
    with pytest.raises(DataError, match="demo clips of other settings"):
        demo_clips.build(folder, clips=2, held_out=0)
    assert contents(folder) == before


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    original, calls = video.write, []

    def interrupted(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(video, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_clips.build(tmp_path / "demo", clips=5, held_out=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [{"clips": 0}, {"held_out": -1}, {"frames": 1}, {"size": 8}, {"seed": -1}, {"told": 1.5}]
)
def test_impossible_settings_are_refused(tmp_path, wrong):
    with pytest.raises(DataError, match="cannot be built from"):
        demo_clips.build(tmp_path / "demo", **wrong)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "demo").touch()
    with pytest.raises(DataError, match="is a file; name a folder"):
        demo_clips.build(tmp_path / "demo")


def test_the_script_builds_and_reports_errors_in_one_line(tmp_path):
    script = Path(__file__).parents[2] / "datasets" / "build_demo.py"
    command = [sys.executable, str(script), str(tmp_path / "demo"), "--clips", "1", "--held-out", "1"]
    found = {**os.environ, "PYTHONPATH": str(Path(inflate.__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env=found)
    assert done.stdout.strip().endswith("1 training and 1 held-out clips")
    (tmp_path / "demo" / "demo.json").unlink()
    refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=found)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert len(refused.stderr.splitlines()) == 1


def test_the_opposite_look_keeps_to_the_same_colours():
    scene = demo.draw_scene(np.random.default_rng(3))
    opposite = replace(scene, colour=demo.OPPOSITE[scene.colour], ground=demo.OPPOSITE[scene.ground])
    repainted = demo.render(scene, [0.0, 0.5], look="opposite")
    assert np.array_equal(repainted, demo.render(opposite, [0.0, 0.5]))
    assert not np.array_equal(repainted, demo.render(scene, [0.0, 0.5]))
    assert np.array_equal(demo.render(opposite, [0.0, 0.5], look="opposite"), demo.render(scene, [0.0, 0.5]))


def test_the_swapped_look_exchanges_red_and_blue():
    scene = demo.draw_scene(np.random.default_rng(3))
    assert np.array_equal(demo.render(scene, [0.0], look="swapped"), demo.render(scene, [0.0])[..., ::-1])
