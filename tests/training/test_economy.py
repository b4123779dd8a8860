"""What saves memory in a run: frozen weights in fewer bits under adapters and beside temporal layers that learn."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_adapter import adapted, trained
from torch import Tensor, nn

from helpers import randomise, tiny_vae, write_image_model
from inflate.adapters import attach, merge, targets
from inflate.adapters.settings import KINDS
from inflate.errors import CheckpointError, ConfigError
from inflate.families import svd_outline
from inflate.families.svd import SVD
from inflate.layers import quantised
from inflate.layers.quantised import Kind
from inflate.models.unet import VideoUNet
from inflate.models.vae import VideoVAE, decode_clips, streams
from inflate.training.economy import save_coding, save_memory
from inflate.training.image_to_video import ImageToVideo, ImageToVideoTask, Preview
from inflate.training.memory import bytes_of
from inflate.training.memory_settings import Memory
from tiny_svd import Clips, family

SVD_XT = "stabilityai/stable-video-diffusion-img2vid-xt"


def step(unet: VideoUNet) -> tuple[Tensor, dict[str, Tensor]]:
    """A UNet's output, and the gradients of what learns of it."""
    output = unet(**targets.inputs(unet, 1)).sample
    output.square().mean().backward()
    gradients = {name: value.grad for name, value in unet.named_parameters() if value.grad is not None}
    assert gradients.keys() == {name for name, value in unet.named_parameters() if value.requires_grad}
    return output, gradients


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_learns_over_a_stored_base_as_over_the_same_weights_in_full(kind: str) -> None:
    unet = adapted(kind)
    plain = copy.deepcopy(unet)
    save_memory(unet, Memory(base="nf4"))
    stored = {name: layer for name, layer in unet.named_modules() if isinstance(layer, quantised.Stored)}
    assert any(name.endswith(".base_layer") for name in stored)
    for name, layer in stored.items():
        plain.get_submodule(name).weight.data = layer.weight
    (output, ours), (expected, theirs) = step(unet), step(plain)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5)
        assert gradient.any(), name


def test_where_every_layer_learns_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="memory.base=int8 is for weights that stay as they are"):
        save_memory(family().unet, Memory(base="int8"))


@pytest.mark.parametrize(("kind", "expected"), [("bf16", 3_051_314_088), ("int8", 1_529_260_968), ("nf4", 814_714_024)])
def test_what_svd_xt_takes_by_kind(kind: Kind, expected: int) -> None:
    unet = svd_outline.outline(SVD_XT).unet.requires_grad_(False)
    save_memory(unet, Memory(base=kind))
    plain = {n for n, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d)}
    stored = {name for name, layer in unet.named_modules() if isinstance(layer, quantised.Stored)}
    assert plain - stored == {"conv_in", "conv_out"}
    assert bytes_of([*unet.parameters(), *unet.buffers()]) == expected


def test_temporal_layers_trained_over_int8_are_exported_over_the_image_model_itself(tmp_path: Path) -> None:
    model = SVD.load(write_image_model(tmp_path / "image"))
    randomise(model.unet)
    before = copy.deepcopy(model.unet.state_dict())
    held_out = {name: value[None].float() for name, value in Clips()[100].items()} | {"number": torch.tensor([100])}
    small = ImageToVideo(trainable="temporal", held_out_clips=1, bands=1, preview_clips=1)
    made = ImageToVideoTask(model, small, [held_out], Preview(steps=1), lr=1e-2, seed=3)
    save_memory(model.unet, Memory(base="int8"))
    learning = {name: value for name, value in model.unet.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in learning.values():
            value.add_(0.01)
    made.export(tmp_path / "export")
    after = SVD.load(tmp_path / "export").unet.state_dict()
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert torch.equal(value, learning.get(name, before[name])), name
    assert quantised.kind_of(model.unet) == "int8"


def test_no_adapter_is_put_on_or_merged_into_stored_weights() -> None:
    unet = family().unet.requires_grad_(False)
    save_memory(unet, Memory(base="int8"))
    with pytest.raises(CheckpointError, match="stored in fewer bits"):
        merge.change(unet, trained().adapter)
    assert not attach.carries(unet)


def test_clips_are_decoded_in_parts_where_that_is_asked_for() -> None:
    image = tiny_vae()
    video = VideoVAE.from_2d(image)
    for rows in (0, 4):
        for vae in (image, video):
            save_coding(vae, Memory(decode_rows=rows))
        assert streams(video) is streams(image) is (rows > 0)
        latents = torch.randn(1, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
        for vae in (image, video):
            exact = decode_clips(vae, latents, temporal=vae is video)
            save_coding(vae, Memory(decode_rows=rows, decode_bf16=True))
            rounded = decode_clips(vae, latents, temporal=vae is video)
            assert rounded.dtype == torch.float32
            assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()
    with pytest.raises(ConfigError, match=r"memory.decode_rows=-1: must be 1 or more, or 0"):
        Memory(decode_rows=-1)
