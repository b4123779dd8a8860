"""Motions that are rendered exactly are measured by the fitted flow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from inflate.data.demo import SPEEDS, Scene, draw_scene, render
from inflate.errors import DataError
from inflate.metrics.flow import Motion, motions

FPS = 8.0
Pixels = np.ndarray


def scenes(count: int, seed: int = 9) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(count)]


def frames(scene: Scene, count: int = 8, fps: float = FPS, size: int = 64) -> Pixels:
    return render(scene, np.arange(count) / fps, size)


def moved(
    right: float = 0.0,
    down: float = 0.0,
    zoom: float = 0.0,
    turn: float = 0.0,
    fps: float = FPS,
    shape: tuple[int, int] = (64, 96),
) -> Pixels:
    """Eight frames of a smooth random pattern under a similarity motion about the frame's centre, rendered exactly."""
    rng = np.random.default_rng(4)
    waves, phases = rng.normal(0, 14, (30, 2)), rng.uniform(0, 2 * np.pi, 30)
    height, width = shape
    y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    at = np.stack([x, y], -1) / min(height, width)
    shown = []
    for time in np.arange(8) / fps:
        cos, sin = np.cos(turn * time), np.sin(turn * time)
        back = (at - np.array([right, down]) * time) @ np.array([[cos, -sin], [sin, cos]]) / np.exp(zoom * time)
        light = np.sin(back @ waves.T + phases).sum(-1) / 12
        shown.append(np.clip(127.5 + 127.5 * light, 0, 255))
    return np.stack(shown).round().astype(np.uint8)[..., None].repeat(3, -1)


@pytest.mark.parametrize(
    ("motion", "name"),
    [
        ({"right": 0.2}, "right"), ({"right": -0.12}, "left"), ({"down": -0.2}, "up"), ({"down": 0.15}, "down"),
        ({"zoom": 0.25}, "in"), ({"zoom": -0.25}, "out"),
        ({"turn": 0.3}, "clockwise"), ({"turn": -0.3}, "anticlockwise"),
        ({"right": 0.1, "down": -0.06, "zoom": 0.1, "turn": 0.1}, "right"), ({}, "still"),
    ],
)  # fmt: skip
def test_the_camera_s_motion_is_measured(motion: dict[str, float], name: str) -> None:
    found = motions(moved(**motion), FPS)
    assert found.name == name
    assert found.object is None
    expected = [motion.get(part, 0.0) for part in ("right", "down", "zoom", "turn")]
    assert [found.scene.right, found.scene.down, found.scene.zoom, found.scene.turn] == pytest.approx(
        expected, abs=0.02
    )


def test_motion_is_per_second_whatever_the_rate_and_in_shorter_sides() -> None:
    for fps in (8.0, 24.0):
        found = motions(moved(right=0.2, fps=fps, shape=(96, 64)), fps)
        assert found.scene.right == pytest.approx(0.2, abs=0.012)
        assert found.scene.speed == pytest.approx(0.2, abs=0.012)


def test_an_object_and_the_scene_behind_it_are_told_apart() -> None:
    followed = [scene for scene in scenes(60) if scene.texture == "checks" and scene.shape == "dart"][:3]
    assert len(followed) == 3
    for scene in followed:
        found = motions(frames(scene), FPS)
        shift = [v - p for v, p in zip(scene.velocity, scene.pan, strict=True)]
        assert [found.scene.right, found.scene.down] == pytest.approx([-p for p in scene.pan], abs=0.01)
        assert [found.object.right, found.object.down] == pytest.approx(shift, abs=0.025)


def test_over_a_plain_ground_only_the_object_is_seen() -> None:
    scene = replace(scenes(1)[0], shape="dart", heading="up", speed="medium", texture="plain", x=0.5, y=0.6)
    found = motions(frames(scene), FPS)
    assert found.scene is None
    assert found.object.down == pytest.approx(-SPEEDS["medium"], abs=0.01)
    assert found.name == "up"


@pytest.mark.parametrize("noise", [0, 8])
def test_the_motion_of_scenes_is_named(noise: int) -> None:
    rng = np.random.default_rng(1)
    right = []
    for scene in scenes(10, seed=21):
        shown = frames(scene)
        shown = np.clip(shown + rng.normal(0, noise, shown.shape), 0, 255).astype(np.uint8)
        right.append(motions(shown, FPS).name == scene.motion)
    assert np.mean(right) > 0.9


def test_frames_of_one_colour_do_not_move() -> None:
    grey = np.full((4, 32, 32, 3), 90, np.uint8)
    found = motions(grey, FPS)
    assert (found.scene, found.object, found.name) == (None, None, "still")


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (5, 8, 40, 3), (7, 33, 17, 3)])
def test_noise_of_any_size_has_some_answer_and_repeated_noise_is_still(shape: tuple[int, ...]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.isfinite([motion.speed for motion in vars(motions(noise, FPS)).values() if motion]).all()
    assert motions(noise[:1].repeat(shape[0], 0), FPS).name == "still"


def test_equally_bright_colours_are_told_apart() -> None:
    scene = replace(scenes(1)[0], shape="dart", heading="left", speed="fast", texture="plain", x=0.6, y=0.5)
    mask = np.abs(frames(scene).astype(int) - frames(scene)[0, 0, 0].astype(int)).max(-1) > 40
    shown = np.where(mask[..., None], np.uint8([160, 80, 80]), np.uint8([80, 80, 160]))
    assert motions(shown, FPS).name == "left"


def test_one_frame_is_refused() -> None:
    with pytest.raises(DataError, match="two frames"):
        motions(np.zeros((1, 32, 32, 3), np.uint8), FPS)


def test_speed_counts_what_zoom_and_turn_move() -> None:
    assert Motion(0.3, 0.4, 0.0, 0.0, 0.4).speed == pytest.approx(0.5)
    assert Motion(0.0, 0.0, 0.3, 0.4, 0.5).speed == pytest.approx(0.25)
