"""Perceptual distance between images: LPIPS with its published weights, or features of the model's own VAE encoder.

LPIPS (Zhang et al. 2018, section 3): unit-normalise the features of five layers of VGG16 over channels, square their
difference, weight it by a learned linear head, average over positions and sum over layers. The backbone is the ImageNet
VGG16 whose tensors are called `features.N.weight`; the heads are those of LPIPS version 0.1, `linN.model.1.weight`.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from inflate.errors import CheckpointError, ConfigError
from inflate.objectives import at_least_float32

logger = logging.getLogger(__name__)

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions of each stage; a stage ends in the ReLU that LPIPS reads, then pools."""


class LPIPS(nn.Module):
    """LPIPS distance of images (N, 3, H, W) in [-1, 1], H and W at least 16: `(N,)`.

    Takes the tensors of the two published files; a missing, surplus or misshapen one raises CheckpointError.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, backbone: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.features = _vgg16()
        self.heads = nn.ParameterList(torch.zeros(1, stage[-1], 1, 1) for stage in VGG16)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        convolutions = {k: v for k, v in backbone.items() if not k.startswith("classifier.")}
        _fill({f"features.{k}": v for k, v in self.features.named_parameters()}, convolutions, "VGG16 backbone")
        _fill({f"lin{i}.model.1.weight": v for i, v in enumerate(self.heads)}, heads, "LPIPS heads")
        self.requires_grad_(False).eval()

    @classmethod
    def from_files(cls, backbone: Path, heads: Path) -> LPIPS:
        """Read both files (.safetensors, or a PyTorch file of tensors); CheckpointError names the one at fault."""
        return cls(_read(backbone), _read(heads))

    def forward(self, output: Tensor, truth: Tensor) -> Tensor:
        distance = output.new_zeros(len(output), dtype=torch.float32)
        pairs = zip(self._stages(output), self._stages(truth), self.heads, strict=True)
        for a, b, head in pairs:
            difference = (_unit(a) - _unit(b)).square()  # (N, C, h, w)
            distance = distance + (difference * head).sum(1).mean((1, 2))  # (N,)
        return distance

    def _stages(self, image: Tensor) -> list[Tensor]:
        taps, x = [], (image - self.shift) / self.scale
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in (3, 8, 15, 22, 29):
                taps.append(x)
        return taps


class EncoderFeatures(nn.Module):
    """The same distance on the features of a frozen VAE encoder, all channels weighted alike: for want of VGG weights.

    The encoder is shared, not copied: it must stay frozen. Images (N, 3, H, W) in [-1, 1] to `(N,)`.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self._vae = [vae]  # in a list: the encoder is not a child, so it is neither moved nor saved twice

    def forward(self, output: Tensor, truth: Tensor) -> Tensor:
        distance = output.new_zeros(len(output), dtype=torch.float32)
        for a, b in zip(self._stages(output), self._stages(truth), strict=True):
            distance = distance + (_unit(a) - _unit(b)).square().sum(1).mean((1, 2))  # (N,)
        return distance

    def _stages(self, image: Tensor) -> list[Tensor]:
        encoder = self._vae[0].encoder
        x = encoder.conv_in(image)
        stages = [x]
        for block in encoder.down_blocks:
            x = block(x)
            stages.append(x)
        return stages


def framewise(distance: nn.Module, output: Tensor, truth: Tensor) -> Tensor:
    """A perceptual distance of images (N, 3, H, W), one image at a time: `(N,)`.

    Nothing but the gradient of each image is kept for the backward pass. The distance's own weights get none.
    """
    found: Tensor = _Framewise.apply(distance, output, truth)
    return found


class _Framewise(torch.autograd.Function):
    """A frame's distance is a single number: its gradient, taken at once, is all that its backward pass needs."""

    @staticmethod
    def forward(ctx: Any, distance: nn.Module, output: Tensor, truth: Tensor) -> Tensor:
        pairs = zip(output.split(1), truth.split(1), strict=True)
        if not ctx.needs_input_grad[1]:
            return torch.cat([distance(*pair) for pair in pairs])
        found, gradients = zip(*(_with_gradient(distance, *pair) for pair in pairs), strict=True)
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (of_images,) = ctx.saved_tensors
        return None, of_images * gradient.view(-1, 1, 1, 1).to(of_images.dtype), None


def _with_gradient(distance: nn.Module, image: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The distance of one image (1, 3, H, W) and its gradient."""
    image = image.detach().requires_grad_()
    with torch.enable_grad():
        found = distance(image, truth)  # (1,)
    return found.detach(), torch.autograd.grad(found, image, torch.ones_like(found))[0]


def perceptual_distance(backbone: Path | None, heads: Path | None, vae: AutoencoderKL) -> nn.Module:
    """LPIPS from two files, or `EncoderFeatures` when neither is given (logged); ConfigError when one is missing."""
    if (backbone is None) != (heads is None):
        missing = "decoder.vgg_weights" if backbone is None else "decoder.lpips_heads"
        raise ConfigError(f"{missing} is not set: LPIPS needs the VGG16 backbone and its heads; give both or none")
    if backbone is None or heads is None:
        logger.warning("no decoder.vgg_weights given: the perceptual distance uses features of the VAE's own encoder")
        return EncoderFeatures(vae)
    return LPIPS.from_files(backbone, heads)


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for number, stage in enumerate(VGG16):
        if number:
            layers.append(nn.MaxPool2d(2))
        for wider in stage:
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU()]
            channels = wider
    return nn.Sequential(*layers)


def _unit(features: Tensor) -> Tensor:
    """Unit length over channels; vector_norm, unlike the root of a sum, has a gradient where all channels are 0."""
    x = at_least_float32(features)
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _fill(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    missing, surplus = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    misshapen = [k for k in parameters.keys() & tensors.keys() if parameters[k].shape != tensors[k].shape]
    if missing or surplus or misshapen:
        raise CheckpointError(f"{name}: missing {missing}, surplus {surplus}, of another shape {sorted(misshapen)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(tensors[key])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path} cannot be read as perceptual weights: {error}") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds {type(tensors).__name__}, not a dictionary of tensors")
    return tensors
