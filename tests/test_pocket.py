"""The pocket Stable Diffusion that the package ships: whole, small, and inflated without a change."""

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

import inflate
from inflate.families.svd import SVD
from inflate.metrics.video import psnr
from inflate.surgery import verify_identity

POCKET = Path(inflate.__file__).parent / "pocket"
LIMIT = 10_000_000


def test_it_is_small_and_speaks_of_no_other_place() -> None:
    files = [path for path in POCKET.rglob("*") if path.is_file()]
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
    import numpy as np

    from inflate.data.demo import draw_scene, render

    rng = np.random.default_rng(77)
    frames = np.stack([render(draw_scene(rng), [0.5])[0] for _ in range(8)])
    clips = torch.from_numpy(frames).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1  # (8, 1, 3, 64, 64)
    family = SVD.load("pocket", frames=1)
    with torch.no_grad():
        latents = family.encode(clips)
        decoded = family.decode(latents)
    assert 0.8 < float(latents.std()) < 1.2  # scaled latents have deviation 1
    assert float(psnr((decoded.clamp(-1, 1) + 1) / 2, (clips + 1) / 2).mean()) > 28
