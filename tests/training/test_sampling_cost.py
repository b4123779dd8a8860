"""The memory of sampling on paper against the real sampler, and at the published model's size."""

from __future__ import annotations

import copy

import pytest
import torch

from inflate.data.buckets import Bucket
from inflate.families import svd_outline
from inflate.families.svd import SVD
from inflate.models.precision import cast
from inflate.sampling.svd import Sampling
from inflate.training.memory import bytes_of, tensors_of
from inflate.training.sampling_cost import PARTS, measure, on_paper
from tiny_svd import FRAMES, SIDE, family

XT = "stabilityai/stable-video-diffusion-img2vid-xt"
GB = 1e9


def away(made: SVD) -> SVD:
    """The same model without memory."""
    made = copy.deepcopy(made)
    for network in made.parts.values():
        network.to("meta")
    return made


@pytest.mark.parametrize("little", [True, False])
def test_a_part_needs_its_network_and_what_that_makes(little: bool) -> None:
    made, settings = family(), Sampling(steps=1, frames=FRAMES, little_memory=little)
    for network in made.parts.values():
        network.float()
    ahead = on_paper(away(made), Bucket(FRAMES, SIDE, SIDE), settings, gpu=False)
    real = measure(made, torch.zeros(1, 3, SIDE, SIDE), settings)
    sizes = {name: bytes_of(tensors_of(network)) for name, network in made.parts.items()}
    for part, own in zip(PARTS, ("image_encoder", "vae", "unet", "vae"), strict=True):
        assert ahead[part] == pytest.approx(real[part] - sum(sizes.values()) + sizes[own], rel=0.02), part


def test_the_published_model_samples_in_little_memory() -> None:
    made = svd_outline.outline(XT)
    cast(made.parts.values(), "bfloat16")
    peaks = {part: peak / GB for part, peak in on_paper(made, Bucket(25, 576, 1024), Sampling()).items()}
    assert max(peaks["embed"], peaks["encode"]) < 2
    assert max(peaks["denoise"], peaks["decode"]) < 6
