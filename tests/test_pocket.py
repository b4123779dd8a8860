"""The pocket models that the package ships: whole, small, and knowing what they were trained for."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from inflate.data.demo import FPS, draw_scene, render
from inflate.families.svd import SVD
from inflate.families.video_ldm import VideoLDM
from inflate.metrics.video import psnr
from inflate.models.folders import SHIPPED
from inflate.surgery import verify_identity

POCKET = SHIPPED["pocket"]
LIMIT = 10_000_000


def rendered(count: int, frames: int) -> tuple[Tensor, list[str]]:
    """Clips (N, F, 3, 64, 64) in [-1, 1] that no model has seen, and their captions."""
    rng = np.random.default_rng(77)
    scenes = [draw_scene(rng) for _ in range(count)]
    clips = np.stack([render(scene, 0.5 + np.arange(frames) / FPS) for scene in scenes])
    return torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 127.5 - 1, [scene.caption for scene in scenes]


@pytest.mark.parametrize("name", SHIPPED)
def test_it_is_small_and_speaks_of_no_other_place(name: str) -> None:
    files = [path for path in SHIPPED[name].rglob("*") if path.is_file()]
    assert 1_000_000 < sum(path.stat().st_size for path in files) <= LIMIT
    for path in files:
        if path.suffix == ".json" and path.name != "tokenizer.json":
            assert "_name_or_path" not in json.loads(path.read_text()), path


def test_it_inflates_without_a_change_to_its_frames() -> None:
    family = SVD.load("pocket", frames=4)
    parents = StableDiffusionPipeline.from_pretrained(POCKET, safety_checker=None, feature_extractor=None)
    assert verify_identity(family.unet, parents.unet) <= 1e-5
    assert verify_identity(family.vae, parents.vae) <= 1e-5
    assert family.objective.noise_condition == "discrete"


def test_its_autoencoder_knows_the_demo_world() -> None:
    clips, _ = rendered(8, 1)
    family = SVD.load("pocket", frames=1)
    with torch.no_grad():
        latents = family.encode(clips)
        decoded = family.decode(latents)
    assert 0.8 < float(latents.std()) < 1.2  # scaled latents have deviation 1
    assert float(psnr((decoded.clamp(-1, 1) + 1) / 2, (clips + 1) / 2).mean()) > 28


@torch.no_grad()
def test_the_text_to_video_model_knows_how_the_demo_world_moves() -> None:
    clips, captions = rendered(6, 8)
    family = VideoLDM.load("pocket-t2v")
    clean, context = family.encode(clips), family.embed(captions)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    timestep = torch.full((6,), 625)
    loss, bypassed = (
        float(family.objective.loss(family.predict(context, image_only=alone), clean, timestep, noise).mean())
        for alone in (False, True)
    )
    assert loss < 0.65 * bypassed


@torch.no_grad()
def test_the_image_to_video_model_knows_how_the_demo_world_moves() -> None:
    clips, _ = rendered(6, 8)
    family = SVD.load("pocket-svd")
    assert (family.frames, family.fps, family.height) == (8, 8.0, 64)
    clean, first = family.encode(clips), clips[:, 0]
    told = torch.full((6,), 8.0), torch.full((6,), 127.0), torch.full((6,), 0.02)
    condition = family.condition(first, *told, torch.zeros_like(first))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((6,), 1.0)
    loss, bypassed = (
        float(family.objective.loss(family.predict(condition, image_only=alone), clean, sigma, noise).mean())
        for alone in (False, True)
    )
    assert loss < 0.8 * bypassed
