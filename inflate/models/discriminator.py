"""Patch discriminators: one logit per patch of a clip, or of a frame.

Both take clips `(batch, frames, 3, height, width)` in [-1, 1]. They follow the PatchGAN of image autoencoders (Isola et
al. 2017; 4x4 convolutions over frames) and its 3D form (3x3x3 convolutions over clips). A batch of one or two clips per
GPU makes the statistics of batch normalisation meaningless, hence group or spectral normalisation; `batch` is there to
load published discriminators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from inflate.errors import CheckpointError, ConfigError

Norm = Literal["group", "spectral", "batch"]


class VideoDiscriminator(nn.Module):
    """Patch-wise 3D discriminator of clips: (B, F, 3, H, W) to logits (B, F', h, w).

    channels: of the first convolution, a multiple of 8; layers: convolutions with a norm, all but the last of them
    halve height and width; temporal_stride: 1, 2 or 4, over all layers. Raises ConfigError.
    """

    def __init__(
        self, channels: int = 64, layers: int = 3, norm: Norm = "group", temporal_stride: int = 2, inputs: int = 3
    ) -> None:
        super().__init__()
        if temporal_stride not in (1, 2, 4) or (temporal_stride > 1 and layers < 2):
            raise ConfigError(
                f"a temporal stride of {temporal_stride} with {layers} layers: choose 1, 2 or 4, and 2 layers or more"
            )
        halving = {1: (), 2: (1,), 4: (0, 1)}[temporal_stride]
        strides = [(2 if n in halving else 1, 2, 2) for n in range(layers)]
        self.layers = _patch_layers(nn.Conv3d, 3, strides, channels, norm, inputs)

    def forward(self, clip: Tensor) -> Tensor:
        x = clip.transpose(1, 2)  # (B, 3, F, H, W)
        logits: Tensor = self.layers(x)  # (B, 1, F', h, w)
        return logits.squeeze(1)  # (B, F', h, w)


class ImageDiscriminator(nn.Module):
    """Patch-wise discriminator of single frames: (B, F, 3, H, W) to logits (B, F, h, w). Settings as above."""

    def __init__(self, channels: int = 64, layers: int = 3, norm: Norm = "group", inputs: int = 3) -> None:
        super().__init__()
        self.layers = _patch_layers(nn.Conv2d, 4, [(2, 2)] * layers, channels, norm, inputs)

    def forward(self, clip: Tensor) -> Tensor:
        logits: Tensor = self.layers(clip.flatten(0, 1))  # (B*F, 1, h, w)
        return logits.squeeze(1).unflatten(0, clip.shape[:2])  # (B, F, h, w)


def _patch_layers(
    conv: type[nn.Conv2d] | type[nn.Conv3d],
    kernel: int,
    strides: Sequence[tuple[int, ...]],
    channels: int,
    norm: Norm,
    inputs: int,
) -> nn.Sequential:
    if channels % 8 or channels < 8 or not strides:
        raise ConfigError(
            f"a discriminator of {channels} channels, {len(strides)} layers: needs a multiple of 8, and 1 or more"
        )
    widths = [channels * min(2**n, 8) for n in range(len(strides) + 1)]
    modules: list[nn.Module] = [
        _convolution(conv, norm, True, inputs, widths[0], kernel, strides[0]),
        nn.LeakyReLU(0.2),
    ]
    for number in range(1, len(widths)):
        stride = strides[number] if number < len(strides) else 1
        modules.append(_convolution(conv, norm, norm == "spectral", widths[number - 1], widths[number], kernel, stride))
        if norm != "spectral":
            modules.append(_normalisation(conv, norm, widths[number]))
        modules.append(nn.LeakyReLU(0.2))
    modules.append(_convolution(conv, norm, True, widths[-1], 1, kernel, 1))
    return nn.Sequential(*modules)


def _convolution(
    conv: type[nn.Conv2d] | type[nn.Conv3d], norm: Norm, bias: bool, inputs: int, outputs: int, kernel: int, stride: Any
) -> nn.Module:
    module = conv(inputs, outputs, kernel, stride, padding=1, bias=bias)
    nn.init.normal_(module.weight, 0.0, 0.02)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return spectral_norm(module) if norm == "spectral" else module


def _normalisation(conv: type[nn.Conv2d] | type[nn.Conv3d], norm: Norm, channels: int) -> nn.Module:
    if norm == "group":  # groups of 8 channels: with one channel each, the mean over a clip would be lost
        return nn.GroupNorm(channels // 8, channels)
    return nn.BatchNorm2d(channels) if conv is nn.Conv2d else nn.BatchNorm3d(channels)


def load_published(network: VideoDiscriminator | ImageDiscriminator, tensors: Mapping[str, Tensor]) -> None:
    """Fill a `norm="batch"` discriminator from a published PatchGAN's tensors (`...NUMBER.weight` and so on).

    Layers are matched in the order of their numbers. Raises CheckpointError, changing nothing, unless all tensors fit.
    """
    expected = network.state_dict()
    theirs, ours = (sorted({n for n in map(_layer, keys) if n is not None}) for keys in (tensors, expected))
    place = dict(zip(theirs, ours, strict=False))
    found = {_placed(key, place): tensor for key, tensor in tensors.items()}
    wrong = found.keys() ^ expected.keys()
    wrong |= {key for key in found.keys() & expected.keys() if found[key].shape != expected[key].shape}
    if wrong:
        raise CheckpointError(f"the discriminator's tensors do not fit this network: {sorted(wrong)}")
    network.load_state_dict(found)


def _layer(key: str) -> int | None:
    number = key.split(".")[-2:-1]
    return int(number[0]) if number and number[0].isdigit() else None


def _placed(key: str, place: Mapping[int, int]) -> str:
    """This network's name of a published tensor; its own where there is none, which is then reported as surplus."""
    layer = _layer(key)
    return key if layer is None or layer not in place else f"layers.{place[layer]}.{key.split('.')[-1]}"
