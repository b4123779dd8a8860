"""Which kernels compute attention in a run: `training.attention`, see `Training`.

Source: documentation of `torch.nn.attention.sdpa_kernel`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from inflate.errors import ConfigError
from inflate.training.paper import on_paper
from inflate.training.settings import Training

KERNELS = {
    "flash": (SDPBackend.FLASH_ATTENTION, cuda.can_use_flash_attention),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, cuda.can_use_efficient_attention),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, cuda.can_use_cudnn_attention),
}
"""PyTorch's own by name, in the order in which one that cannot be used gives way to the next."""
PACKAGES = {"xformers": "pip install xformers", "triton": "it comes with PyTorch for CUDA on Linux"}
INSTEAD = "set training.attention=sdpa"


def check_attention(settings: Training, device: torch.device) -> None:
    """Raise ConfigError where the device or the installation has no such kernels."""
    choice = settings.attention
    if choice == "sdpa":
        return
    if device.type != "cuda":
        raise ConfigError(f"training.attention={choice} needs a CUDA GPU, and this run is on {device.type}: {INSTEAD}")
    if choice in PACKAGES and find_spec(choice) is None:
        raise ConfigError(
            f"training.attention={choice}: {choice} is not installed ({PACKAGES[choice]}); install it, or {INSTEAD}"
        )


def choose_attention(networks: Sequence[nn.Module], settings: Training, device: torch.device) -> None:
    """Let the trained networks' attention be computed as the settings say.

    On paper only what changes memory is done. Raises ConfigError where no layer can be computed so.
    """
    choice = settings.attention
    if choice == "triton":
        _by_triton(networks)
    elif choice == "sdpa" or any(on_paper(parameter) for one in networks for parameter in one.parameters()):
        return
    elif choice == "xformers":
        _by_xformers(_layers(networks))
    else:
        _check_kernel(_layers(networks), settings, device)


def _layers(networks: Sequence[nn.Module]) -> list[Any]:
    """The attention layers of networks."""
    from diffusers.models.attention_processor import Attention  # not before a run asks: it takes seconds

    return [module for one in networks for module in one.modules() if isinstance(module, Attention)]


def _by_triton(networks: Sequence[nn.Module]) -> None:
    from inflate.layers.frame_attention import attend_frames_by
    from inflate.layers.frame_operator import MOST_CHANNELS, by_triton

    layers = [layer for one in networks for layer in attend_frames_by(one, by_triton)]
    if not layers:
        raise ConfigError(f"training.attention=triton: what is trained has no attention over frames; {INSTEAD}")
    widest = max(map(_width, layers))
    if widest > MOST_CHANNELS:
        raise ConfigError(
            f"training.attention=triton: heads of {widest} channels are wider than the {MOST_CHANNELS} that its kernel "
            f"takes; {INSTEAD}"
        )


def _by_xformers(layers: Sequence[Any]) -> None:
    for layer in layers:
        try:
            layer.set_use_memory_efficient_attention_xformers(True)
        except (ImportError, ValueError, RuntimeError) as error:  # among them that it was built for another PyTorch
            raise ConfigError(f"training.attention=xformers does not run here ({error}); {INSTEAD}") from error


def _check_kernel(layers: Sequence[Any], settings: Training, device: torch.device) -> None:
    """Raise ConfigError where a kernel of PyTorch's can compute none of the layers."""
    _, usable = KERNELS[settings.attention]
    dtype = {"no": torch.float32, "fp16": torch.float16}.get(settings.precision, torch.bfloat16)
    widths = sorted(set(map(_width, layers)))
    if not any(usable(_asked(width, dtype, device)) for width in widths):
        raise ConfigError(
            f"training.attention={settings.attention}: PyTorch cannot use it on this GPU for heads {widths} channels "
            f"wide in {dtype}; set training.precision=bf16, or {INSTEAD}"
        )


def _asked(width: int, dtype: torch.dtype, device: torch.device) -> Any:
    heads = torch.empty(1, 1, 16, width, dtype=dtype, device=device, requires_grad=True)
    return cuda.SDPAParams(heads, heads, heads, None, 0.0, False, False)


def _width(layer: Any) -> int:
    """Channels of each of its heads."""
    return int(layer.inner_dim) // int(layer.heads)


@contextmanager
def preferring(choice: str) -> Iterator[None]:
    """Let PyTorch's attention take the kernel of that name wherever it can; of another name, as it likes."""
    if choice not in KERNELS:
        yield
        return
    first = KERNELS[choice][0]
    others = [backend for backend, _ in KERNELS.values() if backend != first]
    with sdpa_kernel([first, *others, SDPBackend.MATH], set_priority=True):
        yield
