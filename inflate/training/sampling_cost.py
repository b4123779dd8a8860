"""What drawing a clip needs of a GPU's memory, known without GPU or weights: the sampler itself, on paper."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from inflate.data.buckets import Bucket
from inflate.families.svd import SVD
from inflate.sampling.svd import Sampling, condition_of, decoded, initial_noise, sample_latents
from inflate.training.memory import Ledger, tensors_of
from inflate.training.paper import DEVICE, Paper

PARTS = ("embed", "encode", "denoise", "decode")
"""What of sampling has a network of its own on the device: image encoder, VAE, UNet, VAE."""


def on_paper(family: SVD, size: Bucket, settings: Sampling, gpu: bool = True) -> dict[str, int]:
    """The highest use of memory in bytes in each part of drawing one clip, counted as `Cost` counts it.

    The networks are on the meta device, as `svd_outline.outline` gives them, in the precision that they are to have;
    without `gpu` the paper does as the CPU, for comparison with what can be measured there.
    """
    paper = Paper(gpu)
    with paper.active():
        image = paper.empty(1, 3, size.height, size.width)
        return measure(family, image, replace(settings, frames=size.frames, steps=1), gpu)  # every step needs the same


def measure(family: SVD, image: Tensor, settings: Sampling, gpu: bool = False) -> dict[str, int]:
    """The same of `sample` as it runs on the CPU; networks that are there already count all the time."""
    ledger, generator = Ledger(DEVICE.type, workspaces=gpu), torch.Generator().manual_seed(settings.seed)
    gc.collect()  # a dead cycle that is collected in mid-run would count as memory that the sampler gave back
    with ledger, _between_encoders(family, ledger):
        ledger.begin("embed")
        ledger.record([image, *(tensor for network in family.parts.values() for tensor in tensors_of(network))])
        condition = condition_of(family, image, settings, generator)
        noise = initial_noise(family, image, settings, generator)
        ledger.begin("denoise")
        latents = sample_latents(family, condition, noise, settings)
        ledger.begin("decode")
        decoded(family, latents, settings.little_memory)
        ledger.begin("other")
    return {part: ledger.peaks[part] for part in PARTS}


@contextmanager
def _between_encoders(family: SVD, ledger: Ledger) -> Iterator[None]:
    """Tell the image encoder's part from the VAE's, which comes when the other has gone."""
    with ExitStack() as stack:
        leaving = family.image_encoder.register_forward_hook(lambda *_: ledger.begin("other"))
        entering = family.vae.encoder.register_forward_pre_hook(lambda *_: ledger.begin("encode"))
        stack.callback(leaving.remove)
        stack.callback(entering.remove)
        yield
