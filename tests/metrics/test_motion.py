from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inflate.data.demo import Scene, draw_scene, render
from inflate.errors import DataError
from inflate.metrics.motion import direction, object_mask

SIZE, FRAMES = 64, 8


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw_scene(rng) for _ in range(count)]


def clip(scene: Scene, frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    pixels = torch.from_numpy(render(scene, np.arange(frames) / 8, size))
    return pixels.permute(0, 3, 1, 2).float() / 255  # (F, 3, H, W)


def worsened(frames: torch.Tensor, seed: int) -> torch.Tensor:
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    soft = F.avg_pool2d(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return (soft + 0.06 * noise).clamp(0, 1)


def named(worsen: bool, frames: int) -> list[bool]:
    right = []
    for number, scene in enumerate(scenes(60)):
        pixels = worsened(clip(scene, frames), number) if worsen else clip(scene, frames)
        right.append(direction(pixels, object_mask(scene, SIZE)).name == scene.motion)
    return right


@pytest.mark.parametrize("worsen", [False, True], ids=["clean", "noise and blur"])
def test_the_motion_of_60_scenes_is_named(worsen):
    assert np.mean(named(worsen, FRAMES)) >= 0.95


def test_repeated_frames_are_still_under_noise_too():
    for number, scene in enumerate(scenes(10)):
        frames = clip(scene)[:1].repeat(FRAMES, 1, 1, 1)
        assert direction(frames, object_mask(scene, SIZE)).name == "still"
        assert direction(worsened(frames, number), object_mask(scene, SIZE)).name == "still"


def test_a_mirrored_clip_moves_the_other_way():
    mirrored = {"left": "right", "right": "left"}
    for scene in scenes(10, seed=3):
        motion = direction(clip(scene).flip(-1), object_mask(scene, SIZE).flip(-1))
        assert motion.name == mirrored.get(scene.motion, scene.motion)


def test_shift_and_growth_are_measured_per_frame():
    for scene in scenes(12, seed=4):
        motion = direction(clip(scene), object_mask(scene, SIZE))
        true_shift = [(v - p) / 8 for v, p in zip(scene.velocity, scene.pan, strict=True)]
        assert [motion.dx, motion.dy] == pytest.approx(true_shift, abs=0.0015)  # a tenth of a pixel
        if scene.zoom:  # the size of a dart, long and plain, is known less well
            assert motion.log_scale == pytest.approx(scene.zoom / 8, abs=0.004)


def test_frames_of_noise_do_not_agree_with_captions():
    noise = torch.rand(20, FRAMES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    right = [direction(x, object_mask(s, SIZE)).name == s.motion for x, s in zip(noise, scenes(20), strict=True)]
    assert np.mean(right) < 0.6


def test_two_frames_and_oblong_frames_will_do():
    scene = replace(scenes(1)[0], shape="dart", heading="right", speed="fast", texture="plain", x=0.4, y=0.5)
    frames, mask = clip(scene)[..., 8:-8, :], object_mask(scene, SIZE)[8:-8]
    assert direction(frames, mask).name == "right"
    assert direction(frames[[0, 4]], mask).name == "right"


def test_the_mask_is_where_the_shape_is():
    scene = replace(scenes(1)[0], shape="box", x=0.5, y=0.5, radius=0.25)
    mask = object_mask(scene, 100)
    assert mask[50, 50]
    assert not mask[:28].any()
    assert mask.sum().item() == pytest.approx((2 * 0.8 * 25) ** 2, rel=0.05)


def test_an_empty_mask_or_a_single_frame_is_refused():
    frames = torch.zeros(2, 3, 8, 8)
    with pytest.raises(DataError, match="mask"):
        direction(frames, torch.zeros(8, 8, dtype=torch.bool))
    with pytest.raises(DataError, match="F >= 2"):
        direction(frames[:1], torch.ones(8, 8, dtype=torch.bool))
