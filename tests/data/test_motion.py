"""The motion score against motion that is known exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from inflate.data import demo
from inflate.data.motion import flow, motion_score


def waves(velocity, fps=8.0, height=64, width=64, frames=6):
    """A smooth texture that moves as a whole; velocity in short sides per second."""
    side = min(height, width)
    y, x = (np.arange(n)[:, None] / side for n in (height, width))
    rng = np.random.default_rng(2)
    result = np.zeros((frames, height, width))
    for _ in range(12):
        (a, b), phase = rng.uniform(-5, 5, 2), rng.uniform(0, 6.3)
        for n in range(frames):
            shift = a * velocity[0] * n / fps + b * velocity[1] * n / fps
            result[n] += np.sin(2 * np.pi * (a * x.T + b * y - shift) + phase)
    return np.clip(128 + 25 * result, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)


@pytest.mark.parametrize("velocity", [(0.1, 0.0), (0.0, -0.25), (0.2, 0.2), (-0.5, 0.0), (0.8, 0.0)])
def test_score_is_the_speed_of_a_moving_picture(velocity):
    assert motion_score(waves(velocity), 8) == pytest.approx(np.hypot(*velocity), rel=0.06)


@pytest.mark.parametrize(("fps", "height", "width"), [(24.0, 64, 64), (8.0, 128, 96), (8.0, 135, 240)])
def test_score_does_not_depend_on_rate_or_size(fps, height, width):
    assert motion_score(waves((0.2, 0.1), fps, height, width), fps) == pytest.approx(np.hypot(0.2, 0.1), rel=0.08)


def test_flow_points_where_the_picture_goes():
    grey = waves((0.25, -0.125))[:, ::2, ::2, 0].astype(np.float32) / 255
    x, y = flow(grey[:-1], grey[1:])
    assert np.median(x) == pytest.approx(1.0, abs=0.05)
    assert np.median(y) == pytest.approx(-0.5, abs=0.05)


def test_still_and_flat_pictures_score_zero():
    assert motion_score(waves((0.0, 0.0)), 8) == 0
    assert motion_score(np.full((4, 64, 64, 3), 90, np.uint8), 8) == 0
    assert motion_score(waves((0.3, 0.0))[:1], 8) == 0


def test_noise_on_flat_ground_is_not_motion():
    noise = np.random.default_rng(0).integers(-2, 3, (6, 64, 64, 1))
    assert motion_score((100 + noise).repeat(3, -1).astype(np.uint8), 8) < 0.01


@pytest.mark.parametrize("number", range(6))
def test_score_rises_with_the_demo_speeds(number):
    scene = demo.draw_scene(np.random.default_rng(number))
    times = np.arange(8) / demo.FPS
    scores = [motion_score(demo.render(replace(scene, speed=speed), times), demo.FPS) for speed in demo.SPEEDS]
    assert scores[0] * 1.2 < scores[1]
    assert scores[1] * 1.1 < scores[2]


@pytest.mark.parametrize(("height", "width"), [(2, 2), (5, 33), (40, 3)])
def test_tiny_frames_have_a_finite_score(height, width):
    frames = np.random.default_rng(0).integers(0, 255, (3, height, width, 3), dtype=np.uint8)
    assert np.isfinite(motion_score(frames, 8))
