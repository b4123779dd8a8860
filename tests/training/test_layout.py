"""Weights that lie channels last: the same output and gradients, trained or frozen, and what is saved lies as ever."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import randomise
from inflate.errors import TrainingError
from inflate.layers.branches import FrameTransformer
from inflate.layers.clip import ClipState
from inflate.training.layout import put_channels_last
from inflate.training.loop import fit
from inflate.training.player import check_shardable
from inflate.training.settings import Training
from inflate.training.sharding import Sharding
from tiny_svd import Clips, family, image_to_video


def gradients(network: nn.Module, output: Tensor) -> list[Tensor]:
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("trained", ["all", "temporal"])
def test_networks_compute_the_same(trained: str) -> None:
    made = family()
    torch.manual_seed(0)
    sample, latents = torch.randn(1, 2, 8, 6, 6), torch.randn(1, 2, 4, 6, 6)
    found: list[list[Tensor]] = []
    for channels_last in (False, True):
        results: list[Tensor] = []
        for network in (made.unet, made.vae):
            network.float().train().zero_grad()
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(trained == "all" or ".temporal." in name)
            if channels_last:
                put_channels_last(network)
        ids = torch.ones(1, 3)
        output = made.unet(sample, 1.0, torch.ones(1, 1, 8), added_time_ids=ids, return_dict=False)[0]
        pixels = made.vae.decode(latents, return_dict=False)[0]
        results += [output.detach(), pixels.detach(), *gradients(made.unet, output), *gradients(made.vae, pixels)]
        found.append([each.clone() for each in results])
    assert made.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert not made.unet.conv_in.weight.is_contiguous()
    scale = max(each.abs().max().item() for each in found[0])
    for plain, last in zip(*found, strict=True):
        torch.testing.assert_close(last, plain, atol=1e-5 * scale, rtol=1e-5)


def test_a_norm_per_frame_takes_input_without_a_gradient() -> None:
    layer, hidden = FrameTransformer(8, 2, 4, 4, "frame"), torch.randn(4, 8, 4, 4)
    randomise(layer)
    plain = gradients(layer, layer(hidden, None, ClipState(2)))
    layer.zero_grad()
    last = gradients(layer, layer(hidden.contiguous(memory_format=torch.channels_last), None, ClipState(2)))
    for one, other in zip(plain, last, strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_trains_the_same_and_saves_as_ever(tmp_path) -> None:  # type: ignore[no-untyped-def]
    weights = []
    for channels_last in (False, True):
        output = tmp_path / str(channels_last)
        settings = Training(
            output=output, steps=2, lr=1e-3, workers=0, tracker="none", progress=False, ema=0.5,
            channels_last=channels_last,
        )  # fmt: skip
        task = image_to_video()
        task.export = task.family.unet.save_pretrained  # type: ignore[method-assign]  # diffusers has no place for the rest
        fit(task, Clips(), settings)
        files = output / "checkpoint-2" / "unet.safetensors", output / "export" / "diffusion_pytorch_model.safetensors"
        weights.append({**load_file(files[0]), **load_file(files[1])})
    assert weights[0].keys() == weights[1].keys()
    for name, plain in weights[0].items():
        torch.testing.assert_close(weights[1][name], plain, atol=1e-5, rtol=0)


def test_sharding_is_refused() -> None:
    with pytest.raises(TrainingError, match="channels_last=true: weights in another order cannot be sharded"):
        check_shardable(image_to_video().players, Training(channels_last=True), Sharding(True))
